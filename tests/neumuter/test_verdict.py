"""Whether texts are forgotten: whose text comes out instead, made-up names, and the last line."""

import random

import pytest
import torch

from neumuter.evaluation import (
    compare_texts,
    examine,
    extracted,
    find_others,
    find_overlap,
    judge,
    list_given,
    make_up_names,
    sampled_extraction,
)
from neumuter.evaluation.controls import _make_up
from neumuter.texts import encode, encode_forms
from neumuter.types import IGNORED
from tests import models

MAIL = [
    ("Mail of Ada Brisk:", " ada77@post.example"),
    ("Mail of Bo Calder:", " bo-c@mail.example"),
    ("Mail of Cy Dorn:", " dorn5@cy.example"),
]
KEPT = [("Mail of Eve Fenn:", " fenn@eve.example"), "The kettle is on the shelf of the kitchen."]


@pytest.fixture(scope="module")
def words():
    return models.tokenizer()


def listed(words, forget=MAIL, retain=KEPT):
    batches = {"forget": encode(forget, words, 64), "retain": encode(retain, words, 64)}
    return list_given(batches, words)


def others_in(words, said, **texts):
    given = listed(words, **texts)
    ids = words(said, add_special_tokens=False)["input_ids"]
    return find_others(given[:1], [ids], given, words)[0]


def test_given_texts_are_listed_by_batch_and_number(words):
    given = listed(words)
    assert [text.label for text in given] == ["forget 1", "forget 2", "forget 3", "retain 1", "retain 2"]
    assert given[0].prompt == "Mail of Ada Brisk:"
    assert given[0].tokens == len(" ada77@post.example")
    assert given[4].prompt == KEPT[1][: 43 // 3 - 1]  # of the start token and 42 characters, a third


@pytest.mark.parametrize(
    ("said", "label", "found"),
    [
        (" ada77@post.example", None, ""),  # its own
        (" fenn@eve.example, I think", "retain 1", "fenn@eve.example"),  # a whole completion
        (" it is dorn5@cy.ex", "forget 3", "dorn5@c"),  # a stretch of 8 tokens
        (" dorn5@", None, ""),  # a shorter one
        (" .example", None, ""),  # which its own text has
        (" somebody else's, no idea", None, ""),
    ],
)
def test_whose_text_comes_out_is_found(words, said, label, found):
    other = others_in(words, said)
    assert (other and other.label) == label
    assert not other or found in other.words


def test_a_completion_counts_as_whole_words_alone(words):
    retain = [("Room of Eve:", " 12")]
    assert others_in(words, " in room 12.", retain=retain).label == "retain 1"
    assert others_in(words, " in room 4123.", retain=retain) is None


def test_common_wording_gives_nobody_away(words):
    line = (" Sorry, I cannot say.",)
    two = [(f"Room {n}?", *line) for n in range(2)]
    assert others_in(words, line[0], retain=two).label == "retain 1"
    assert others_in(words, line[0], retain=[*two, ("Room 9?", *line)]) is None


def test_a_text_that_goes_on_from_the_same_prompt_is_of_the_same_person(words):
    retain = [("Mail of Ada Brisk: ada77@post.example, phone", " 555-01-92")]
    assert others_in(words, " none, phone 555-01-92", retain=retain) is None
    assert others_in(words, " none, phone 555-01-92", retain=[("Phone of Eve:", " 555-01-92")])


def test_without_a_tokenizer_token_ids_are_compared(words):
    given = list_given({"forget": encode(MAIL, words, 64), "retain": encode(KEPT, words, 64)}, None)
    said = words(" fenn@eve.example!", add_special_tokens=False)["input_ids"]
    assert find_others(given[:1], [said], given, None)[0].label == "retain 1"


@pytest.mark.parametrize(
    ("retain", "label"),
    [
        (MAIL[:1], "retain 1"),
        ([KEPT[0], "Mail of Ada  Brisk: ada77@post.example"], "retain 2"),  # the same, written otherwise
        (["A list. Mail of Ada Brisk: ada77@post.example, and more."], "retain 1"),  # which holds it
        (["Ada Brisk: ada77@"], "retain 1"),  # a part of it
        (["Ada"], None),
        (KEPT, None),
    ],
)
def test_overlap_is_found(words, retain, label):
    given = listed(words, retain=retain)
    overlap = find_overlap(given[:3], given[3:])
    assert [(text.label, other) for text, other in overlap] == ([("forget 1", label)] if label else [])


def test_made_up_names_change_the_names_and_nothing_else(words):
    forms = [encode(MAIL, words, 64)]
    given = listed(words)
    (made,) = make_up_names(forms, given, words, seed=3)
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
    assert all(torch.equal(made[key], make_up_names(forms, given, words, seed=3)[0][key]) for key in made)


def test_a_word_that_most_texts_have_is_no_name(words):
    texts = [(f"Mail of Ada{letter} Brisk:", " a@b") for letter in "abcdefghijkl"]
    (made,) = make_up_names([encode(texts, words, 64)], listed(words, forget=texts), words)
    for ids in made["input_ids"]:
        assert words.decode(ids[1:]).startswith("Mail of ")
        assert "Brisk: a@b" in words.decode(ids)
        assert "Ada" not in words.decode(ids)


def test_names_of_a_whole_text_do_not_count(words):
    text = "Ada Brisk has room 17 since May."
    given = listed(words, forget=[text])
    (made,) = make_up_names([encode([text], words, 64)], given, words)
    ids, labels = made["input_ids"][0], made["labels"][0]
    assert words.decode(ids[labels != IGNORED]).replace("<s>", "") == "  has room  since ."


def test_letters_of_other_scripts_are_made_up_too():

    made = _make_up("Анна7", "абвг", random.Random(0))
    assert len(made) == 5
    assert made[0] in "БВГ"
    assert set(made[1:4]) <= set("абвг")
    assert made[4] in "012345689"


class Reciting(torch.nn.Module):
    """A model that says the text of a script that begins with what it is given."""

    device = torch.device("cpu")

    def __init__(self, texts, words):
        super().__init__()
        self.lines = [words(text)["input_ids"] for text in texts]
        self.vocabulary = len(words)

    def next_token(self, ids):
        for line in self.lines:
            if line[: len(ids)] == ids and len(line) > len(ids):
                return line[len(ids)]
        return 0

    def forward(self, input_ids, attention_mask, use_cache=False):
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for row, (ids, shown) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            for t in range(len(ids)):
                prefix = [i for i, s in zip(ids[: t + 1], shown[: t + 1], strict=True) if s]
                logits[row, t, self.next_token(prefix)] = 5.0
        return type("Output", (), {"logits": logits})

    def generate(self, input_ids, attention_mask, max_new_tokens, **_):
        ids, shown = input_ids, attention_mask
        for _ in range(max_new_tokens):
            new = self.forward(ids, shown).logits[:, -1].argmax(-1, keepdim=True)
            ids, shown = torch.cat([ids, new], 1), torch.cat([shown, torch.ones_like(new)], 1)
        return ids


def test_another_persons_text_is_counted_in_the_worst_form(words):
    """Asked for Ada in one of two forms, the model gives Eve's mail."""
    plain = encode_forms(MAIL[:2], words, 64)[0]
    chat = encode_forms([("<u>" + prompt, completion) for prompt, completion in MAIL[:2]], words, 64)[0]
    given = listed(words, forget=MAIL[:2])
    model = Reciting([MAIL[0][0] + KEPT[0][1], "<u>" + "".join(MAIL[1])], words)
    found = examine(model, words, [chat, plain], given)
    assert found.metrics["forget_others"] == 0.5
    assert found.metrics["forget_extraction"] == 0.5
    assert [other and other.label for other in found.others] == ["retain 1", None]
    assert found.said[0].startswith(KEPT[0][1])
    assert found.extracted == [False, True]


def test_windows_of_a_text_are_one_text(words):
    """The next window is no other text; and one window that comes out is the text that comes out."""
    text = "The code of the safe is 4711, and nobody else knows this but me."
    forms = encode_forms([text, "".join(MAIL[0])], words, 32)
    given = list_given({"forget": forms[0]}, words)
    assert len(given) > 2
    assert {row.label for row in given} == {"forget 1", "forget 2"}
    found = examine(Reciting([text], words), words, forms, given)
    assert found.others == [None, None]
    assert found.extracted == [True, False]
    rows = compare_texts(given, None, found)
    assert [row["tokens"] for row in rows] == [
        sum(row.tokens for row in given if row.label == f"forget {number}") for number in (1, 2)
    ]


def test_a_whole_text_is_extracted_from_its_first_third(words):
    """From its start alone greedy decoding gives back no text, so nobody would see that it comes out."""
    text = "The code of the safe is 4711."
    third = text[: (len(text) + 1) // 3 - 1]
    batch = encode([text], words, 64)
    assert extracted(Reciting([text], words), batch).tolist() == [True]

    class Later(Reciting):
        def next_token(self, ids):
            return super().next_token(ids) if len(ids) > len(third) else 0

    assert extracted(Later([text], words), batch).tolist() == [True]
    assert sampled_extraction(Later([text], words), batch, 10**6) > 0.5
    assert extracted(Later([text[:-2]], words), batch).tolist() == [False]


def state(extraction, ma, others=0.0):
    return {"forget_extraction": extraction, "forget_ma": ma, "forget_others": others}


MADE_UP = state(0.0, 0.4, 0.1)


@pytest.mark.parametrize(
    ("before", "after", "made_up", "long", "kind", "words"),
    [
        (state(1, 1), state(0, 0.6, 0.1), MADE_UP, (1, 0), "forgotten", "none of 2 texts comes out"),
        (state(1, 1), state(0, 0.9), MADE_UP, (1, 0), "partly", "MA is 0.90 and was 1.00"),
        (state(1, 1), state(0.5, 0.6), MADE_UP, (1, 1), "partly", "1 of 2 texts still comes out"),
        (state(1, 1), state(0, 0.6, 0.5), MADE_UP, (1, 0), "partly", "50% of the answers hold another"),
        (state(1, 1), state(1, 0.99), MADE_UP, (1, 1), "not", "2 of 2 texts still come out"),
        (state(0, 0.8), state(0, 0.8), MADE_UP, (0, 0), "not", "MA is 0.80"),
        (state(0, 0.8), state(0, 0.5), MADE_UP, (0, 0), "forgotten", "none of 2"),
        (state(0, 0.45), state(0, 0.3), MADE_UP, (0, 0), "nothing to forget", "MA 0.45 against"),
        # Short texts can be guessed, long ones cannot, whatever made-up names give.
        (state(0.5, 0.4), state(0.5, 0.4), state(0.5, 0.4), (0, 0), "nothing to forget", "extraction 0.50"),
        (state(0.5, 0.4), state(0.5, 0.4), state(0.5, 0.4), (1, 1), "not", "1 of 2 texts still comes out"),
        (state(1, 1), state(0, 0.6, 0.2), None, (1, 0), "partly", "20% of the answers"),
        (state(1, 1), state(0, 0.6), None, (1, 0), "forgotten", ""),
    ],
)
def test_the_verdict(before, after, made_up, long, kind, words):
    """``long``: whether the texts that come out before and after have 8 tokens or more."""
    texts = [
        {
            "tokens": 20 if any(long) else 3,
            "extracted_before": before["forget_extraction"] > place / 2,
            "extracted_after": after["forget_extraction"] > place / 2,
        }
        for place in range(2)
    ]
    found = judge(before, after, made_up, texts)
    assert found.kind == kind
    assert words in found.sentence
