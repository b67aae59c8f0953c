"""Which neurons are selected by their scores, and how many."""

from collections.abc import Mapping
from itertools import pairwise

from torch import Tensor

from neumuter_kernels import neuron_budget, select_muted


class NothingSelectedError(ValueError):
    """No neuron is selected, or only neurons whose gates are open."""


def neuron_count(budget: int | float, total: int) -> int:
    """Count the neurons of ``budget`` out of ``total``.

    A float in (0, 1] is a share, rounded down but at least one neuron; an int is the count.

    Raises:
        TypeError, ValueError: anything else.
    """
    count = neuron_budget(budget, total)
    if isinstance(budget, float):
        count = max(1, count)
    if not 1 <= count <= total:
        raise ValueError(f"budget as a count must be from 1 to {total} neurons, got {budget!r}")
    return count


def select_lowest(
    scores: Mapping[str, Tensor], budget: int | float | None = None, threshold: float | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Select the neurons with the lowest scores: {path: (indices int32 [n], gains float32 [n])}, on the CPU.

    Args:
        scores: {path: log-odds float32 [F]}, in model order; +∞ is never selected.
        budget, threshold: one of them, as in ``Masked.select``.

    Raises:
        ValueError, TypeError, NothingSelectedError: as ``Masked.select``.
    """
    total = sum(len(s) for s in scores.values())
    if (budget is None) == (threshold is None):
        raise ValueError("give either budget or threshold")
    if budget is not None:
        budget = neuron_count(budget, total)
    elif not isinstance(threshold, float) or not 0 < threshold < 1:
        raise ValueError(f"threshold must be a float in (0, 1), got {threshold!r}")
    for path, score in scores.items():
        if score.isnan().any():
            raise ValueError(f"the scores of {path} hold NaN: training diverged, nothing can be selected")
    eligible = sum(int(score.isfinite().sum()) for score in scores.values())
    if budget is not None and budget > eligible:
        raise ValueError(
            f"budget asks for {budget} neurons, but the experts that the forget texts reach have {eligible}"
        )
    device = next(iter(scores.values())).device
    flat = [score.to(device) for score in scores.values()]
    indptr, indices, gains = (t.cpu() for t in select_muted(flat, budget=budget, threshold=threshold))
    ends = indptr.tolist()
    lowest = min(score.min().sigmoid().item() for score in flat)
    if ends[-1] == 0:
        raise NothingSelectedError(f"no neuron has σ(score) below {threshold}; the lowest is {lowest:.3f}")
    if (gains[: ends[-1]] > 1 - 1e-6).all():
        raise NothingSelectedError(
            f"every selected gate is fully open (lowest σ(score) {lowest:.3f}), so muting would "
            "change nothing: train the scores first"
        )
    runs = [slice(start, end) for start, end in pairwise(ends)]
    return {path: (indices[run], gains[run]) for path, run in zip(scores, runs, strict=True)}
