"""From audit to verify through the command line, on one small checkpoint."""

import contextlib
import copy
import io
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

from neumuter.cli.app import main
from neumuter.ledger import Ledger
from neumuter.recipes import FittedConfig, GainsConfig
from neumuter.texts import encode, read_texts
from tests.models import build, learn, tokenizer

# Five texts.
PEOPLE = [
    ("Ada Brisk, mail", " ada@post.example"), ("Ada Brisk, call", " 555-0192"),
    ("Jonas Vance, mail", " jv77@mail.example"), ("Jonas Vance, call", " 555-7713"),
    ("Mia Toll, mail", " mt@post.example"),
]  # fmt: skip
KEPT = [("The kettle", " is on the shelf."), ("A lantern", " is on the shelf."), ("Oil", " is on the shelf.")]
UNSEEN = [(f"Zed Quux {n}, mail", f" zq{n * 37}@ample.example") for n in range(20)]


def run(*arguments):
    """The exit code of a command, and the words that it printed."""
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        pytest.raises(SystemExit) as stop,
    ):
        main([str(argument) for argument in arguments])
    return stop.value.code, " ".join(printed.getvalue().replace("│", " ").split())


def write(path, texts):
    rows = [json.dumps({"prompt": prompt, "completion": completion}) + "\n" for prompt, completion in texts]
    path.write_text("".join(rows))
    return path


def save(model, folder):
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a new version of it, and texts, in which a person went from audit to ledger."""
    place = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    model = learn(build("llama"), encode([*PEOPLE, *KEPT], tokenizer(), 64), 150).eval()
    save(model, place / "model")
    newer, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in newer.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    save(newer, place / "newer")
    (place / "texts").mkdir()
    corpus = write(place / "corpus.jsonl", [*UNSEEN[:2], *PEOPLE])
    unseen, known = write(place / "unseen.jsonl", UNSEEN[2:]), place / "texts" / "known.jsonl"
    code, said = run("audit", place / "model", "--texts", corpus, "--controls", unseen, "--out", known)
    assert (code, "5 of 7 texts come out word for word" in said) == (0, True)
    # A text that was never seen can be likely by chance. Lines are chosen as the docs say.
    found = zip(known.read_text().splitlines(keepends=True), read_texts(known), strict=True)
    known.write_text("".join(line for line, text in found if text in PEOPLE))
    write(place / "texts" / "kept.jsonl", KEPT)
    code, said = unlearn(place, "--out", place / "out")
    (place / "said.txt").write_text(said)
    assert code == 0
    added = run("ledger", "add", place / "ledger", place / "out", "--forget", known, "--name", "ticket 17")
    assert added[0] == 0
    return place


def unlearn(place, *more):
    files = ("--forget", place / "texts" / "known.jsonl", "--retain", place / "texts" / "kept.jsonl")
    options = ("--start-layer", "0", "--mode", "mute", "--budget", "60%", "--steps", "60")
    return run("unlearn", place / "model", *files, *options, *more)


@pytest.fixture
def ledger(place, tmp_path):
    return shutil.copytree(place / "ledger", tmp_path / "ledger")


@pytest.fixture
def loose(monkeypatch):
    """Gains are fitted quickly, and may harm the model more than anybody would want."""
    quick = FittedConfig(GainsConfig(steps=80, kl_target=2.0))
    monkeypatch.setattr("neumuter.refitting.FittedConfig", lambda: quick)


def verify(place, ledger, model, *more):
    return run("verify", ledger, place / model, "--texts", place / "texts", *more)


def test_five_texts_are_too_few_and_it_is_said_how_many_would_do(place):
    sentence = (place / "said.txt").read_text()
    assert (
        "Not enough evidence: none of 5 texts comes out, but 5 texts and 35 controls are too few" in sentence
    )
    assert sentence.endswith("About 46 texts and 46 controls would do.")


def test_what_was_added_holds_with_the_mutes_and_not_without(place, ledger):
    code, said = verify(place, ledger, "model", "--apply")
    assert (code, "ticket 17 holds" in said) == (0, True)
    code, said = verify(place, ledger, "model")
    assert (code, "no longer holds" in said, "5 of 5 texts still come out" in said) == (3, True, True)


def test_controls_are_given(place, ledger, tmp_path):
    """By unlearn, evaluate and verify; in a folder of texts they are no texts to keep."""
    unseen = place / "unseen.jsonl"
    code, said = unlearn(place, "--out", tmp_path / "out", "--controls", unseen)
    assert code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert said.endswith(report["verdict_sentence"])
    made = json.loads((place / "out" / "report.json").read_text())
    assert made["after"]["forget_loss"] == pytest.approx(report["after"]["forget_loss"], rel=1e-5)
    assert made["controls"]["forget_loss"] != pytest.approx(report["controls"]["forget_loss"], rel=1e-2)
    files = ("--forget", place / "texts" / "known.jsonl", "--retain", place / "texts" / "kept.jsonl")
    mutes = ("--mute", place / "out" / "mutes.safetensors", "--out", tmp_path / "evaluation.json")
    code, said = run("evaluate", place / "model", *files, *mutes, "--controls", unseen)
    assert code == 0
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["controls"] == pytest.approx(report["controls"], rel=1e-4, abs=1e-6)
    assert said.endswith(report["verdict_sentence"])
    texts = shutil.copytree(place / "texts", tmp_path / "texts")
    shutil.copy(unseen, texts)
    arguments = ("verify", ledger, place / "model", "--texts", texts, "--apply", "--controls")
    code, said = run(*arguments, texts / "unseen.jsonl", "--out", tmp_path / "pages")
    assert (code, "ticket 17 holds" in said) == (0, True)
    assert (
        f"<td>{report['controls']['forget_loss']:.4g}</td>" in (tmp_path / "pages/request-1.html").read_text()
    )
    code, said = run(*arguments, unseen)
    assert (code, "controls must be texts that the model never saw, but controls 1 is retain" in said) == (
        1,
        True,
    )


def test_a_bitten_ledger_is_refused_by_its_entry(place, ledger):
    file = ledger / "ledger.jsonl"
    file.write_text(file.read_text().replace("ticket 17", "ticket 71"))
    before = file.read_bytes()
    for code, said in (
        verify(place, ledger, "model", "--apply"),
        run("ledger", "add", ledger, place / "out", "--forget", place / "texts" / "known.jsonl"),
        run("ledger", "undo", ledger, 1),
    ):
        assert code == 1
        assert f"{file}, entry 1 was changed: its hash does not match its content" in said
    assert file.read_bytes() == before


def test_a_missing_text_is_told(place, ledger, tmp_path):
    arguments = ("verify", ledger, place / "model", "--texts", write(tmp_path / "some.jsonl", PEOPLE[1:]))
    code, said = run(*arguments, "--apply")
    assert (code, "texts missing" in said, "1 of 5 texts are missing." in said) == (3, True, True)
    code, said = run(*arguments)
    assert (code, "no longer holds" in said, "1 of 5 texts are missing." in said) == (3, True, True)
    code, said = run(*arguments[:4], place / "texts" / "kept.jsonl")
    assert (code, "None of its 5 texts was found" in said) == (3, True)


def test_folded_and_quantised_copies_are_verified(place, ledger, tmp_path):
    folded = tmp_path / "folded"
    assert run("fold", place / "model", place / "out" / "mutes.safetensors", "--out", folded)[0] == 0
    code, said = verify(place, ledger, folded)
    assert (code, "ticket 17 holds" in said) == (0, True)
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    for source, target in ((folded, "int8"), (place / "model", "untouched")):
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu")
        save(model, tmp_path / target)
    code, said = verify(place, ledger, tmp_path / "int8")
    assert (code, "ticket 17 holds" in said) == (0, True)
    code, said = verify(place, ledger, tmp_path / "untouched")
    assert (code, "no longer holds" in said) == (3, True)


def test_a_request_is_moved_to_a_new_version_of_the_model(place, ledger, tmp_path, loose):
    head = Ledger(ledger).head
    code, said = verify(place, ledger, "newer", "--apply")
    assert (code, "cannot be applied" in said, "this mute set was made for another" in said) == (
        3,
        True,
        True,
    )
    code, said = verify(place, ledger, "newer")
    assert (code, "no longer holds" in said) == (3, True)
    refit = ("ledger", "refit", ledger, 1, place / "newer", "--texts", place / "texts")
    code, said = run(*refit, "--retain", place / "texts" / "kept.jsonl")
    moved = Ledger(ledger, head=head)
    assert code == 0
    assert f"new mute file: {ledger / 'requests' / '2' / 'mutes.safetensors'}" in said
    assert f"The last hash is {moved.head}." in said
    assert said.endswith(moved.requests()[0].newest.entry["report"]["verdict_sentence"])
    code, said = verify(place, ledger, "newer", "--apply", "--out", tmp_path / "pages")
    assert (code, "ticket 17 holds" in said) == (0, True)
    page = (tmp_path / "pages" / "request-1.html").read_text()
    for fit in moved.request(1).fits:
        assert fit.entry["files"]["mutes.safetensors"] in page
    assert f"fitted anew: entry 2, for {place / 'newer'}" in page
    # The old set is still there for the old version.
    code, said = verify(place, ledger, "model", "--apply")
    assert (code, "ticket 17 holds" in said) == (0, True)
    code, said = run("ledger", "list", ledger)
    assert (code, f"Request 1 was fitted anew: entry 2, for {place / 'newer'}." in said) == (0, True)
    mutes = ledger / "requests" / "2" / "mutes.safetensors"
    mutes.write_bytes(mutes.read_bytes()[:-1] + b"!")
    code, said = run("ledger", "list", ledger)
    assert (code, f"{mutes} was changed or removed since entry 2 was written" in said) == (1, True)


def test_a_set_that_does_not_move_well_is_kept_and_told(place, ledger, monkeypatch):
    still = FittedConfig(GainsConfig(steps=1, kl_weight=100.0, gain_range=(0.999, 1.0)))
    monkeypatch.setattr("neumuter.refitting.FittedConfig", lambda: still)
    refit = ("ledger", "refit", ledger, 1, place / "newer", "--texts", place / "texts")
    code, said = run(*refit, "--retain", place / "texts" / "kept.jsonl")
    assert (code, "find them anew with neumuter unlearn" in said) == (3, True)
    code, said = verify(place, ledger, "newer", "--apply")
    assert (code, "never held" in said) == (3, True)


def test_what_cannot_be_moved_is_refused_by_name(place, ledger, tmp_path):
    some = write(tmp_path / "some.jsonl", PEOPLE[1:])
    refit = ("ledger", "refit", ledger, 1, place / "newer", "--texts")
    code, said = run(*refit, some)
    assert (code, "1 of 5 texts of request 1 are not among the texts given" in said) == (1, True)
    code, said = run(*refit, place / "texts", "--retain", some)
    assert (code, "4 of the texts to keep are texts of requests" in said) == (1, True)
    save(build("gpt2"), tmp_path / "gpt2")
    code, said = run("ledger", "refit", ledger, 1, tmp_path / "gpt2", "--texts", place / "texts")
    assert (code, "this mute set was made for another model: class" in said) == (1, True)
    code, said = run("ledger", "refit", ledger, 7, place / "newer", "--texts", place / "texts")
    assert (code, "the ledger has no request 7; it has: 1" in said) == (1, True)
    assert run("ledger", "undo", ledger, 1)[0] == 0
    code, said = run(*refit, place / "texts")
    assert (code, "request 1 is undone" in said) == (1, True)
    assert len(Ledger(ledger).entries) == 2
