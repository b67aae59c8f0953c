"""Whose text comes out instead, and which texts are the same."""

import pytest

from neumuter.evaluation import find_others, find_overlap, list_given, others
from neumuter.texts import encode, encode_forms
from tests.neumuter.verdict.texts import KEPT, MAIL, listed


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


def test_a_long_text_that_repeats_itself_is_no_common_wording(words):
    secret = "4711-0815-77"
    long = f"Her key is {secret}. " * 12
    (retain,) = encode_forms([long], words, 64)
    assert len(retain["labels"]) >= 3
    given = list_given({"forget": encode(MAIL, words, 64), "retain": retain}, words)
    said = words(f" {secret}", add_special_tokens=False)["input_ids"]
    assert find_others(given[:1], [said], given, words)[0].label == "retain 1"


@pytest.mark.parametrize(
    ("line", "words_in_it"),
    [
        ("ชื่อของเขาคือสมชายครับ", "สมชาย"),
        ("ຊື່ຂອງລາວແມ່ນສົມຊາຍ", "ສົມຊາຍ"),
        ("ឈ្មោះសុខា", "សុខា"),
        ("他叫王小明吗", "王小明"),
    ],
)
def test_words_without_spaces_between_them_are_found(line, words_in_it):
    assert others._holds(line, words_in_it)
    assert not others._holds("Anna", "Ann")


def test_of_several_owners_one_that_stays_is_named(words):
    """What a text to keep says may come out of a control by chance."""
    forget, retain = [("Room of Ada:", " 4711 b"), ("Room of Bo:", " 4712 c")], [("Room of Eve:", " 4712 c")]
    assert others_in(words, " 4712 c", forget=forget, retain=retain).label == "retain 1"
    assert others_in(words, " 4712 c", forget=forget, retain=[("Room of Eve:", " 9")]).label == "forget 2"


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
        ([" " * 12], None),  # which is in no text, though "" is in all
        (KEPT, None),
    ],
)
def test_overlap_is_found(words, retain, label):
    given = listed(words, retain=retain)
    overlap = find_overlap(given[:3], given[3:])
    assert [(text.label, other) for text, other in overlap] == ([("forget 1", label)] if label else [])


def test_nothing_is_no_part_of_a_text(words):
    given = listed(words, forget=[" " * 12])
    assert find_overlap(given[:1], given[1:]) == []
