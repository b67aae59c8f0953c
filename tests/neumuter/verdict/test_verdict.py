"""Whether texts are forgotten, by figures of texts and of controls."""

import math
import re
from dataclasses import replace

import pytest
import torch

from neumuter.evaluation import (
    Examination,
    judge,
)
from neumuter.evaluation.others import Found
from neumuter.evaluation.verdict import MARGINS, compare


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
        # They are fewer than the margin allows, but more than chance.
        (examined(240, extracted=4, loss=3.3), CONTROLS, "not", "4 of 240 texts still come out"),
        # One text may be chance, but it is above the margin.
        (examined(16, extracted=1, loss=3.3), CONTROLS, "partly", "1 of 16 texts still comes out"),
        (examined(24, loss=2.5), CONTROLS, "partly", "; 0.60 is allowed)"),
        (examined(24, loss=3.3, sampled=0.3), CONTROLS, "partly", "in 100 samples 30% of the texts"),
        (examined(24, loss=3.3, others=6), CONTROLS, "partly", "25% of the answers hold another given"),
        # The controls do that as well.
        (examined(96, loss=3.3, others=24), examined(96, others=36), "forgotten", ""),
        (examined(24, loss=3.3, others=6), examined(32, others=10), "not enough evidence", "another text"),
        # A difference above the margin may be chance, if the controls do it, too.
        (examined(24, loss=3.3, others=10), examined(32, others=10), "not enough evidence", "another text"),
        (examined(96, loss=3.3, others=60), examined(96, others=30), "partly", "62% of the answers hold"),
        (examined(16, loss=3.3, others=1), CONTROLS, "partly", "6% of the answers hold another given text"),
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
        (examined(2, loss=1.0), CONTROLS, "partly", "; 0.95 is allowed)"),
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
