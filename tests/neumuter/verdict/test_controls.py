"""Controls: texts like those to forget, with other names and values."""

import pytest
import torch

from neumuter.evaluation import (
    examine,
    list_given,
    make_controls,
)
from neumuter.evaluation.controls import MADE_UP, TIMES
from neumuter.evaluation.made_up import rename
from neumuter.texts import encode, encode_forms
from neumuter.types import IGNORED
from tests import models
from tests.models import llama_2_tokenizer
from tests.neumuter.verdict.texts import MAIL, listed


def test_made_up_names_change_the_names_and_nothing_else(words):
    forms = [encode(MAIL, words, 64)]
    given = listed(words)
    (made,) = make_controls(forms, given, words, 64, seed=3)
    assert len(made["labels"]) == 33  # 11 of each of 3 texts
    texts = [
        words.decode(ids[shown.bool()][1:])
        for ids, shown in zip(made["input_ids"], made["attention_mask"], strict=True)
    ]
    assert len(set(texts)) == 33
    for text in texts:
        assert " of " in text
        assert not {"Ada", "Brisk", "Bo", "Calder", "Cy", "Dorn"} & set(text.replace(":", " ").split())
    ids, labels = made["input_ids"][0], made["labels"][0]
    assert words.decode(ids[labels != IGNORED]) == MAIL[0][1]
    assert all(torch.equal(made[key], make_controls(forms, given, words, 64, seed=3)[0][key]) for key in made)


def test_a_word_of_texts_to_keep_is_no_name(words):
    texts = [(f"Mail of Ada{letter} Brisk:", " a@b") for letter in "abcdefghijkl"]
    given = listed(words, forget=texts, retain=[("Mail of Eve Brisk:", " c@d")])
    (made,) = make_controls([encode(texts, words, 64)], given, words, 64)
    for ids in made["input_ids"]:
        assert words.decode(ids[1:]).startswith("Mail of ")
        assert "Brisk: a@b" in words.decode(ids)
        assert "Ada" not in words.decode(ids)


def test_names_of_a_whole_text_do_not_count(words):
    text = "Ada Brisk has room 17 since May."
    given = listed(words, forget=[text])
    (made,) = make_controls([encode([text], words, 64)], given, words, 64)
    ids, labels = made["input_ids"][0], made["labels"][0]
    assert words.decode(ids[labels != IGNORED]).replace("<s>", "") == "  has room  since ."


def test_a_long_text_leaves_room_for_controls_of_the_others(words):
    """Its windows would be all that the mails are compared with."""
    story = "".join(f"Line {n} of a long story. " for n in range(60))
    forms = encode_forms([story, *MAIL], words, 40)
    given = list_given({"forget": forms[0]}, words)
    made = make_controls(forms, given, words, 40)[0]
    written = [words.decode(ids, skip_special_tokens=True) for ids in made["input_ids"]]
    assert len(written) == MADE_UP
    for ending in ("post.example", "mail.example", "cy.example"):
        assert sum(text.strip().endswith(ending) for text in written) == 1


@pytest.mark.parametrize(
    ("texts", "controls"), [(1, MADE_UP), (20, 40), (MADE_UP, MADE_UP), (90, 90), (200, TIMES * MADE_UP)]
)
def test_the_more_texts_the_more_controls(words, texts, controls):
    forget = [(f"Mail of Ada{n}:", f" a{n}@post.example") for n in range(texts)]
    (made,) = make_controls([encode(forget, words, 64)], listed(words, forget=forget), words, 64)
    assert len(made["labels"]) == len(made["by_chance"]) == controls


def test_controls_are_the_same_texts_in_all_forms(words):
    """One text has a window more in one form; the worse form of each control counts."""
    texts = [*MAIL[:2], (MAIL[2][0], MAIL[2][1] + 12 * "x")]
    plain = encode_forms(texts, words, 48)[0]
    chat = encode_forms([("<u>" + prompt, completion) for prompt, completion in texts], words, 48)[0]
    assert (len(plain["labels"]), len(chat["labels"])) == (3, 4)
    given = list_given({"forget": plain}, words)
    made = make_controls([plain, chat], given, words, 48)
    assert [form["texts"].tolist() for form in made] == [list(range(33))] * 2
    # It is by chance if it is so in all forms.
    for form, place in zip(made, (0, 1), strict=True):
        form["by_chance"] = torch.ones(33, dtype=torch.bool)
        form["by_chance"][place] = False
    found = examine(models.build("llama"), words, made, given, "controls")
    assert len(found.loss) == 33
    assert found.by_chance == [False, False, *[True] * 31]


def test_other_words_that_take_more_tokens_leave_the_start_token(words):
    form = encode(MAIL[1:2], words, 64)
    ids, labels = form["input_ids"][0].tolist(), form["labels"][0].tolist()
    for limit in (len(ids), 64):
        made = rename(ids, labels, {"Bo": "Bartholomew"}, {}, words, limit)
        text = words.decode(made["input_ids"][0])
        whole = "<s>Mail of Bartholomew Calder: bo-c@mail.example"
        assert text == (whole if limit == 64 else "<s>" + whole[3 + 9 :])
        counted = made["labels"][0][made["labels"][0] != IGNORED]
        assert words.decode(counted) == MAIL[1][1]


def test_the_widest_row_may_become_longer():
    """A made-up name takes more tokens than a real one; without its start a prompt asks something else."""
    words, text = llama_2_tokenizer(), ("Who is Jo?\nmail", " 4000348")
    form = encode([text], words, 64)
    given = list_given({"forget": form}, words)
    (made,) = make_controls([form], given, words, 64)
    assert made["input_ids"].shape[1] > form["input_ids"].shape[1]
    assert all(words.decode(ids[1:]).split()[1:2] == ["is"] for ids in made["input_ids"])
    (cut,) = make_controls([form], given, words, 7)
    assert cut["input_ids"].shape[1] == 7


def test_a_whole_text_is_no_control_of_itself(words):
    """Its words are the same but for the names, so a model that knows it says the rest of the control."""
    text = "Ada Brisk has room seventeen since the month of May, and she keeps it."
    forms, given = encode_forms([text], words, 128), listed(words, forget=[text])
    (made,) = make_controls(forms, given, words, 64)
    assert not made["by_chance"].any()


def test_values_are_those_of_texts_that_are_worded_alike(words):
    texts = [(f"Town of Ada{n}?", f" Ada{n} lives in Ox{n}ford.") for n in range(12)]
    given = listed(words, forget=texts)
    (made,) = make_controls([encode(texts, words, 64)], given, words, 64)
    towns = {f"Ox{n}ford" for n in range(12)}
    for row, (ids, labels) in enumerate(zip(made["input_ids"], made["labels"], strict=True)):
        said, counted = words.decode(ids), words.decode(ids[labels != IGNORED])
        own = f"Ox{row // 3}ford"
        assert f"Ada{row // 3} " not in said
        assert sum(town in said for town in towns - {own}) == 1
        assert own not in said
        # A model that says it may tell a value to forget.
        assert not made["by_chance"][row]
        # The value counts; the name, which nobody can guess, does not.
        assert "lives in Ox" in counted
        assert "Ada" not in counted


def test_controls_with_values_of_texts_to_keep_come_out_by_chance_alone(words):
    texts = [(f"Town of Ada{n}?", f" Ada{n} lives in Ox{n}ford.") for n in range(12)]
    kept = [(f"Town of Bo{n}?", f" Bo{n} lives in Hull{n}ton.") for n in range(12)]
    given = listed(words, forget=texts, retain=[*kept, ("Town of Cy?", " Cy lives in Ox3ford.")])
    (made,) = make_controls([encode(texts, words, 64)], given, words, 64)
    said = [words.decode(ids) for ids in made["input_ids"]]
    assert [("Hull" in text) for text in said] == made["by_chance"].tolist()
    assert 0 < sum(made["by_chance"].tolist()) < len(said)
