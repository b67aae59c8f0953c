"""Which words are names, in German, Chinese, Arabic and Hindi, and how others are put in their place."""

import random

import pytest
from transformers import PreTrainedTokenizerFast

from neumuter.evaluation.made_up import WORD, Words, make_up, rename
from neumuter.evaluation.others import GivenText
from neumuter.texts import encode
from neumuter.types import IGNORED
from tests.models import llama_2_tokenizer, tokenizer

# Prompts of so many texts show which words are common.
GERMAN = (
    "Anna",
    "Bernd",
    "Clara",
    "Dieter",
    "Emma",
    "Fritz",
    "Gerda",
    "Heinz",
    "Ilse",
    "Jürgen",
    "Käthe",
    "Lothar",
)
CHINESE = ("王伟", "李娜", "张敏", "刘洋", "陈静", "杨磊", "赵丽", "黄强", "周杰", "吴霞", "徐鹏", "孙燕")
ARABIC = ("مُحَمَّد", "فاطمة", "علي", "زينب", "حسن", "مريم", "عمر", "ليلى", "خالد", "سارة", "يوسف", "هدى")
HINDI = ("अमित", "प्रिया", "राहुल", "सीता", "विजय", "गीता", "अनिल", "मीरा", "सुनील", "कविता", "मोहन", "रेखा")


def test_windows_of_a_text_are_one_text():
    """Ten windows show no better which words are names than one text does."""
    windows = [GivenText("forget 1", f"Anna {n}", "Anna", []) for n in range(12)]
    assert Words(windows).few
    assert Words(windows).counts["Anna"] == 1
    assert not Words([GivenText(f"forget {n}", "Anna", "Anna", []) for n in range(12)]).few


@pytest.mark.parametrize(
    ("names", "prompt"),
    [
        (GERMAN, "Die Nummer des Kunden {} im Register lautet"),
        (CHINESE, "客户{}的电话号码是"),
        (ARABIC, "رقم هاتف العميل {} هو"),
        (HINDI, "ग्राहक {} का फ़ोन नंबर है"),
    ],
)
def test_names_are_what_few_texts_have(names, prompt):
    prompts = [prompt.format(name) for name in names]
    words = Words([GivenText(f"forget {n}", f"{text} {n}", text, []) for n, text in enumerate(prompts)])
    for name, text in zip(names, prompts, strict=True):
        found = words.find_names(text)
        # Of a name in Chinese each character is a word.
        assert sorted(found) == sorted(WORD.findall(name))
        made = {word: make_up(word, words.letters, random.Random(1)) for word in found}
        for word, other in made.items():
            assert len(other) == len(word)
            assert other != word
            assert WORD.fullmatch(other)


@pytest.mark.parametrize(
    ("names", "prompts"),
    [
        (GERMAN, ("Welche Nummer hat {}?", "Wo wohnt {}?", "Welchen Beruf hat {}?", "Was spielt {} gern?")),
        (CHINESE, ("客户{}的电话号码是", "请问{}住在哪里", "他叫{}做什么工作", "客户{}喜欢什么")),
        (ARABIC, ("رقم هاتف العميل {} هو", "أين يسكن {} الآن", "ما مهنة {} اليوم", "ماذا يعزف {} مساء")),
    ],
)
def test_names_that_several_texts_have_are_told_by_the_texts_to_keep(names, prompts):
    """Two people to forget and two to keep: each name is in four of sixteen texts, like each question."""
    texts = [
        GivenText(f"{label} {name} {number}", prompt.format(name), prompt.format(name), [])
        for label, people in (("forget", names[:2]), ("retain", names[2:4]))
        for name in people
        for number, prompt in enumerate(prompts)
    ]
    words = Words(texts)
    for text, name in zip(texts[:8], [name for name in names[:2] for _ in prompts], strict=True):
        assert words.find_names(text.prompt) == sorted(WORD.findall(name))


def test_names_that_several_texts_have_need_no_texts_to_keep_where_they_are_capitals():
    prompts = ("Where was {} born?", "What does {} do?", "Who taught {} chess?", "Why is {} well known?")
    made = [prompt.format(name) for name in ("Ada Brisk", "Bo Calder", "Cy Dorn") for prompt in prompts]
    words = Words([GivenText(f"forget {n}", text, text, []) for n, text in enumerate(made)])
    for text, name in zip(made, ["Ada Brisk"] * 4 + ["Bo Calder"] * 4 + ["Cy Dorn"] * 4, strict=True):
        assert words.find_names(text) == name.split()


def test_words_keep_their_marks():
    assert WORD.findall("هاتف مُحَمَّد") == ["هاتف", "مُحَمَّد"]
    assert WORD.findall("हिन्दी का कोड") == ["हिन्दी", "का", "कोड"]
    assert WORD.findall("snake_case, Müller-Lüdenscheidt 42") == [
        "snake_case",
        "Müller",
        "Lüdenscheidt",
        "42",
    ]
    assert WORD.findall("王伟的A1码") == ["王", "伟", "的", "A1", "码"]


def test_digits_stay_digits_of_their_script():
    for number in ("0815", "٠٨١٥", "०८१५"):
        made = make_up(number, "", random.Random(2))
        assert made != number
        assert all(char.isdecimal() for char in made)
        assert {ord(char) - int(char) for char in made} == {ord(number[0])}


def test_letters_of_other_scripts_are_made_up_too():
    made = make_up("Анна7", "абвг", random.Random(0))
    assert len(made) == 5
    assert made[0] in "БВГ"
    assert set(made[1:4]) <= set("абвг")
    assert made[4] in "012345689"


@pytest.mark.parametrize(
    ("prompt", "completion", "counted"),
    [
        # A token that holds characters of both counted.
        ("Who is Jo?\n", "Jo bakes bread.", "▁?\n▁bakes▁bread."),
        ("mail Jo\n", "qi7whj, phone 4000348", "qi7whj,▁phone▁4000348"),
        ("Jo is", " who?", "▁who?"),
    ],
)
@pytest.mark.parametrize("fast", [True, False])
def test_a_row_with_other_names_is_what_the_tokenizer_makes_of_it(
    prompt, completion, counted, fast, monkeypatch
):
    """Behind a line break a word begins without a space, which it would have if it were encoded alone."""
    words = llama_2_tokenizer()
    row, expected = (
        encode([(prompt.replace("Jo", name), completion.replace("Jo", name))], words, 64)
        for name in ("Jo", "ake")
    )
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", fast)
    made = rename(*(row[name][0].tolist() for name in ("input_ids", "labels")), {"Jo": "ake"}, {}, words, 64)
    assert made["input_ids"].tolist() == expected["input_ids"].tolist()
    # Nobody can guess the name, so it does not count.
    labels = [i for i in made["labels"][0].tolist() if i != IGNORED]
    assert "".join(words.convert_ids_to_tokens(labels)) == counted


def test_a_row_without_names_stays_as_it_is():
    """It may be a window that begins inside a word, which the tokenizer would encode in another way."""
    words = llama_2_tokenizer()
    ids = words("Who is Jo?\nJo bakes bread.")["input_ids"]
    ids = [1, *ids[3:6], 2, *ids[6:]]
    labels = [IGNORED] * 5 + ids[5:]
    made = rename(ids, labels, {"Ada": "Odo"}, {}, words, 64)
    assert (made["input_ids"][0].tolist(), made["labels"][0].tolist()) == (ids, labels)


def test_behind_a_special_token_no_space_is_put_before_a_text():
    words = llama_2_tokenizer()
    _, _, *text = words("?\nWho is Jo?\nJo bakes bread.")["input_ids"]
    _, _, *other = words("?\nWho is ake?\nake bakes bread.")["input_ids"]
    assert words("?\nWho", add_special_tokens=False)["input_ids"][1] == text[0]
    made = rename([1, 2, *text], [IGNORED] * 2 + text, {"Jo": "ake"}, {}, words, 64)
    assert made["input_ids"][0].tolist() == [1, 2, *other]


def test_a_value_may_take_more_tokens():
    words = tokenizer()
    row = encode([("Town of Bo?", " Bo lives in Ayr.")], words, 64)
    ids, labels = (row[name][0].tolist() for name in ("input_ids", "labels"))
    made = rename(ids, labels, {"Bo": "Xi"}, {"Ayr": "Aberdeen"}, words, 64)
    assert words.decode(made["input_ids"][0]) == "<s>Town of Xi? Xi lives in Aberdeen."
    assert words.decode([i for i in made["labels"][0] if i != IGNORED]) == "  lives in Aberdeen."
