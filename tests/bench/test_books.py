"""BOOKS in its short form, and what its passages and questions are."""

import pytest
import torch

from bench.unlearning import books, page
from neumuter.demo.model import Training
from neumuter.recipes import schedule
from neumuter.types import IGNORED
from tests.bench.quick import quick_rows
from tests.models import tokenizer


@pytest.fixture
def small(tiny, monkeypatch):
    monkeypatch.setattr(books.Small, "sizes", (4, 8))
    monkeypatch.setattr(books.Small, "training", Training(steps=1))
    monkeypatch.setattr(books.Small, "windows", 2)
    monkeypatch.setattr(books.Small, "requests", 2)
    monkeypatch.setattr(schedule, "LEAST_STEPS", 2)
    # The tokens of this model are short, so that few sentences fit into a passage.
    monkeypatch.setattr(books, "ASKED_WORDS", 3)
    monkeypatch.setattr(books, "ANSWER", 1)


def test_books_run(small):
    found = quick_rows(books.cases(quick=True))
    by_size, by_request = ([row for row in found if key in row] for key in ("passages", "requests"))
    methods = ["before", "retrained", *["neumuter, modulate"] * 2, "npo"]
    assert [row["method"] for row in by_size] == methods
    assert [row["requests"] for row in by_request] == [1, 2] * 2
    # With slopes the second request fits the neurons of the first one as well.
    assert by_request[0]["share"] == pytest.approx(0.5)
    assert by_request[1]["share"] == pytest.approx(1.0)
    assert all(0 <= row[name] <= 1 for row in found for name in ("verbatim", "knowledge", "retain_verbatim"))
    assert "after 2" in page.book_requests(found, "gated, 0.9 M").splitlines()[3]
    assert page.books(found, "gated, 0.9 M").startswith("### gated, 0.9 M, 4 passages")
    assert page.books(found, "another") is page.book_requests(found, "another") is None


def test_chapters_repeat_nothing():
    chapters = books.read_chapters()
    assert len(chapters) > 20
    sentences = [
        sentence
        for chapter in chapters
        for sentence in dict.fromkeys(books.SEPARATED.split(chapter))
        if len(sentence.split()) >= books.LEAST_WORDS
    ]
    assert len(set(sentences)) == len(sentences)


def test_no_chapter_has_passages_in_two_parts():
    words = tokenizer()
    ids = [words(text, add_special_tokens=False)["input_ids"] for text in books.read_chapters()]
    owner = {
        tuple(one[i : i + books.PASSAGE]): number
        for number, one in enumerate(ids)
        for i in range(0, len(one), books.PASSAGE)
    }
    book = books.Book(words, 3, 20)
    parts = [book.forget, book.retain, book.unseen]
    assert [part.shape for part in parts] == [(20, books.PASSAGE)] * 3
    owners = [{owner[tuple(passage)] for passage in part.tolist()} for part in parts]
    assert min(map(len, owners)) > 1
    assert len(set.union(*owners)) == sum(map(len, owners))
    assert not torch.equal(books.Book(words, 4, 20).forget, book.forget)
    with pytest.raises(ValueError, match="the book has too few passages"):
        books.Book(words, 3, 10**6)


def test_sentences_are_asked_for_by_their_beginnings():
    words = tokenizer()
    text = "Before it. One two three four five six seven eight nine ten. Short one. And behind it."
    batch = books.ask_sentences(words([text], return_tensors="pt")["input_ids"], words)
    (row,) = batch["input_ids"]
    asked = batch["labels"][0] != IGNORED
    assert words.decode(row[asked]).strip() == "eight nine ten."
    assert words.decode(row[~asked]).strip().endswith("One two three four five six seven")
