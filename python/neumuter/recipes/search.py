"""The smallest budget of neurons with which the fitted recipe reaches its goals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from neumuter.evaluation import extraction_rate, memorization_accuracy, most_known, secret_extraction
from neumuter.mutes.mute_set import MuteSet
from neumuter.mutes.slopes import Slopes
from neumuter.recipes.fisher import rank_by_fisher
from neumuter.recipes.fitted import FittedConfig, fit_mutes
from neumuter.training.batches import PairedBatches, check_pair
from neumuter.training.journal import Journal
from neumuter.training.neurons import Neurons
from neumuter.training.processes import agree
from neumuter.types import Batch, Callback

BUDGETS = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 1.0)
# How often the gap between the last budget that fails and the first that does not is halved.
HALVINGS = 1
UNKNOWN_SECRETS = (
    "goal secrets needs texts to forget whose secrets are known: pairs of a prompt and a completion, of "
    "which unlearn estimates what identifies them (calibrate)"
)


@dataclass(frozen=True)
class Goals:
    """What the forget texts must come down to; None sets no limit.

    extraction: the share of texts that greedy decoding reproduces exactly. ma: memorization accuracy.
    secrets: the share of secrets that greedy decoding reproduces behind the true words before them.
    """

    extraction: float | None = 0.0
    ma: float | None = None
    secrets: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"goal {name} must be in [0, 1], got {value!r}")
        if all(value is None for value in vars(self).values()):
            raise ValueError("there is no goal: give extraction, ma or secrets")

    def met(self, point: Mapping[str, Any]) -> bool:
        return all(limit is None or point[f"forget_{name}"] <= limit for name, limit in vars(self).items())


def search_budget(
    pair: PairedBatches,
    goals: Goals = Goals(),
    budgets: Sequence[float] = BUDGETS,
    mode: str = "modulate",
    config: FittedConfig = FittedConfig(),
    seed: int = 0,
    callback: Callback | None = None,
    existing: MuteSet | None = None,
    report: Callable[[dict[str, Any]], object] | None = None,
    forms: Sequence[Batch] | None = None,
    former: Sequence[Slopes] = (),
    journal: Journal | None = None,
    secrets: Batch | None = None,
) -> tuple[MuteSet, list[dict[str, Any]]]:
    """Run ``fit_mutes`` with rising ``budgets`` until the goals are met, then close in.

    Args:
        budgets: shares of the neurons in (0, 1], ascending.
        mode, config, seed, callback, existing, former, journal: as in ``fit_mutes``.
        report: called with the point after every budget.
        forms: the forget texts in all forms in which they must be forgotten (see
            ``neumuter.evaluation.most_known``), instead of those of ``pair`` alone.
        secrets: the forget texts of which secrets alone count (see ``neumuter.evaluation.only_secrets``).

    Returns:
        The smallest MuteSet that meets the goals, or that of the largest budget if none does; and a point
        for every budget tried, in ascending order: {"share", "neurons", "forget_extraction", "forget_ma",
        "met"}, and "forget_secrets" where ``secrets`` is given.

    Raises:
        ValueError: a bad argument, or a goal for secrets that nobody knows; what ``fit_mutes`` raises.
    """
    check_pair(pair, goals=goals, budgets=budgets, mode=mode, config=config, seed=seed, existing=existing)
    if not budgets or list(budgets) != sorted(set(budgets)):
        raise ValueError(f"budgets must be ascending, got {budgets!r}")
    if goals.secrets is not None and secrets is None:
        raise ValueError(UNKNOWN_SECRETS)
    neurons, journal = Neurons(pair.masked, existing), journal or Journal()
    budgets = _limit(budgets, neurons, bool(former))
    by_fisher = mode != "mute" and not config.support
    # The ratios are the same for all budgets.
    ratios = journal.once("ratios", lambda: rank_by_fisher(pair, existing, journal)) if by_fisher else None
    points: list[dict[str, Any]] = []
    best, failed = None, 0.0

    def measure(budget: float, mutes: MuteSet) -> dict[str, Any]:
        model = pair.masked.model
        with pair.masked.applying(neurons.masks(mutes)):
            asked = most_known(model, forms or [pair.forget_rows(torch.arange(pair.forget_count))])
            found = {
                "share": budget,
                "neurons": mutes.count,
                "forget_extraction": extraction_rate(model, asked),
                "forget_ma": memorization_accuracy(model, asked),
            }
            return found | ({"forget_secrets": secret_extraction(model, secrets)} if secrets else {})

    def attempt(budget: float) -> tuple[MuteSet, bool]:
        with journal.part(f"budget {budget}"):
            mutes = fit_mutes(pair, budget, mode, config, seed, callback, existing, ratios, former, journal)
            point = journal.once("point", lambda: measure(budget, mutes))
        points.append(agree(point | {"met": goals.met(point)}))
        if report:
            report(points[-1])
        return mutes, points[-1]["met"]

    for budget in budgets:
        best, met = attempt(budget)
        if met:
            break
        failed = budget
    for _ in range(HALVINGS if met and failed else 0):
        middle = (failed * budget) ** 0.5
        mutes, met = attempt(middle)
        if met:
            best, budget = mutes, middle
        else:
            failed = middle
    return cast(MuteSet, best), sorted(points, key=lambda point: point["share"])


def _limit(budgets: Sequence[float], neurons: Neurons, refits: bool) -> list[float]:
    """The budgets that ask for fewer neurons than are free, then all that are free.

    Args:
        refits: whether the neurons that are taken are fitted anew, so that none need be free.
    """
    free = neurons.free / neurons.count
    if not free:
        if not refits:
            neurons.count_of(budgets[0])
        # No budget adds a neuron, so one of them says the same as all.
        return [budgets[0]]
    smaller = [budget for budget in budgets if budget < free]
    return [*smaller, free] if budgets[-1] > free else list(budgets)
