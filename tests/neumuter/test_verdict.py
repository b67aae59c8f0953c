"""Whether texts are forgotten: whose text comes out instead, controls, and the last line."""

import math
import random
import re
from dataclasses import replace

import pytest
import torch

from neumuter.evaluation import (
    Examination,
    audit,
    compare_texts,
    examine,
    extracted,
    find_others,
    find_overlap,
    judge,
    list_given,
    make_controls,
    sampled_extraction,
)
from neumuter.evaluation.controls import MADE_UP, TIMES
from neumuter.evaluation.made_up import make_up, rename
from neumuter.evaluation.others import Found
from neumuter.evaluation.verdict import MARGINS, compare
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


def test_made_up_names_change_the_names_and_nothing_else(words):
    forms = [encode(MAIL, words, 64)]
    given = listed(words)
    (made,) = make_controls(forms, given, words, seed=3)
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
    assert all(torch.equal(made[key], make_controls(forms, given, words, seed=3)[0][key]) for key in made)


def test_a_word_of_texts_to_keep_is_no_name(words):
    texts = [(f"Mail of Ada{letter} Brisk:", " a@b") for letter in "abcdefghijkl"]
    given = listed(words, forget=texts, retain=[("Mail of Eve Brisk:", " c@d")])
    (made,) = make_controls([encode(texts, words, 64)], given, words)
    for ids in made["input_ids"]:
        assert words.decode(ids[1:]).startswith("Mail of ")
        assert "Brisk: a@b" in words.decode(ids)
        assert "Ada" not in words.decode(ids)


def test_names_of_a_whole_text_do_not_count(words):
    text = "Ada Brisk has room 17 since May."
    given = listed(words, forget=[text])
    (made,) = make_controls([encode([text], words, 64)], given, words)
    ids, labels = made["input_ids"][0], made["labels"][0]
    assert words.decode(ids[labels != IGNORED]).replace("<s>", "") == "  has room  since ."


def test_a_long_text_leaves_room_for_controls_of_the_others(words):
    """Its windows would be all that the mails are compared with."""
    story = "".join(f"Line {n} of a long story. " for n in range(60))
    forms = encode_forms([story, *MAIL], words, 40)
    given = list_given({"forget": forms[0]}, words)
    made = make_controls(forms, given, words)[0]
    written = [words.decode(ids, skip_special_tokens=True) for ids in made["input_ids"]]
    assert len(written) == MADE_UP
    for ending in ("post.example", "mail.example", "cy.example"):
        assert sum(text.strip().endswith(ending) for text in written) == 1


@pytest.mark.parametrize(
    ("texts", "controls"), [(1, MADE_UP), (20, 40), (MADE_UP, MADE_UP), (90, 90), (200, TIMES * MADE_UP)]
)
def test_the_more_texts_the_more_controls(words, texts, controls):
    forget = [(f"Mail of Ada{n}:", f" a{n}@post.example") for n in range(texts)]
    (made,) = make_controls([encode(forget, words, 64)], listed(words, forget=forget), words)
    assert len(made["labels"]) == len(made["by_chance"]) == controls


def test_controls_are_the_same_texts_in_all_forms(words):
    """One text has a window more in one form; the worse form of each control counts."""
    texts = [*MAIL[:2], (MAIL[2][0], MAIL[2][1] + 12 * "x")]
    plain = encode_forms(texts, words, 48)[0]
    chat = encode_forms([("<u>" + prompt, completion) for prompt, completion in texts], words, 48)[0]
    assert (len(plain["labels"]), len(chat["labels"])) == (3, 4)
    given = list_given({"forget": plain}, words)
    made = make_controls([plain, chat], given, words)
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


def test_letters_of_other_scripts_are_made_up_too():

    made = make_up("Анна7", "абвг", random.Random(0))
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


class Blurting(Reciting):
    """A model that says the same to every prompt, once it has come to the colon."""

    def next_token(self, ids):
        (line,) = self.lines
        start = len(ids) - 1 - ids[::-1].index(self.colon) if self.colon in ids else len(ids)
        said = len(ids) - start
        return line[said] if 1 <= said < len(line) else 0

    def __init__(self, said, words):
        super().__init__([said], words)
        self.colon = words(":", add_special_tokens=False)["input_ids"][0]


@pytest.mark.parametrize("forget", [MAIL[:1], MAIL])
def test_a_secret_that_is_told_to_everybody_is_not_forgotten(words, forget):
    """It comes out of the controls too, which excuses nothing."""
    forms, given = encode_forms(forget, words, 64), listed(words, forget=forget)
    model = Blurting(MAIL[0][1], words)
    controls = examine(model, words, make_controls(forms, given, words), given, "controls")
    assert controls.extracted[0] or controls.others[0]
    found = judge(examine(model, words, forms, given), controls)
    assert found.kind in ("not", "partly")
    assert found.leaks
    assert found.texts == ["not", "partly", "partly"][: len(forget)]
    figures = {figure.name: figure for figure in found.comparisons}
    assert [figures[name].controls for name in ("extraction", "sampled", "others")] == [0, 0, 0]


def test_a_kept_text_that_is_told_to_everybody_is_no_leak(words):
    """What stays may come out, to controls as well as to the texts to forget."""
    forms, given = encode_forms(MAIL, words, 64), listed(words)
    model = Blurting(KEPT[0][1], words)
    controls = examine(model, words, make_controls(forms, given, words), given, "controls")
    figures = {figure.name: figure for figure in compare(examine(model, words, forms, given), controls)}
    assert (figures["others"].texts, figures["others"].controls) == (1, 1)


def test_a_whole_text_is_no_control_of_itself(words):
    """Its words are the same but for the names, so a model that knows it says the rest of the control."""
    text = "Ada Brisk has room seventeen since the month of May, and she keeps it."
    forms, given = encode_forms([text], words, 128), listed(words, forget=[text])
    (made,) = make_controls(forms, given, words)
    assert not made["by_chance"].any()


def test_a_model_that_predicts_nan_has_forgotten_nothing(words):
    """Nothing comes out of it, and nothing is likelier than its controls."""
    model = models.build("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    forms = encode_forms(MAIL, words, 64)
    with pytest.raises(RuntimeError, match=r"predicts NaN on 3 of 3 texts.*float32"):
        examine(model, words, forms, list_given({"forget": forms[0]}, words))
    with pytest.raises(RuntimeError, match="predicts NaN"):
        audit(model, words, MAIL)


def test_an_audit_finds_what_comes_out_in_one_form_alone(words):
    """Through its chat template the model says nothing of Ada."""
    chatting = models.tokenizer()
    chatting.chat_template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    model = Reciting(["".join(MAIL[0])], words)
    found = audit(model, chatting, MAIL, [(f"Mail of Zed{n}:", f" zed{n}@x.example") for n in range(3)])
    assert [(text.number, text.kind) for text in found.known] == [(1, "by heart")]


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


def examined(texts, extracted=0, others=0, sampled=0.0, loss=3.0, spread=1.0):
    """What was found of so many texts; the losses are spread evenly around ``loss``."""
    losses = [loss + spread * ((place + 0.5) / texts - 0.5) for place in range(texts)]
    return Examination(
        metrics={},
        extracted=[place < extracted for place in range(texts)],
        sampled=[sampled] * texts,
        loss=losses,
        min_k=[-2 * loss for loss in losses],
        said=[""] * texts,
        others=[Found("retain 1", "words") if place < others else None for place in range(texts)],
        by_chance=[True] * texts,
    )


CONTROLS = examined(32)
KNOWN = examined(24, extracted=24, sampled=1.0, loss=0.1)


@pytest.mark.parametrize(
    ("after", "controls", "kind", "words"),
    [
        (examined(24, loss=3.3), CONTROLS, "forgotten", "none of 24 texts comes out, and they look like"),
        (examined(24, extracted=24, sampled=1.0), CONTROLS, "not", "24 of 24 texts still come out"),
        (examined(24, extracted=4), CONTROLS, "not", "4 of 24 texts still come out"),
        # One text may be chance, but it is above the margin.
        (examined(16, extracted=1, loss=3.3), CONTROLS, "partly", "1 of 16 texts still comes out"),
        (examined(24, loss=2.5), CONTROLS, "partly", "by loss they can be told"),
        (examined(24, loss=3.3, sampled=0.3), CONTROLS, "partly", "in 100 samples 30% of the texts"),
        (examined(24, loss=3.3, others=6), CONTROLS, "partly", "25% of the answers hold another given"),
        # The controls do that as well.
        (examined(96, loss=3.3, others=24), examined(96, others=36), "forgotten", ""),
        (examined(24, loss=3.3, others=6), examined(32, others=10), "not enough evidence", "another text"),
        (examined(24, loss=3.3, sampled=0.3), examined(32, sampled=0.3), "forgotten", ""),
        (
            examined(96, extracted=24, loss=3.3),
            examined(96, extracted=36),
            "forgotten",
            "no more than by chance",
        ),
        # A single one of many is within the margin; the line says so.
        (examined(100, extracted=1, loss=3.3), examined(96), "forgotten", "1 of 100 texts comes out, within"),
        (
            examined(100, others=1, loss=3.3),
            examined(96),
            "forgotten",
            "1% of the answers hold another given",
        ),
        (examined(12), CONTROLS, "not enough evidence", "AUC of the loss"),
        # The difference is beyond the margin, but of so few texts that it may be chance.
        (examined(12, loss=2.85), CONTROLS, "not enough evidence", "AUC of the loss"),
        (examined(5, loss=3.3), CONTROLS, "not enough evidence", "5 texts and 32 controls are too few"),
        (examined(2, loss=1.0), CONTROLS, "partly", "by loss they can be told"),
        (examined(2, loss=2.9), CONTROLS, "not enough evidence", "2 texts and 32 controls are too few"),
        (examined(1, loss=3.3), CONTROLS, "not enough evidence", "About 46 texts and 46 controls would do"),
        (examined(24, loss=3.3), examined(4), "not enough evidence", "24 texts and 4 controls"),
        (examined(24, loss=3.3), None, "not enough evidence", "Give controls"),
        (examined(1, extracted=1), None, "not", "1 of 1 texts still comes out"),
    ],
)
def test_the_verdict(after, controls, kind, words):
    found = judge(after, controls, KNOWN, CONTROLS, [20] * 24)
    assert found.kind == kind
    assert words in found.sentence
    assert len(found.texts) == len(after.loss)
    assert judge(after, controls).kind == kind  # of a model without mutes
    comes_out = ("come" in words and "none" not in words) or "answers" in words or "100" in words
    assert found.leaks == (comes_out and kind != "forgotten")
    for figure in found.comparisons:
        assert figure.low <= figure.high
        assert figure.margin == MARGINS[figure.name]


@pytest.mark.parametrize(
    ("before", "tokens", "nothing"),
    [
        (examined(24), 20, True),
        (examined(24, loss=3.3), 20, True),
        (KNOWN, 20, False),
        (examined(24, loss=2.5), 20, False),  # no text comes out, but they are likelier
        # Short texts can be guessed, long ones cannot.
        (examined(24, extracted=3), 3, True),
        (examined(24, extracted=3), 20, False),
        (examined(1), 20, True),
        (examined(1, loss=0.1), 20, False),
    ],
)
def test_there_is_nothing_to_forget_where_texts_are_like_controls(before, tokens, nothing):
    controls = examined(32, extracted=4)
    found = judge(examined(24, loss=3.3), controls, before, controls, [tokens] * 24)
    assert (found.kind == "nothing to forget") == nothing


def test_intervals_hold_what_new_texts_would_give():
    """Of 60 samples of texts whose AUC is 0.5, few lie outside of their interval of 90 %."""
    generator = torch.Generator().manual_seed(0)
    missed = 0
    for _ in range(60):
        drawn = []
        for count in (40, 60):
            losses = torch.randn(count, generator=generator).tolist()
            drawn.append(replace(examined(count), loss=losses))
        figure = next(found for found in compare(*drawn) if found.name == "loss")
        missed += not figure.low <= 0 <= figure.high
    assert 1 <= missed <= 14


def test_few_that_were_never_seen_are_called_partly_forgotten():
    """Of 60 samples, at most one in ten: each of two AUCs, which go together, is wrong once in 20 times."""
    generator = torch.Generator().manual_seed(0)
    kinds = []
    for _ in range(60):
        drawn = []
        for count in (8, 32):
            losses = torch.randn(count, generator=generator).tolist()
            drawn.append(replace(examined(count), loss=losses, min_k=[-2 * loss for loss in losses]))
        kinds.append(judge(*drawn).kind)
    assert 0 < kinds.count("partly") <= 6
    assert kinds.count("not enough evidence") > 30


@pytest.mark.parametrize(
    ("after", "controls", "kind"),
    [
        (examined(12, loss=2.98), CONTROLS, "forgotten"),
        (examined(40, loss=3.0), CONTROLS, "forgotten"),
        (examined(12, loss=2.85), CONTROLS, "partly"),
        # Of fewer than 8 texts the numbers are those for texts that are like the controls.
        (examined(5), examined(35), "forgotten"),
        (examined(24), examined(4), "forgotten"),
    ],
)
def test_the_texts_that_would_do_are_enough(after, controls, kind):
    found = judge(after, controls)
    assert found.kind == "not enough evidence"
    texts, unseen = map(int, re.search(r"About (\d+) texts and (\d+) controls", found.sentence).groups())
    assert texts > len(after.loss) or unseen > len(controls.loss)
    assert texts >= len(after.loss)
    assert unseen >= len(controls.loss)
    loss = sum(after.loss) / len(after.loss)
    assert judge(examined(math.ceil(1.1 * texts), loss=loss), examined(math.ceil(1.1 * unseen))).kind == kind
    fewer = [(2 * len(had.loss) + count) // 3 for had, count in ((after, texts), (controls, unseen))]
    assert judge(examined(fewer[0], loss=loss), examined(fewer[1])).kind == "not enough evidence"


def test_each_text_has_a_verdict():
    after = examined(40, extracted=1, others=2, spread=6.0)
    after.sampled[3] = 0.9
    found = judge(after, CONTROLS).texts
    assert found[:4] == [
        "not",
        "partly",
        "partly",
        "partly",
    ]  # the loss of the third is far below the controls'
    assert found[-1] == "forgotten"
    assert set(judge(after, None).texts) == {"not", "partly", "not enough evidence"}


def test_values_are_those_of_texts_that_are_worded_alike(words):
    texts = [(f"Town of Ada{n}?", f" Ada{n} lives in Ox{n}ford.") for n in range(12)]
    given = listed(words, forget=texts)
    (made,) = make_controls([encode(texts, words, 64)], given, words)
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
    (made,) = make_controls([encode(texts, words, 64)], given, words)
    said = [words.decode(ids) for ids in made["input_ids"]]
    assert [("Hull" in text) for text in said] == made["by_chance"].tolist()
    assert 0 < sum(made["by_chance"].tolist()) < len(said)
