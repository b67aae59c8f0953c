"""The smallest share of neurons with which a recipe reaches its goals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from neumuter.evaluation import extraction_rate, memorization_accuracy
from neumuter.mutes.mute_set import MuteSet
from neumuter.recipes.fisher import neuron_ratios
from neumuter.recipes.fitted import forget_pair
from neumuter.training.batches import Pair
from neumuter.training.masked import Masked
from neumuter.training.neurons import Neurons
from neumuter.types import Batch

SHARES = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)
HALVINGS = 1  # of the gap between the last share that fails and the first that does not


@dataclass(frozen=True)
class Goals:
    """Of the forget texts, each at most; None: no matter."""

    extraction: float | None = 0.0  # share of texts that greedy decoding reproduces exactly
    ma: float | None = None  # memorization accuracy

    def __post_init__(self) -> None:
        for name in ("extraction", "ma"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"goal {name} must be in [0, 1], got {value!r}")
        if self.extraction is None and self.ma is None:
            raise ValueError("there is no goal: give extraction, ma or both")

    def met(self, point: Mapping[str, Any]) -> bool:
        limits = {"forget_extraction": self.extraction, "forget_ma": self.ma}
        return all(limit is None or point[name] <= limit for name, limit in limits.items())


def smallest_share(
    masked: Masked,
    forget_batch: Batch,
    neighbour_batch: Batch,
    goals: Goals = Goals(),
    shares: Sequence[float] = SHARES,
    callback: Callable[[dict[str, Any]], object] | None = None,
    **recipe: Any,
) -> tuple[MuteSet, list[dict[str, Any]]]:
    """Run :func:`neumuter.recipes.forget` with rising ``shares`` until ``goals`` are met, then close in.

    ``shares``: floats in (0, 1], ascending. ``callback(point)`` after every share; ``recipe``: what else
    ``forget`` takes (mode, support, gains, seed, beside, its callback as ``progress``).
    Returns (MuteSet, points): the smallest set that meets the goals, and for every share tried, in ascending
    order, {"share", "neurons", "forget_extraction", "forget_ma", "met"}. If none meets them, the MuteSet is
    that of the largest share. Raises ValueError on bad arguments, and what ``forget`` raises.
    """
    if not shares or list(shares) != sorted(set(shares)):
        raise ValueError(f"shares must be ascending, got {shares!r}")
    progress, beside = recipe.pop("progress", None), recipe.get("beside")
    pair = Pair(masked, forget_batch, neighbour_batch)
    if recipe.get("mode") != "mute" and not recipe.get("support"):
        recipe["ratios"] = neuron_ratios(masked, pair, beside)  # the same for all shares
    points: list[dict[str, Any]] = []
    best, failed = None, 0.0

    def attempt(share: float) -> tuple[MuteSet, bool]:
        mutes = forget_pair(masked, pair, share, callback=progress, **recipe)
        with masked.applying(neurons.masks(mutes)):
            point = {
                "share": share,
                "neurons": mutes.count,
                "forget_extraction": extraction_rate(masked.model, forget_batch),
                "forget_ma": memorization_accuracy(masked.model, forget_batch),
            }
        points.append(point | {"met": goals.met(point)})
        if callback:
            callback(points[-1])
        return mutes, points[-1]["met"]

    neurons = Neurons(masked, beside)
    neurons.number(shares[-1])  # before hours are spent on smaller ones
    for share in shares:
        best, met = attempt(share)
        if met:
            break
        failed = share
    for _ in range(HALVINGS if met and failed else 0):
        middle = (failed * share) ** 0.5
        mutes, met = attempt(middle)
        if met:
            best, share = mutes, middle
        else:
            failed = middle
    return cast(MuteSet, best), sorted(points, key=lambda point: point["share"])
