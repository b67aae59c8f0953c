"""More texts than are looked at one by one: a sample, its numbers, and a search that has them all."""

import contextlib
import csv
import dataclasses
import json
import tracemalloc
from collections import Counter

import pytest
import torch

import neumuter
from neumuter.cli.app import main
from neumuter.evaluation import continuations, controls, examination, find_others, list_given
from neumuter.recipes import FittedConfig, GainsConfig
from neumuter.texts import corpus, encode, encode_forms, read_texts
from neumuter.texts.corpus import read_corpus
from neumuter.texts.duplicates import find_same, hash_text
from neumuter.texts.files import TextFile
from neumuter.training.step import Step
from tests.models import build, tokenizer
from tests.neumuter.jobs import shorter
from tests.neumuter.test_chat import CHAT, PAIRS, words_with

TEXTS = [f"Client {number} lives at {number * 37 % 91} Mill Road" for number in range(12)]
KEPT = [f"Item {number} costs {number * 53 % 97} in the shop" for number in range(9)]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(corpus, "SAMPLED", 5)
    monkeypatch.setattr(controls, "MADE_UP", 2)
    for module in (continuations, examination):
        monkeypatch.setattr(module, "MAX_TOKENS", 4)


def read(texts, seed=0, max_length=64):
    return read_corpus("forget", texts, tokenizer(), max_length, None, seed, keeps_texts=True)


def find_numbers(corpus):
    """The numbers of the texts in the sample."""
    return list(dict.fromkeys(corpus.forms[0]["texts"].tolist()))


def unlearn(forget, retain, **more):
    options = {"budget": 20, "samples": 2, "start_layer": 0, "max_length": 64, "callback": lambda *_: None}
    recipe = FittedConfig(GainsConfig(steps=6, batch_size=4))
    return neumuter.unlearn(build("llama"), tokenizer(), forget, retain, recipe=recipe, **options | more)


def test_few_texts_are_all_in_the_sample():
    found = read(iter(TEXTS))
    assert found.texts == TEXTS
    assert found.total == 12
    assert found.all_seen
    assert found.forms[0]["windows"].tolist() == [1] * 12
    assert read_corpus("forget", TEXTS, tokenizer(), 64, None, 0).texts == []
    form, expected = found.forms[0], encode_forms(TEXTS, tokenizer(), 64)[0]
    assert all(torch.equal(form[key], expected[key]) for key in expected)
    assert len(found.windows) == len(TEXTS)


def test_of_many_texts_there_is_a_random_sample_with_their_numbers(few, caplog):
    seen = Counter()
    for seed in range(200):
        found = read(iter(TEXTS), seed)
        numbers = find_numbers(found)
        assert found.texts == [TEXTS[number] for number in numbers]
        assert numbers == sorted(set(numbers))
        assert len(numbers) == 5
        assert len(found.windows) == found.total == 12
        seen.update(numbers)
    # 83 of 200 are expected of each, with a standard deviation of 7.
    assert len(seen) == 12
    assert all(50 < count < 120 for count in seen.values())
    assert read(TEXTS, 3).texts == read(TEXTS, 3).texts
    assert "forget: 5 of 12 texts, drawn at random, are looked at one by one" in caplog.text


def test_of_long_texts_there_is_a_sample_of_windows(few, caplog):
    (every,) = encode_forms(TEXTS, tokenizer(), 16)
    rows, counts = list(zip(every["texts"].tolist(), every["input_ids"].tolist(), strict=True)), Counter()
    for number, _ in rows:
        counts[number] += 1
    assert len(rows) > 2 * len(TEXTS)
    seen = Counter()
    for seed in range(300):
        found = read(iter(TEXTS), seed, max_length=16)
        (form,) = found.forms
        drawn = list(zip(form["texts"].tolist(), form["input_ids"].tolist(), strict=True))
        # They are five windows, each once, in order, and the whole store has all of them.
        places = [rows.index((number, ids + [0] * (16 - len(ids)))) for number, ids in drawn]
        assert places == sorted(set(places))
        assert len(places) == 5
        assert not found.all_seen
        assert (len(found.windows), found.total) == (len(rows), 12)
        assert form["windows"].tolist() == [counts[number] for number, _ in drawn]
        assert found.texts == [TEXTS[number] for number in find_numbers(found)]
        seen.update(places)
    share = 5 / len(rows)
    spread = (300 * share * (1 - share)) ** 0.5
    assert all(abs(seen[place] - 300 * share) < 4.5 * spread for place in range(len(rows)))
    texts = len(find_numbers(found))
    assert f"forget: 5 of {len(rows)} windows, from {texts} of 12 texts, drawn at random" in caplog.text


def test_little_of_a_window_is_in_memory():
    """A few texts of very many windows took 20 KB for each of them."""
    words, peaks = tokenizer(), []
    for count in (200, 2000):
        text = " ".join(f"Client {n} lives at {n * 37 % 91} Mill Road." for n in range(count))
        tracemalloc.start()
        found = read_corpus("forget", [text] * 4, words, 24, None, 0)
        peaks.append((len(found.windows), tracemalloc.get_traced_memory()[0]))
        assert len(found.forms[0]["labels"]) == 1024
        tracemalloc.stop()
    (few, before), (many, after) = peaks
    # 16 bytes, and what lists keep in reserve.
    assert (after - before) / (many - few) < 40


def test_forms_have_the_same_stretches_of_the_same_texts(monkeypatch):
    words = words_with()
    long = [*CHAT[:-1], {"role": "assistant", "content": "The kettle is on the shelf. " * 12}]
    texts = [*PAIRS, long, "A lantern costs 12.40 in the shop. " * 6, CHAT]
    every = encode_forms(texts, words, 24)
    monkeypatch.setattr(corpus, "SAMPLED", 1000)
    for found, expected in zip(read_corpus("forget", texts, words, 24, None, 0).forms, every, strict=True):
        assert found["windows"].tolist() == [(expected["texts"] == i).sum() for i in expected["texts"]]
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    monkeypatch.setattr(corpus, "SAMPLED", 4)
    for seed in range(40):
        first, second = read_corpus("forget", texts, words, 24, None, seed).forms
        assert first["texts"].unique().tolist() == second["texts"].unique().tolist()
        assert len(first["labels"]) == 4
        assert len(second["labels"]) <= 8
        # A text that is a string is the same in both.
        plain = [
            form["input_ids"][form["texts"] == len(PAIRS) + 1][
                form["attention_mask"][form["texts"] == len(PAIRS) + 1] == 1
            ]
            for form in (first, second)
        ]
        assert torch.equal(*plain)


def test_what_a_template_refuses_has_its_own_number(few, caplog):
    words = words_with()
    words.chat_template = (
        "{% if messages[0]['content'] == 'no' %}{{ raise_exception('no') }}{% endif %}"
        + str(words.chat_template)
    )
    texts = ["Tea at four"] * 3 + [("no", "Tea at four")]
    with pytest.raises(ValueError, match=r"^forget: text 4: the chat template refuses"):
        read_corpus("forget", texts, words, 64, None, 0)
    read_corpus("forget", texts, words, 64, False, 0)
    assert (
        "forget: 1 of the texts cannot go through the chat template, so they are measured without it: text 4"
        in caplog.text
    )


def test_a_search_has_all_texts_and_a_report_its_sample(few, tmp_path, monkeypatch, caplog):
    for name, texts in (("forget", TEXTS), ("retain", KEPT)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    taken = []
    once = Step.once
    monkeypatch.setattr(Step, "once", lambda self, ids: taken.extend(ids) or once(self, ids))
    outcomes = [
        unlearn(forget, retain)
        for forget, retain in ((tmp_path / "forget.jsonl", tmp_path / "retain.jsonl"), (TEXTS, KEPT))
    ]
    assert {i for i in taken if i < len(TEXTS)} == set(range(len(TEXTS)))
    # The retain texts, and one or two that the model said itself.
    assert len({i for i in taken if i >= len(TEXTS)}) > len(KEPT)
    first, second = outcomes
    assert first.history == second.history
    assert first.texts == second.texts
    numbers = [row["number"] for row in first.texts]
    assert numbers == [number + 1 for number in find_numbers(read(TEXTS))]
    assert numbers != [1, 2, 3, 4, 5]
    assert len(first.samples) == 4
    said = "Measured on 5 of 12 texts to forget, drawn at random."
    assert said in repr(first)
    assert said in first._repr_html_()
    first.save(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["texts_measured"], report["texts_given"], report["measured_on"]) == (5, 12, said)
    assert f"<p>{said}</p>" in (tmp_path / "out" / "report.html").read_text()


def test_where_all_texts_are_measured_nobody_is_told(tmp_path):
    with shorter():
        outcome = unlearn(TEXTS[:2], KEPT[:2])
    assert outcome.measured_on is None
    assert "drawn at random" not in repr(outcome)
    outcome.save(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["texts_measured"], report["texts_given"], report["measured_on"]) == (2, 2, None)
    assert "drawn at random" not in (tmp_path / "report.html").read_text()


def test_the_command_says_before_the_verdict_what_was_measured(few, tmp_path, capsys):
    build("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for name, texts in (("forget", TEXTS), ("retain", KEPT)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts))
    arguments = ["unlearn", tmp_path / "model", "--forget", tmp_path / "forget.txt", "--retain"]
    arguments += [tmp_path / "retain.txt", "--out", tmp_path / "out", "--start-layer", 0, "--steps", 2]
    with contextlib.suppress(SystemExit):
        main([str(argument) for argument in arguments])
    assert capsys.readouterr().out.splitlines()[-2].startswith("Measured on 5 of 12 texts to forget")


def test_long_texts_are_judged_by_the_windows_of_the_sample(few, tmp_path):
    long = [f"{text}. " * 4 for text in TEXTS]
    outcome = unlearn(long, KEPT)
    assert len(outcome.texts) <= 5
    assert sum(row["windows_measured"] for row in outcome.texts) == 5
    for row in outcome.texts:
        windows = len(encode([long[row["number"] - 1]], tokenizer(), 64)["labels"])
        assert row["windows"] == windows > row["windows_measured"]
    seen = len(outcome.texts)
    assert outcome.measured_on.startswith(
        f"Measured on 5 of {outcome.windows_given} windows, from {seen} of 12"
    )
    outcome.save(tmp_path)
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert [row["windows"] for row in rows] == [str(row["windows"]) for row in outcome.texts]
    page = (tmp_path / "report.html").read_text()
    assert "windows measured" in page
    assert f"<td>{outcome.texts[0]['windows_measured']} of {outcome.texts[0]['windows']}</td>" in page


def test_texts_of_more_windows_are_not_calibrated(few, caplog):
    pairs = [("Client lives at", f" {number * 37 % 91} Mill Road" * 3) for number in range(3)]
    with pytest.raises(ValueError, match=r"at most 5 windows of texts, not \d+"):
        unlearn(pairs, KEPT, max_length=24, calibrate=True)
    outcome = unlearn(pairs, KEPT, max_length=24)
    assert "calibrated" not in outcome.mutes.method
    assert "not estimated for more than 5 windows of texts" in caplog.text
    caplog.clear()
    # Text stands before what counts in a window from the middle, but it is no prompt.
    unlearn([f"{text}. " * 4 for text in TEXTS], KEPT)
    assert "not estimated" not in caplog.text


def test_a_window_that_is_drawn_alone_is_no_whole_completion(few):
    """It can be a full stop, which every answer has."""
    found = read([f"{text}. " * 4 for text in TEXTS])
    given = list_given({"forget": found.forms[0]}, tokenizer())
    asked = given[0]
    other = next(text for text in given if text.label != asked.label)
    assert sum(text.label == other.label for text in given) == 1
    piece = [0] * 4
    part = dataclasses.replace(other, pieces=[piece])
    assert find_others([asked], [[*piece, 5]], [asked, part], None) == [None]
    whole = dataclasses.replace(part, windows=1)
    assert find_others([asked], [[*piece, 5]], [asked, whole], None)[0].label == other.label


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


@pytest.mark.parametrize("seed", range(3))
def test_a_text_to_forget_and_to_keep_is_found_outside_of_the_samples(few, seed):
    """Spaces and columns do not hide it."""
    kept = [*KEPT, *(f" {text}\n" for text in TEXTS[6:9])]
    message = (
        r"^3 of 12 texts to forget are .*; forget 8 and retain 11(: 'Client 7 .*)?; forget 9 and retain 12"
    )
    with pytest.raises(ValueError, match=message):
        unlearn(TEXTS, kept, seed=seed)
    pairs = [(text[:9], text[9:]) for text in TEXTS]
    with pytest.raises(ValueError, match=message):
        unlearn(pairs, iter(kept), seed=seed)
    with pytest.raises(ValueError, match="controls 2 is forget 12: 'Client 11"):
        unlearn(TEXTS, KEPT, controls=["Nobody knows", TEXTS[11]], seed=seed)
    with pytest.raises(ValueError, match="controls 1 is retain 9: 'Item 8"):
        unlearn(TEXTS, KEPT, controls=KEPT[8:], seed=seed)


def test_equal_texts_have_equal_hashes():
    texts = [
        "a b",
        " a\n b ",
        ("a ", "b"),
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    ]
    assert len({hash_text(text) for text in texts}) == 1
    hashes = torch.tensor([hash_text(text) for text in ["a b", "ab", "b a", "c"]])
    others = torch.tensor([hash_text(text) for text in ["d", "c", "a  b", "c", "e"]])
    assert find_same(hashes, others) == [(0, 2), (3, 1)]
    assert find_same(hashes, others[:0]) == []
