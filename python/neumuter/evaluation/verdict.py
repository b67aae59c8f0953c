"""Did the model forget? One function with stated limits says so, from what was measured before and after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neumuter.evaluation.others import STRETCH

# The model knows texts whose MA is by more than this above that of the same texts with made-up names.
KNOWN_ABOVE = 0.1
# This share of that excess must be gone; with less than the second one gone, nothing happened.
GONE, NOTICED = 0.25, 0.05
UNKNOWN = {"forget_extraction": 0.0, "forget_ma": 0.0, "forget_others": 0.0}


@dataclass(frozen=True)
class Verdict:
    """kind: "forgotten", "partly", "not" or "nothing to forget". sentence: the same with its reasons."""

    kind: str
    sentence: str


def judge(
    before: Mapping[str, float],
    after: Mapping[str, float],
    made_up: Mapping[str, float] | None,
    texts: Sequence[Mapping[str, Any]],
) -> Verdict:
    """Judge whether texts are forgotten.

    There is nothing to forget if the model, before, knows the texts no better than the same texts with
    made-up names: no text of ``STRETCH`` tokens or more comes out, extraction is no higher, and MA is higher
    by at most ``KNOWN_ABOVE``. Otherwise they are forgotten if, after, no such text comes out, extraction is
    no higher than with made-up names, a quarter (``GONE``) of the excess of MA is gone, and other given texts
    come out no more often than with made-up names. They are partly forgotten if fewer texts come out than
    before, or if a twentieth (``NOTICED``) of the excess of MA is gone.

    Args:
        before, after: "forget_extraction", "forget_ma" and "forget_others", as in ``METRICS``.
        made_up: the same, of the texts with made-up names before; None takes 0 for all.
        texts: for each text its "tokens" that count, "extracted_before" and "extracted_after".
    """
    base = made_up or UNKNOWN
    excess = before["forget_ma"] - base["forget_ma"]
    if (
        not _long(texts, "extracted_before")
        and before["forget_extraction"] <= base["forget_extraction"]
        and excess <= KNOWN_ABOVE
    ):
        return Verdict("nothing to forget", _nothing(before, base))
    still = sum(text["extracted_after"] for text in texts)
    fallen = before["forget_ma"] - after["forget_ma"]
    reasons = []
    if _long(texts, "extracted_after") or after["forget_extraction"] > base["forget_extraction"]:
        reasons.append(f"{still} of {len(texts)} texts still come{'s' * (still == 1)} out")
    if fallen < GONE * excess:
        reasons.append(
            f"MA is {after['forget_ma']:.2f} and was {before['forget_ma']:.2f}; with made-up names it is "
            f"{base['forget_ma']:.2f}"
        )
    if after["forget_others"] > base["forget_others"]:
        reasons.append(
            f"{after['forget_others']:.0%} of the answers hold another given text, and "
            f"{base['forget_others']:.0%} of those to made-up names"
        )
    if not reasons:
        return Verdict("forgotten", "Forgotten: " + _forgotten(still, len(texts), after))
    fewer = after["forget_extraction"] < before["forget_extraction"]
    if fewer or (fallen > 0 and fallen >= NOTICED * excess):
        return Verdict("partly", f"Partly forgotten: {'; '.join(reasons)}.")
    return Verdict("not", f"Not forgotten: {'; '.join(reasons)}. Try more steps or a larger budget.")


def _long(texts: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether a text comes out that is too long to be guessed."""
    return any(text[name] and text["tokens"] >= STRETCH for text in texts)


def _nothing(before: Mapping[str, float], base: Mapping[str, float]) -> str:
    figures = (f"{state['forget_extraction']:.2f}, MA {state['forget_ma']:.2f}" for state in (before, base))
    return (
        "Nothing to forget: the untouched model knows these texts no better than with made-up names "
        f"(extraction {' against '.join(figures)}). Check that the prompts are those that it learned."
    )


def _forgotten(still: int, count: int, after: Mapping[str, float]) -> str:
    if still:
        return f"of {count} texts {still} still come out, but no more than with made-up names."
    other = "" if after["forget_others"] else ", and no other given text in their place"
    return f"none of {count} texts comes out{other}." if count > 1 else f"the text does not come out{other}."
