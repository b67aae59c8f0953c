"""What ``neumuter unlearn`` says of what can be done if something still comes out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neumuter.outcome import Outcome


def advise(outcome: Outcome, rows: Path, searches: bool) -> list[str]:
    """Say where to look, and what may help.

    Args:
        rows: the file with a row for each text. searches: whether a larger budget can be searched for.
    """
    verdict = outcome.verdict
    if not verdict.leaks:
        return []
    over = {figure.name for figure in verdict.comparisons if figure.difference >= figure.margin}
    if any(row["extracted_after"] for row in outcome.texts):
        found = [f"{rows} says which texts still come out."]
    elif "sampled" in over:
        found = [f"{rows} says how likely each text is to come out in 100 samples."]
    else:
        return [f"{rows} says which other texts come out. Another --seed or --budget may lower their share."]
    if not searches:
        return found
    if outcome.mutes.share == 1:
        return [*found, "All neurons have gains already. More steps (--steps) may forget more."]
    if outcome.curve:
        return [*found, "More steps (--steps) may forget more."]
    return [*found, "--budget auto looks for a share of neurons that is enough."]
