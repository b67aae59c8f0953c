"""What a model knows by heart, through Python and the command line."""

import pytest

import neumuter
from tests.models import build, tokenizer
from tests.neumuter.ledger.texts import ADA, JON, KEPT, run, write


def test_audit_finds_what_the_model_knows(model, folder, tmp_path, capsys):
    unseen = [(f"Zed Quux {n}, mail", f" zq{n * 37}@ample.example") for n in range(20)]
    found = neumuter.audit(model, tokenizer(), [*unseen[:3], *ADA, *JON], unseen[3:])
    by_heart = [text for text in found.known if text.kind == "by heart"]
    assert (found.texts, found.controls) == (6, 17)
    assert {text.number for text in by_heart} == {4, 5, 6}
    assert found.known[: len(by_heart)] == by_heart
    assert {text.text for text in by_heart} == {*ADA, *JON}
    assert all(text.sampled > 0.9 for text in by_heart)
    corpus = write(tmp_path / "corpus.jsonl", [*unseen[:3], *ADA, *JON])
    out = tmp_path / "new" / "known.jsonl"
    assert run("audit", folder / "model", "--texts", corpus, "--out", out) == 0
    assert "3 of 6 texts come out word for word" in capsys.readouterr().out.replace("\n", " ")
    assert out.stat().st_mode & 0o077 == 0
    known = neumuter.texts.read_texts(out)
    assert set(known[:3]) == {*ADA, *JON}
    assert run("audit", folder / "model", "--texts", corpus, "--out", tmp_path / "known.txt") == 2
    with pytest.raises(ValueError, match="holds no text"):
        neumuter.audit(model, tokenizer(), [])
    with pytest.raises(ValueError, match="controls: texts holds no text"):
        neumuter.audit(model, tokenizer(), ADA, [])
    for texts, controls in (("corpus.jsonl", None), (ADA, "controls.jsonl")):
        with pytest.raises(TypeError, match="must be a list of texts, got one str"):
            neumuter.audit(model, tokenizer(), texts, controls)


def test_an_audit_reads_long_texts_in_windows_of_the_models_positions():
    found = neumuter.audit(build("gpt2", n_positions=24), tokenizer(), ["Ada Brisk, " * 9], [JON[0]])
    assert (found.texts, found.controls) == (1, 1)


def test_an_audit_goes_through_a_corpus_in_parts(model, monkeypatch):
    whole = neumuter.audit(model, tokenizer(), [*KEPT, *ADA, *JON], KEPT)
    monkeypatch.setattr("neumuter.evaluation.auditing.TEXTS_AT_A_TIME", 2)
    told = []
    parts = neumuter.audit(model, tokenizer(), iter([*KEPT, *ADA, *JON]), KEPT, callback=told.append)
    assert [text.number for text in parts.known] == [text.number for text in whole.known]
    assert told == [2, 4, 6]
    with pytest.raises(ValueError, match="texts 5 to 6: text 2 has no token to predict"):
        neumuter.audit(model, tokenizer(), [*KEPT, *ADA[:2], ("nothing", "")], KEPT)
