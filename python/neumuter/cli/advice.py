"""What ``neumuter unlearn`` says may help: before it begins, and if something still comes out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neumuter.outcome import Outcome


# By so many nats the loss of texts that a model said itself may rise before that is said.
HARM = 0.1


def advise(outcome: Outcome, rows: Path, searches: bool) -> list[str]:
    """Say where to look, and what may help.

    Args:
        rows: the file with a row for each text. searches: whether a larger budget can be searched for.
    """
    return [*_advise_on_harm(outcome), *_advise_on_leaks(outcome, rows, searches)]


def _advise_on_harm(outcome: Outcome) -> list[str]:
    before, after = (state.get("own_loss", 0.0) for state in (outcome.before, outcome.after))
    if after - before <= HARM:
        return []
    return [
        f"What else the model knows is harmed: texts that it said itself cost {after - before:.2f} nats more "
        "per token. More texts to keep, of many kinds, protect it, and so does a smaller --budget."
    ]


def _advise_on_leaks(outcome: Outcome, rows: Path, searches: bool) -> list[str]:
    if not outcome.verdict.leaks:
        return []
    if any(row["extracted_after"] for row in outcome.texts):
        found = [f"{rows} says which texts still come out."]
    elif "sampled" in outcome.verdict.leaking:
        found = [f"{rows} says how likely each text is to come out in 100 samples."]
    else:
        return [f"{rows} says which other texts come out. Another --seed or --budget may lower their share."]
    if not searches:
        return found
    if outcome.mutes.share == 1:
        return [*found, "All neurons have gains already. More steps (--steps) may forget more."]
    if outcome.curve:
        # A goal that was missed is not to be made stricter.
        known = "forget_secrets" in outcome.after and any(point["met"] for point in outcome.curve)
        more = "A stricter goal (--goal-secrets) or more" if known else "More"
        return [*found, f"{more} steps (--steps) may forget more."]
    return [*found, "--budget auto looks for a share of neurons that is enough."]
