"""The default recipe: choose neurons, then fit the gains that forget the most for the least harm.

NeuMuter's sparsity term finds its own share of neurons, but on a small model it finds none; here the budget
is given. Both phases train masks on the frozen model and look at two losses: a hinge on the forget tokens,
and KL(reference ‖ masked) on the retain tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from neumuter.mutes.mute_set import MuteSet
from neumuter.mutes.slopes import Slopes
from neumuter.recipes.fisher import propose_by_fisher, rank_by_fisher
from neumuter.recipes.schedule import choose_samples, count_steps
from neumuter.recipes.slopes import Held
from neumuter.recipes.support import SupportConfig, find_support
from neumuter.training.adam import Adam, cosine
from neumuter.training.batches import PairedBatches, check_pair
from neumuter.training.constants import check_constants
from neumuter.training.journal import Journal
from neumuter.training.losses import hinge_runs
from neumuter.training.neurons import Neurons
from neumuter.training.processes import agree
from neumuter.training.selection import neuron_count
from neumuter.training.step import Measured, Step
from neumuter.types import Callback


@dataclass(frozen=True)
class GainsConfig:
    """How gains are fitted: KL is held at a target."""

    # None: see ``neumuter.recipes.schedule.count_steps``.
    steps: int | None = None
    # How many times the budget enters where no support was trained.
    candidates: float = 3.0
    # The share of the steps after which only the budget stays.
    choosing: float = 1 / 3
    # Samples of each kind per step; None takes all of them.
    batch_size: int | None = 8
    gain_range: tuple[float, float] = (-2.0, 2.0)
    # Nats by which the log-odds of a run of tokens have to fall below 0, where nothing else is known of it;
    # see ``losses.hinge_runs``.
    margin: float = 3.0
    # Nats per retain token. Each earlier request whose slopes are known raises it by the share kl_growth.
    # With a share s of the neurons it rises by kl_breadth·s²: where all neurons can move, more harm hardly
    # costs a text to keep.
    kl_target: float = 0.02
    kl_growth: float = 0.1
    kl_breadth: float = 0.5
    # η at the start, its range, and how fast it follows KL. Where η rises further, as it does while all
    # neurons of a model move at once, the fit ends before it has come down again.
    kl_weight: float = 30.0
    kl_weight_range: tuple[float, float] = (1.0, 100.0)
    kl_weight_rate: float = 0.15
    # Of Adam, with a cosine decay to zero; both start again after the choice. A step moves each gain by about
    # lr, and what all of them change together grows with their number. So n gains, if they are more than
    # lr_gains, have lr·lr_gains/n. It rises where a choice leaves fewer; a fit that kept the candidates' rate
    # ended no better.
    lr: float = 0.1
    lr_gains: int = 2048
    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        check_constants(self, ("lr", "kl_target", "kl_weight", "kl_weight_range"))
        if len(self.gain_range) != 2 or not self.gain_range[0] < self.gain_range[1]:
            raise ValueError(f"gain_range must be a lower and a higher number, got {self.gain_range}")
        if len(self.kl_weight_range) != 2 or not self.kl_weight_range[0] <= self.kl_weight_range[1]:
            raise ValueError(
                f"kl_weight_range must be two numbers, the lower one first, got {self.kl_weight_range}"
            )
        if self.candidates < 1 or not 0 < self.choosing < 1:
            raise ValueError(
                "candidates must be at least 1 and choosing in (0, 1), got "
                f"{self.candidates} and {self.choosing}"
            )


@dataclass(frozen=True)
class FittedConfig:
    """The constants of ``fit_mutes``.

    support: how the neurons are trained. None trains them for mode "mute" alone; for "modulate", where
        neurons need not be good to silence, ``propose_by_fisher`` proposes ``gains.candidates`` times the
        budget, and those stay that fitting moves most.
    """

    gains: GainsConfig = field(default_factory=GainsConfig)
    support: SupportConfig | None = None


def fit_mutes(
    pair: PairedBatches,
    budget: int | float,
    mode: str = "modulate",
    config: FittedConfig = FittedConfig(),
    seed: int = 0,
    callback: Callback | None = None,
    existing: MuteSet | None = None,
    ratios: Tensor | None = None,
    former: Sequence[Slopes] = (),
    journal: Journal | None = None,
) -> MuteSet:
    """Find the ``budget`` of neurons that hold the forget texts, and silence or modulate them.

    Args:
        pair: the forget and retain texts.
        budget: a share of the masked neurons (float in (0, 1]) or their number (int).
        mode: "mute" silences the selected neurons; "modulate" gives them fitted, signed gains within
            ``config.gains.gain_range``.
        callback: called as (step, total, info) after every step, counted through both phases. info has
            "phase", "loss", "forget_loss" and "kl" in nats, and "muted", the share of neurons.
        existing: a mute set of earlier requests that is in force as well. The new set leaves its neurons
            alone, and KL, which is to the model without any mutes, holds for both (``neumuter.combine``).
        ratios: what ``rank_by_fisher`` gave for the same pair and existing set, if it is known.
        former: what ``measure_slopes`` gave for each earlier request. With them the existing set's gains are
            fitted anew, too, so that its texts stay forgotten, and the result takes its place; mode
            "modulate" alone. If fewer neurons are free than the budget asks for, these are taken.
        journal: what an earlier process has found of this run, and where this one writes it down.

    Returns:
        A MuteSet whose ``method`` holds the constants; the same arguments give the same set.

    Raises:
        ValueError: a bad argument.
        RuntimeError: the loss diverged.
    """
    check_pair(pair, budget=budget, mode=mode, config=config, seed=seed, existing=existing)
    if mode not in ("mute", "modulate"):
        raise ValueError(f'mode must be "mute" or "modulate", got {mode!r}')
    if former and mode == "mute":
        raise ValueError('former needs mode "modulate": mode "mute" silences neurons and fits no gains')
    gains, support = config.gains, config.support
    if support is None and mode == "mute":
        support = SupportConfig()
    journal = journal or Journal()
    neurons = Neurons(pair.masked, existing)
    keep = None
    if support is None and former:
        keep = min(neuron_count(budget, neurons.count), neurons.free)
    elif support is None:
        keep = neurons.count_of(budget)
    first = count_steps(pair.forget_count, support.steps, support.batch_size) if support else 0
    fitting = count_steps(pair.forget_count, gains.steps, gains.batch_size)
    total = first + (fitting if mode == "modulate" else 0)

    def report(phase: str, offset: int) -> Callback | None:
        return callback and (lambda step, _, info: callback(offset + step, total, {"phase": phase, **info}))

    proposed = None
    if support:
        proposed = find_support(pair, budget, support, seed, report("support", 0), existing, journal)
        if mode == "mute":
            return proposed
    elif keep:
        if ratios is None:
            ratios = journal.once("ratios", lambda: rank_by_fisher(pair, existing, journal))
        taken = keep if former else budget
        proposed = propose_by_fisher(pair, taken, existing, gains.candidates, ratios)
    return fit_gains(pair, proposed, gains, seed, report("gains", first), existing, keep, former, journal)


def fit_gains(
    pair: PairedBatches,
    mutes: MuteSet | None,
    config: GainsConfig = GainsConfig(),
    seed: int = 0,
    callback: Callback | None = None,
    existing: MuteSet | None = None,
    keep: int | None = None,
    former: Sequence[Slopes] = (),
    journal: Journal | None = None,
) -> MuteSet:
    """Fit the gains of the neurons of ``mutes`` with Adam on the hinge on log-odds + η·harm.

    Harm is KL in which tokens that changed much weigh more (``losses.weigh_harm``).
    η is steered so that KL stays at its target: η ← clip(η·exp(rate·clip(KL/target − 1, −1, 1)), range).

    Args:
        mutes: the neurons; None with ``former``, if those of the existing set alone are fitted.
        callback: called as (step, total, info) after every step; see ``fit_mutes``.
        existing: a mute set that is in force meanwhile.
        keep: None starts gains at 0, silenced. A number of neurons starts gains at 1, untouched; after
            ``config.choosing`` of the steps only this many stay, those whose gains went farthest from 1.
        former, journal: see ``fit_mutes``.

    Returns:
        A MuteSet of mode "modulate" with gains in ``config.gain_range``.
    """
    check_pair(pair, mutes=mutes, config=config, seed=seed, existing=existing, keep=keep)
    neurons = Neurons(pair.masked, existing)
    none = torch.empty(0, dtype=torch.int64, device=neurons.device)
    new = neurons.ids(mutes) if mutes else none
    old = neurons.ids(existing) if existing and former else none
    support = torch.cat([old, new])
    started = torch.full([len(new)], 0.0 if keep is None else 1.0, device=neurons.device)
    gains = torch.cat([neurons.start[old], started]).clamp(*config.gain_range)
    count = len(support) if keep is None else len(old) + keep
    fit = _Fit(neurons, pair, config, seed, count, callback, former, journal=journal)
    # Before any step all are alike.
    choosing = 0 if keep is None else max(1, round(config.choosing * fit.steps))
    if keep is not None:
        gains = fit.train(support, gains, choosing)
        moved = (gains - 1).abs()
        moved[: len(old)] = torch.inf
        chosen = moved.topk(count).indices
        support, gains = support[chosen], gains[chosen]
    gains = fit.train(support, gains, fit.steps - choosing)
    method = {
        **(mutes.method if mutes else {"recipe": "fisher"}),
        "gains": asdict(replace(config, steps=fit.steps)),
    }
    if former:
        method["former"] = len(former)
    elif existing:
        method["existing"] = existing.method
    return neurons.mute_set(support, gains, "modulate", config.gain_range, method, seed)


def refit_gains(
    pair: PairedBatches,
    existing: MuteSet,
    former: Sequence[Slopes],
    undone: Sequence[Slopes] = (),
    config: GainsConfig = GainsConfig(),
    seed: int = 0,
    callback: Callback | None = None,
) -> MuteSet:
    """Fit the gains of an existing set anew, so that requests are undone and the others stay forgotten.

    Args:
        pair: the texts to keep; of texts to forget there may be none.
        existing: the mute set in force, which holds for all of these requests.
        former: what ``measure_slopes`` gave for each request that stays.
        undone: the same of those to undo: the log-odds of their runs are raised to ``config.margin``.
        callback: called as (step, total, info) after every step; see ``fit_mutes``.

    Returns:
        A MuteSet with the neurons of ``existing``.
    """
    check_pair(pair, may_keep_only=True, existing=existing, config=config, seed=seed)
    neurons = Neurons(pair.masked, existing)
    support = neurons.ids(existing)
    fit = _Fit(neurons, pair, config, seed, len(support), callback, former, undone)
    gains = fit.train(support, neurons.start[support].clamp(*config.gain_range), fit.steps)
    constants = asdict(replace(config, steps=fit.steps))
    method = {"recipe": "refit", "gains": constants, "former": len(former), "undone": len(undone)}
    return neurons.mute_set(support, gains, "modulate", config.gain_range, method, seed)


class _Fit:
    """The fit of gains in one or two runs: steps, the order of samples and η go on through both.

    ``count``: of the neurons that are fitted in the end.
    """

    def __init__(
        self,
        neurons: Neurons,
        pair: PairedBatches,
        config: GainsConfig,
        seed: int,
        count: int,
        callback: Callback | None,
        former: Sequence[Slopes] = (),
        undone: Sequence[Slopes] = (),
        journal: Journal | None = None,
    ) -> None:
        self.neurons, self.pair, self.config, self.callback = neurons, pair, config, callback
        self.former, self.undone, self.journal = former, undone, journal or Journal()
        breadth = config.kl_breadth * (count / neurons.count) ** 2
        self.kl_target = config.kl_target * (1 + config.kl_growth * len(former)) * (1 + breadth)
        self.weight = torch.tensor(config.kl_weight, device=neurons.device)
        self.steps = count_steps(pair.forget_count, config.steps, config.batch_size)
        self.ids = choose_samples(pair, config.batch_size, seed)
        self.taken = 0

    def train(self, support: Tensor, start: Tensor, steps: int) -> Tensor:
        """Gains float32 [k] of the neurons ``support`` int64 [k], after ``steps`` from ``start`` on."""
        if not steps:
            return start
        gains = start.clone().requires_grad_()
        step = self.make_step(support, gains, steps)
        before = self.taken

        def tell(number: int, info: dict[str, float]) -> None:
            if self.callback:
                self.callback(before + number, self.steps, info)

        self.journal.take(f"gains after step {before}", step, self.ids, steps, self.callback and tell)
        self.taken += steps
        return agree(gains.detach())

    def make_step(self, support: Tensor, gains: Tensor, steps: int) -> Step:
        """The step that trains ``gains`` of ``support``, of which there are to be ``steps``."""
        neurons, config, masked = self.neurons, self.config, self.pair.masked
        share = torch.tensor(len(support) / neurons.count, dtype=torch.float64, device=neurons.device)
        terms: list[Callable[[Measured], Tensor]] = [
            lambda found: found.mean(hinge_runs(found.losses, found.ceilings, found.runs, config.margin)),
            lambda found: self.weight.to(found.harm.device) * found.harm,
        ]
        if self.former:
            held = Held(self.former, neurons, support, gains, config.margin)
            terms.append(lambda found: found.once(held(gains).to(found.kl.device)))
        if self.undone:
            # It weighs as much as what pulls the other way.
            times = max(1, len(self.former))
            raised = Held(self.undone, neurons, support, gains, config.margin, sign=-1)
            terms.append(lambda found: found.once(times * raised(gains).to(found.kl.device)))
        return Step(
            self.pair,
            [gains],
            lambda *_: masked.applying(neurons.by_layer(neurons.start.index_put((support,), gains))),
            terms,
            _Update(gains, self.weight, config, steps, self.kl_target),
            lambda: share,
        )


class _Update:
    """Adam; gains stay in their range; and η follows KL."""

    def __init__(
        self, gains: Tensor, weight: Tensor, config: GainsConfig, steps: int, kl_target: float
    ) -> None:
        self.gains, self.weight, self.config, self.kl_target = gains, weight, config, kl_target
        lr = config.lr * config.lr_gains / max(config.lr_gains, len(gains))
        self.adam = Adam([gains], cosine(lr, steps), config.betas)

    def apply(self, measured: Measured, counter: Tensor) -> None:
        config = self.config
        self.adam.apply(measured, counter)
        self.gains.clamp_(*config.gain_range)
        excess = (measured.kl.to(self.weight.device) / self.kl_target - 1).clamp(-1, 1)
        weight = self.weight * (config.kl_weight_rate * excess).exp()
        self.weight.copy_(weight.clamp(*config.kl_weight_range))

    def state(self) -> dict[str, Any]:
        return {"adam": self.adam.state(), "kl_weight": self.weight.clone()}

    def load(self, state: dict[str, Any]) -> None:
        self.adam.load(state["adam"])
        self.weight.copy_(state["kl_weight"])
