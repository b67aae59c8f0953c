"""Prompts with made-up names that the model answers itself."""

import re

import pytest
import torch

from neumuter.evaluation import list_given, strangers
from neumuter.evaluation.examination import continue_prompts
from neumuter.evaluation.strangers import ask_about_strangers
from neumuter.texts import encode
from neumuter.types import IGNORED
from tests.models import build, tokenizer

TEXTS = [("Ada Brisk, mail", " ada77@post.example"), ("Jonas Vance, mail", " jv82@mail.example")]


@pytest.fixture(scope="module")
def words():
    return tokenizer()


def parts(words, batch):
    """(prompt, answer) of each row."""
    for ids, labels, shown in zip(
        *(batch[k].tolist() for k in ("input_ids", "labels", "attention_mask")), strict=True
    ):
        start = next(place for place, label in enumerate(labels) if label != IGNORED)
        ids = ids[: sum(shown)]
        assert labels[start : len(ids)] == ids[start:]
        yield words.decode(ids[:start]), words.decode(ids[start:])


def test_prompts_keep_their_wording_and_the_model_answers_them(words):
    forget, model = encode(TEXTS, words, 64), build("llama")
    given = list_given({"forget": forget}, words)
    made = ask_about_strangers(model, words, forget, given, 5, 64, seed=3)
    found = list(parts(words, made))
    assert len(found) == 5
    for number, (prompt, _) in enumerate(found):
        assert re.fullmatch(f"<s>[A-Z][a-z]{{{4 if number % 2 else 2}}} [A-Z][a-z]{{4}}, mail", prompt)
        assert not re.search("Ada|Brisk|Jonas|Vance", prompt)
    assert len({prompt for prompt, _ in found}) == 5
    asked = encode([(prompt[3:], "x") for prompt, _ in found], words, 64)
    assert [words.decode(ids) for ids in continue_prompts(model, words, asked, 19)] == [a for _, a in found]
    again = ask_about_strangers(model, words, forget, given, 5, 64, seed=3)
    assert all(torch.equal(made[key], again[key]) for key in made)


def test_an_answer_with_a_value_is_left_out_and_others_end_where_the_model_does(words, monkeypatch):
    said = [" I have no jv82@mail", " zz11@mail.example</s>", "</s>", " jv820@mail.example"]
    monkeypatch.setattr(
        strangers, "continue_prompts",
        lambda *_: [words(text, add_special_tokens=False)["input_ids"] for text in said],
    )  # fmt: skip
    forget = encode(TEXTS, words, 64)
    made = ask_about_strangers(build("llama"), words, forget, list_given({"forget": forget}, words), 4, 30)
    # A prompt and its answer have 30 tokens together at most.
    assert [answer for _, answer in parts(words, made)] == [" zz11@mail.e", "</s>", " jv820@mail."]


def test_nothing_is_left(words, monkeypatch):
    monkeypatch.setattr(strangers, "continue_prompts", lambda *_: [[], []])
    forget = encode(TEXTS, words, 64)
    assert (
        ask_about_strangers(build("llama"), words, forget, list_given({"forget": forget}, words), 2, 64)
        is None
    )
