"""What the experiments share: people, methods, and how cases are run and checked."""

import functools
import json
import threading
from types import SimpleNamespace

import pytest
import torch

from bench import rows as results
from bench.unlearning import __main__ as experiments
from bench.unlearning import memory, paper, people, synth
from bench.unlearning.methods import MASKS, WEIGHTS, run
from neumuter import recipes
from neumuter.demo import task
from neumuter.evaluation import tofu
from neumuter.models.families import find_ffns
from tests import models
from tests.bench.quick import quick_rows


def test_people_are_the_same_for_a_seed_and_no_answer_gives_another_away(tmp_path):
    made = people.questions(3, 16)
    assert made == people.questions(3, 16)
    assert made != people.questions(4, 16)
    rows = [row for rows in made for row in rows]
    assert len({row["question"] for row in rows}) == len(rows) == 16 * len(people.FACTS)
    for row in rows:
        assert row["paraphrased_answer"] not in row["perturbed_answer"]
        assert len(set(row["perturbed_answer"])) == people.WRONG
    path = tmp_path / "people.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert len(tofu.read_questions(path)) == len(rows)


def test_no_two_of_many_people_have_the_same_name():
    made = people.questions(3, 1024)
    assert len({rows[0]["question"] for rows in made}) == len(made)
    with pytest.raises(ValueError, match="people"):
        people.questions(0, 1025)


@pytest.mark.parametrize("method", [*MASKS, *WEIGHTS])
def test_every_method_gives_a_row_and_leaves_the_model_alone(job, method):
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    row = run(job, method)
    assert row["method"] == method
    assert row["seconds"] > 0
    assert row["loss"] != pytest.approx(job.measure(job.model)["loss"], abs=1e-9) or method == "paper"
    for name, value in job.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert [ffn.module.forward.__name__ for ffn in find_ffns(job.model)] == ["forward"] * 3


def test_an_unknown_method_is_named(job):
    with pytest.raises(ValueError, match="'erase'"):
        run(job, "erase")


def test_peak_memory_sees_what_was_freed_again(monkeypatch):
    looked, resident = threading.Event(), memory._resident

    def look():
        looked.set()
        return resident()

    monkeypatch.setattr(memory, "_resident", look)
    with memory.PeakMemory() as peak:
        held = torch.ones(64 << 20, dtype=torch.uint8)
        for _ in range(2 * memory.STATM.exists() * (not torch.cuda.is_available())):
            looked.clear()  # the second look begins after the first was seen
            looked.wait()
        del held
    assert peak.mib is None or 60 < peak.mib < 80


def test_bars_name_what_is_missed():
    row = {"method": "before", "forget_extraction": 1.0, "heldout_perplexity": 50.0, "retain_extraction": 1.0}
    good = row | {"method": "neumuter, trained support", "forget_extraction": 0.0}
    bad = good | {"retain_extraction": 0.2, "heldout_perplexity": 60.0}
    random = row | {"method": "random"}
    default = good | {"method": "neumuter, modulate"}
    assert synth.missed([row, good, default, random]) == []
    assert len(synth.missed([row, bad, default, random])) == 2
    assert len(synth.missed([row, good, default | {"retain_extraction": 0.7}, random])) == 1
    known = good | {"forget_extraction": 0.9}
    assert len(synth.missed([row, known, default, random | {"forget_extraction": 0.1}])) == 2


@pytest.mark.parametrize("family", ["gpt_neo", "phi"])
def test_the_papers_table_runs_on_models_of_its_shapes(tmp_path, family, monkeypatch):
    pytest.importorskip("rouge_score")
    models.build(family).save_pretrained(tmp_path / "model")
    models.tokenizer().save_pretrained(tmp_path / "model")
    made = [row for rows in people.questions(0, 4) for row in rows]
    data = tmp_path / "data"
    data.mkdir()
    if family == "gpt_neo":
        lines = ["doc_id,corpus,text", *(f'{n},none,"{row["answer"]}"' for n, row in enumerate(made[:4]))]
        (data / "lm_extraction_32_0.csv").write_text("\n".join(lines))
    else:
        for kind, name in paper.TOFU_FILES.items():
            rows = made[2:4] if kind == "texts to keep" else made[:2]
            (data / name).write_text("\n".join(map(json.dumps, rows)))
    options = SimpleNamespace(
        model=str(tmp_path / "model"), data=data, retrained=None, tasks=None, rewrite_with=None
    )
    if family == "phi":
        options.retrained = options.model
    monkeypatch.setattr(paper, "GATES", recipes.PaperConfig(epochs=2, batch_size=None))
    monkeypatch.setattr(paper, "GAINS", recipes.GainsConfig(steps=3, batch_size=2))
    monkeypatch.setattr(tofu, "MAX_NEW_TOKENS", 8)
    monkeypatch.setattr(paper, "read_corpus", functools.partial(task.read_corpus, 30_000))
    found = quick_rows(paper.cases(options))
    assert [row["method"] for row in found] == list(paper.RECIPES)
    assert found[2]["share"] > 0
    assert all(row["heldout_perplexity"] > 1 for row in found)
    if family == "phi":
        assert found[0]["tofu_forget_quality"] == 1.0
        assert 0 <= found[0]["tofu_model_utility"] < 1
    else:
        assert "forget_el" in found[0]
    (data / "lm_extraction_32_0.csv").unlink(missing_ok=True)
    (data / "forget10.json").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="neither TDEC nor TOFU"):
        list(paper.cases(options))


def test_a_stopped_run_goes_on(tmp_path):
    path, ran = tmp_path / "rows.jsonl", []

    def cases(names):
        for name in names:
            yield {"method": name}, lambda name=name: ran.append(name) or {"value": 1.0}

    assert len(list(experiments.run(cases("ab"), path))) == 2
    assert [row["method"] for row in experiments.run(cases("abc"), path)] == ["c"]
    assert ran == ["a", "b", "c"]
    known = results.read(path)
    assert len(known) == 3
    known[0]["machine"]["cpu"] = "another"
    results.write(path, known)
    with pytest.raises(ValueError, match="measured with other cpu"):
        list(experiments.run(cases("ab"), path))


def test_a_fresh_run_starts_over_and_its_bars_are_checked(tmp_path, monkeypatch, capsys):
    def start(*options):
        monkeypatch.setattr("sys.argv", ["", "synth", "--quick", "--out", str(tmp_path), *options])
        return experiments.main()

    rows = {m: {"forget_extraction": 1.0, "heldout_perplexity": 50.0, "retain_extraction": 1.0}
            for m in ("before", "random", *synth.OURS)}  # fmt: skip
    monkeypatch.setattr(
        synth, "cases", lambda quick: (({"method": m}, lambda r=r: r) for m, r in rows.items())
    )
    assert start("--check") == 1
    assert "trained support: extraction is 1, must be at most 0.5" in capsys.readouterr().out
    for method in synth.OURS:
        rows[method] = rows[method] | {"forget_extraction": 0.0}
    assert start("--check") == 1  # as before
    assert start("--fresh", "--check") == 0
    assert "SYNTH meets all its bars" in capsys.readouterr().out
    assert len(results.read(tmp_path / "synth.jsonl")) == len(rows)
