"""What is found of texts on a model that says given ones."""

import pytest
import torch

from neumuter.evaluation import (
    audit,
    compare_texts,
    examine,
    extracted,
    judge,
    list_given,
    make_controls,
    sampled_extraction,
)
from neumuter.evaluation.verdict import compare
from neumuter.texts import encode, encode_forms
from tests import models
from tests.neumuter.verdict.texts import KEPT, MAIL, Reciting, listed


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
    controls = examine(model, words, make_controls(forms, given, words, 64), given, "controls")
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
    controls = examine(model, words, make_controls(forms, given, words, 64), given, "controls")
    figures = {figure.name: figure for figure in compare(examine(model, words, forms, given), controls)}
    assert (figures["others"].texts, figures["others"].controls) == (1, 1)


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
