import io
import json
import runpy
import sys

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import neumuter
from neumuter import evaluation
from neumuter.demo import run, run_demo, task, tutorial
from neumuter.demo.model import Training, architecture, load_or_train
from neumuter.recipes import FittedConfig, GainsConfig, SupportConfig
from neumuter.texts import read_texts
from neumuter.types import IGNORED
from tests import demo_bars

KEYS = {
    "name",
    "muted_share",
    "forget_extraction",
    "retain_same_extraction",
    "retain_other_extraction",
    "forget_ma",
    "forget_nll",
    "heldout_ppl",
    "seconds",
}


@pytest.fixture(scope="module")
def corpus():
    return task.read_corpus()


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return task.train_tokenizer(corpus[0])


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("NEUMUTER_CACHE", str(tmp_path / "cache"))


def test_records_differ_in_name_and_secret_and_follow_the_seed():
    records = task.make_records(5)
    everything = records.forget + records.retain
    assert [len(records.forget), len(records.retain_same), len(records.retain_other)] == [12, 12, 24]
    assert len({record.prompt for record in everything}) == 48
    assert len({secret for record in everything for secret in record.secrets}) == 96
    assert records == task.make_records(5)
    assert records != task.make_records(6)


def test_the_corpus_holds_out_texts_that_are_nowhere_else(corpus):
    texts, heldout = corpus
    assert not set(texts) & set(heldout)
    assert len(heldout) > 100


def test_labels_are_the_secrets_the_continuation_or_all(tokenizer):
    records = task.make_records(0).forget
    for counted in ("secret", "continuation", "record"):
        batch = task.encode(tokenizer, records, counted)
        for record, row in zip(records, batch["labels"], strict=True):
            text = tokenizer.decode(row[row != IGNORED]).replace(" ", "")
            expected = {
                "secret": "".join(record.secrets),
                "continuation": record.continuation,
                "record": record.text,
            }[counted]
            assert text == expected.replace(" ", "")
        assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_a_model_is_trained_once_per_content_and_a_damaged_cache_is_replaced(tokenizer, corpus, tmp_path):
    text = task.windows(tokenizer, corpus[1])
    records = task.encode(tokenizer, task.make_records(0).forget)
    steps = []

    def run_training(seed=0, fresh=False):
        steps.clear()
        state = load_or_train(text, records, Training(steps=2), seed, fresh, lambda *step: steps.append(step))
        return state, len(steps)

    first, count = run_training()
    again, cached = run_training()
    assert (count, cached) == (2, 0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert run_training(fresh=True)[1] == 2
    assert run_training(seed=1)[1] == 2
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:1000])
    repaired, count = run_training()
    assert count == 2
    assert all(torch.equal(first[name], repaired[name]) for name in first)


def test_the_whole_job_leaves_whole_files_that_agree(monkeypatch, corpus, tmp_path):
    monkeypatch.setattr(run, "Training", lambda: Training(steps=3))
    monkeypatch.setattr(task, "HELDOUT_WINDOWS", 4)
    small = architecture()
    small.hidden_size, small.intermediate_size, small.head_dim = 32, 128, 8
    monkeypatch.setattr("neumuter.demo.model.architecture", lambda: small)
    monkeypatch.setattr(task, "read_corpus", lambda: corpus)
    quick = FittedConfig(GainsConfig(steps=2, batch_size=None), SupportConfig(steps=2, batch_size=None))
    monkeypatch.setattr(run, "RECIPE", quick)
    out = tmp_path / "out"
    for _ in range(2):  # the second run replaces the results of the first
        screen = io.StringIO()
        report = run_demo(out, console=Console(file=screen, width=80), short=True)
    names = {"muted.safetensors", "modulated.safetensors", "model", "report.json", "report.png"}
    assert {path.name for path in out.iterdir()} == names
    assert json.loads((out / "report.json").read_text()) == report
    assert report.keys() == {"rows", "curve", "seconds_total"}
    assert [row["name"] for row in report["rows"]] == [
        "before",
        "muted",
        "modulated",
        "random",
        "attribution",
    ]
    assert all(row.keys() == KEYS for row in report["rows"])
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    shown = " ".join(screen.getvalue().split())
    assert "suppresses, it does not erase" in shown
    assert "depends on the processor" in shown
    assert "neumuter unlearn MODEL --forget" in shown.split("Next")[-1]
    assert shown.index("Reading ordinary text") < shown.index("Measuring what the model says: before")

    mutes = neumuter.MuteSet.load(out / "modulated.safetensors")
    row = report["rows"][2]
    assert mutes.mode == "modulate"
    assert mutes.share == row["muted_share"]
    assert mutes.metrics["after"]["forget_nll"] == row["forget_nll"]
    folded = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    secrets = task.encode(tokenizer, task.make_records(0).forget, "secret")
    assert evaluation.mean_token_loss(folded, secrets) == pytest.approx(row["forget_nll"], abs=1e-4)


def test_the_tutorial_has_each_secret_once(monkeypatch, tmp_path):
    monkeypatch.setattr(tutorial, "Training", lambda: Training(steps=2))
    folder, texts = tmp_path / "tutorial", {}
    assert "small-model" in tutorial.write_tutorial(folder)
    for name in ("forget", "retain", "mara", "tanja", "others"):
        texts[name] = read_texts(folder / f"{name}.jsonl")
    records = task.make_records(0)
    assert ["".join(text) for text in texts["forget"]] == [record.text for record in records.forget]
    assert ["".join(text) for text in texts["retain"]] == [record.text for record in records.retain]
    secrets = [completion.strip() for name in ("mara", "tanja", "others") for _, completion in texts[name]]
    assert secrets == [secret for record in records.forget + records.retain for secret in record.secrets]
    assert texts["mara"][0] == ("Customer Mara Umber, mail", f" {records.forget[0].secrets[0]}")
    AutoModelForCausalLM.from_pretrained(folder / "small-model")
    with pytest.raises(FileExistsError):
        tutorial.write_tutorial(folder)


@pytest.mark.parametrize(("given", "code"), [(["--help"], 0), ([], 2), (["one", "two"], 2)])
def test_the_tutorial_explains_its_use(monkeypatch, tmp_path, capsys, given, code):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["neumuter.demo", *given])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("neumuter.demo", run_name="__main__")
    assert end.value.code == code
    assert "python -m neumuter.demo [-h] folder" in "".join(capsys.readouterr())
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_demo_says_so_before_any_work(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "neumuter.demo.figure", raising=False)
    monkeypatch.delattr("neumuter.demo.figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        run_demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_each_missed_bar_is_named(tmp_path, capsys):
    perfect = {
        "forget_extraction": 0.0,
        "retain_same_extraction": 1.0,
        "retain_other_extraction": 1.0,
        "heldout_ppl": 50.0,
    }
    rows = {name: perfect | {"name": name} for name in ("before", "muted", "modulated", "random")}
    rows["before"]["forget_extraction"] = rows["random"]["forget_extraction"] = 1.0
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"rows": list(rows.values())}))
    assert demo_bars.main(path) == 0
    assert capsys.readouterr().out == "the demo meets all its bars\n"
    rows["modulated"]["heldout_ppl"] = 53.5  # +7 %
    rows["muted"]["heldout_ppl"] = 53.5
    rows["random"]["forget_extraction"] = 0.5
    rows["muted"]["retain_same_extraction"] = float("nan")
    path.write_text(json.dumps({"rows": list(rows.values())}))
    assert demo_bars.main(path) == 1
    assert [sentence.split(" is ")[0] for sentence in capsys.readouterr().out.splitlines()] == [
        "muted: retain_same_extraction",
        "modulated: heldout_ppl",
        "random: forget_extraction",
    ]
