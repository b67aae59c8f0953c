"""More texts than are looked at one by one: a sample, its numbers, and a search that has them all."""

import collections
import json

import pytest
import torch

import neumuter
from neumuter.evaluation import continuations, controls, examination
from neumuter.recipes import FittedConfig, GainsConfig
from neumuter.texts import corpus, encode_forms, read_texts
from neumuter.texts.corpus import read_corpus
from neumuter.texts.files import TextFile
from neumuter.training.step import Step
from tests.models import build, tokenizer

TEXTS = [f"Client {number} lives at {number * 37 % 91} Mill Road" for number in range(12)]
KEPT = [f"Item {number} costs {number * 53 % 97} in the shop" for number in range(9)]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(corpus, "SAMPLED", 5)
    monkeypatch.setattr(controls, "MADE_UP", 2)
    for module in (continuations, examination):
        monkeypatch.setattr(module, "MAX_TOKENS", 4)


def read(texts, seed=0, max_length=64):
    return read_corpus("forget", texts, tokenizer(), max_length, None, seed)


def test_few_texts_are_all_in_the_sample():
    found = read(iter(TEXTS))
    assert found.sample == TEXTS
    form, expected = found.forms[0], encode_forms(TEXTS, tokenizer(), 64)[0]
    assert all(torch.equal(form[key], expected[key]) for key in expected)
    assert len(found.windows) == len(TEXTS)


def test_of_many_texts_there_is_a_random_sample_with_their_numbers(few, caplog):
    seen = collections.Counter()
    for seed in range(200):
        found = read(iter(TEXTS), seed, max_length=16)
        numbers = list(dict.fromkeys(found.forms[0]["texts"].tolist()))
        assert found.sample == [TEXTS[number] for number in numbers]
        assert numbers == sorted(set(numbers))
        assert len(numbers) == 5
        # Each takes more than one window, and the store has those of all.
        assert len(found.windows) > 2 * len(TEXTS)
        seen.update(numbers)
    # 83 of 200 are expected of each, with a standard deviation of 7.
    assert len(seen) == 12
    assert all(50 < count < 120 for count in seen.values())
    assert read(TEXTS, 3).sample == read(TEXTS, 3).sample
    assert "forget has 12 texts: 5 of them, drawn at random, are looked at one by one" in caplog.text


def test_a_search_has_all_texts_and_a_report_its_sample(few, tmp_path, monkeypatch, caplog):
    for name, texts in (("forget", TEXTS), ("retain", KEPT)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    taken = []
    once = Step.once
    monkeypatch.setattr(Step, "once", lambda self, ids: taken.extend(ids) or once(self, ids))
    outcomes = [
        neumuter.unlearn(
            build("llama"), tokenizer(), forget, retain, budget=20, samples=2, start_layer=0, max_length=64,
            recipe=FittedConfig(GainsConfig(steps=6, batch_size=4)), callback=lambda *_: None,
        )
        for forget, retain in ((tmp_path / "forget.jsonl", tmp_path / "retain.jsonl"), (TEXTS, KEPT))
    ]  # fmt: skip
    assert {i for i in taken if i < len(TEXTS)} == set(range(len(TEXTS)))
    # The retain texts, and one or two that the model said itself.
    assert len({i for i in taken if i >= len(TEXTS)}) > len(KEPT)
    first, second = outcomes
    assert first.history == second.history
    assert first.texts == second.texts
    numbers = [row["number"] for row in first.texts]
    assert numbers == [number + 1 for number in dict.fromkeys(read(TEXTS).forms[0]["texts"].tolist())]
    assert numbers != [1, 2, 3, 4, 5]
    assert len(first.samples) == 4


def test_a_batch_is_taken_as_it_is(few):
    batch = encode_forms(TEXTS, tokenizer(), 64)[0]
    found = read_corpus("forget", batch, None, 64, None, 0)
    assert found.windows.keys() == {"input_ids", "attention_mask", "labels"}
    assert len(found.forms[0]["labels"]) == 12


def test_errors_have_the_name_once(few):
    with pytest.raises(ValueError, match=r"^forget: text 2 has no token"):
        read(["Tea at four", ""])
    with pytest.raises(TypeError, match=r"^forget\[1\] must be a text"):
        read(["Tea at four", 5])
    with pytest.raises(ValueError, match=r"^forget holds no text"):
        read([])
    with pytest.raises(ValueError, match="tokenizer must be given"):
        read_corpus("forget", TEXTS, None, 64, None, 0)


def test_files_are_read_one_text_after_the_other(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a b"}\n{"text": "c d"}\n{"text": 5}\n')
    texts = TextFile(path)
    for _ in range(2):
        rows = iter(texts)
        assert [next(rows), next(rows)] == ["a b", "c d"]
        with pytest.raises(ValueError, match="line 3: column 'text' must hold a text"):
            next(rows)
    assert read_texts(path, limit=2) == list(TextFile(path, limit=2)) == ["a b", "c d"]
