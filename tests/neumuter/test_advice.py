"""What `neumuter unlearn` says can be done, by what still comes out."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from neumuter.cli.advice import advise
from neumuter.evaluation.verdict import MARGINS, Comparison, Verdict

ROWS = Path("out/report.csv")
MISSED, MET = {"met": False}, {"met": True}


def an_outcome(over, extracted=False, share=0.01, curve=None, **after):
    figures = [
        Comparison(name, 0.5, 0.0, margin if name in over else 0.0, 0.0, 0.5, margin)
        for name, margin in MARGINS.items()
    ]
    verdict = Verdict("partly", "", figures, ["partly"])
    texts = [{"extracted_after": extracted}, {"extracted_after": False}]
    mutes = SimpleNamespace(share=share)
    before = {"own_loss": 2.0}
    return SimpleNamespace(
        verdict=verdict, texts=texts, mutes=mutes, curve=curve, before=before, after=before | after
    )


@pytest.mark.parametrize(
    ("outcome", "searches", "said"),
    [
        (an_outcome([]), True, []),
        (an_outcome(["loss"]), True, []),
        (an_outcome(["extraction"], True), True, ["which texts still come out", "--budget auto"]),
        (an_outcome(["extraction"], True), False, ["which texts still come out"]),
        (an_outcome(["extraction"], True, share=1.0), True, ["still come out", "All neurons have gains"]),
        (an_outcome(["extraction"], True, curve=[MET]), True, ["still come out", "More steps (--steps)"]),
        (
            an_outcome(["extraction"], True, curve=[MISSED], forget_secrets=0.5),
            True,
            ["still come out", "More steps (--steps)"],
        ),
        (
            an_outcome(["extraction"], True, curve=[MISSED, MET], forget_secrets=0.5),
            True,
            ["still come out", "A stricter goal (--goal-secrets) or more steps (--steps)"],
        ),
        (an_outcome(["sampled"]), True, ["how likely each text is", "--budget auto"]),
        # A larger budget may raise it.
        (an_outcome(["others"]), True, ["which other texts come out"]),
    ],
)
def test_advice_follows_what_comes_out(outcome, searches, said):
    found = advise(outcome, ROWS, searches)
    assert len(found) == len(said)
    for sentence, words in zip(found, said, strict=True):
        assert words in sentence
    assert not found or found[0].startswith("out/report.csv says")


def test_harm_to_what_else_is_known_is_said():
    assert advise(an_outcome([], own_loss=2.09), ROWS, True) == []
    assert advise(an_outcome([], own_loss=1.5), ROWS, True) == []
    (said,) = advise(an_outcome([], own_loss=2.26), ROWS, True)
    assert "What else the model knows is harmed: texts that it said itself cost 0.26 nats more" in said
    (said, *_) = advise(an_outcome(["others"], own_loss=2.26), ROWS, True)
    assert "is harmed" in said
