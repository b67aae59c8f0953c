"""What was told of the steps of a search: a few thousand of them, however many there were."""

from collections.abc import Sequence
from typing import Any

# More points than these are thinned to every second one.
MOST = 4096


def add_point(history: list[dict[str, Any]], info: dict[str, Any]) -> None:
    """Add what was told of the next step to ``history``, as {"step": its number from 1} and ``info``.

    The points are ``2**k`` steps apart, from the first step on, with the smallest k that leaves ``MOST`` or
    fewer. The last step is there in any case. Points depend on the number of steps alone, so a run that goes
    on from the history of an earlier process ends with the same one.
    """
    former = count_steps(history)
    distance = _find_distance(former + 1)
    if distance != _find_distance(former):
        history[:] = [point for point in history if not (point["step"] - 1) % distance]
    elif history and (former - 1) % distance:
        # It was there as the last one.
        history.pop()
    history.append({"step": former + 1, **info})


def count_steps(history: Sequence[dict[str, Any]]) -> int:
    """Count the steps of which ``history`` tells."""
    return int(history[-1]["step"]) if history else 0


def _find_distance(steps: int) -> int:
    return 1 << (max(0, steps - 1) // MOST).bit_length()
