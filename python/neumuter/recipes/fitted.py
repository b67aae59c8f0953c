"""The two-phase recipe: first which neurons hold the texts, then the gains that harm least.

NeuMuter's sparsity term finds its own share of neurons, but on a small model it finds none; here the
share is given. Both phases train masks on the frozen model and look at two losses: a hinge on the
forget tokens and KL(reference ‖ masked) on the neighbours.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from neumuter.models.modes import without_dropout
from neumuter.mutes.mute_set import MuteSet
from neumuter.recipes.fisher import support_by_fisher
from neumuter.training.batches import Pair
from neumuter.training.losses import hinge, odds_hinge
from neumuter.training.masked import INITIAL_SCORE, Masked
from neumuter.training.neurons import Neurons
from neumuter.types import Batch, Callback


@dataclass(frozen=True)
class SupportConfig:
    """Phase one, which neurons: a straight-through top-k mask."""

    steps: int = 120
    batch_size: int | None = None  # samples of each kind per step; None: all
    margin: float = 3.0  # nats per forget token that the hinge asks for
    kl_weight: float = 5.0  # η
    lr: float = 0.1  # linear decay to zero
    momentum: float = 0.9
    decay: float = 0.99  # of the one running mean square that scales all gradients


@dataclass(frozen=True)
class GainsConfig:
    """Phase two, which gains: KL held at a budget."""

    steps: int = 80
    candidates: float = 3.0  # times as many neurons as are asked for enter; without a trained support
    choosing: float = 1 / 3  # of the steps, after which the others leave
    batch_size: int | None = None  # samples of each kind per step; None: all
    gain_range: tuple[float, float] = (-2.0, 2.0)
    margin: float = 1.0  # nats by which the log-odds of a forget token have to fall below 0
    kl_target: float = 0.02  # nats per neighbour token
    kl_weight: float = 30.0  # η at the start
    kl_weight_range: tuple[float, float] = (1.0, 1000.0)
    kl_weight_rate: float = 0.15  # how fast η follows KL
    lr: float = 0.1  # of Adam, cosine decay to zero; both start again after the choice
    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.candidates < 1 or not 0 < self.choosing < 1:
            raise ValueError(
                "steps and candidates must be at least 1 and choosing in (0, 1), got "
                f"{self.steps}, {self.candidates} and {self.choosing}"
            )


def forget(
    masked: Masked,
    forget_batch: Batch,
    neighbour_batch: Batch,
    share: int | float,
    mode: str = "modulate",
    support: SupportConfig | None = None,
    gains: GainsConfig = GainsConfig(),
    seed: int = 0,
    callback: Callback | None = None,
    beside: MuteSet | None = None,
) -> MuteSet:
    """Find the ``share`` of neurons that hold the forget texts, and silence or modulate them.

    ``forget_batch``, ``neighbour_batch``: see :class:`neumuter.training.batches.Pair`. ``share``: of all
    neurons under masks (float in (0, 1]) or their number (int). ``mode`` "mute": the selected neurons
    are silenced. "modulate": they get fitted, signed gains within ``gains.gain_range``.
    ``support``: a SupportConfig, to train which neurons. None: ``SupportConfig()`` for "mute"; for
    "modulate", where neurons need not be good to silence, ``support_by_fisher`` proposes
    ``gains.candidates`` times as many, of which those stay that fitting moves most.
    ``callback(step, total, info)`` after every step, counted through both phases; info = {"phase",
    "loss", "forget_loss", "kl", "muted"}: the step's loss and its parts in nats, and the share.
    ``beside``: a MuteSet of former requests that is in force, too: the new set leaves its neurons alone, and
    KL, which is to the model without any mutes, holds for both together (``neumuter.combine``).

    Returns a MuteSet whose ``method`` holds the hyper-parameters; the same arguments give the same set.
    Raises ValueError on a bad argument and RuntimeError if the loss diverged.
    """
    _check_mode(mode)
    pair = Pair(masked, forget_batch, neighbour_batch)
    return forget_pair(masked, pair, share, mode, support, gains, seed, callback, beside)


def forget_pair(
    masked: Masked,
    pair: Pair,
    share: int | float,
    mode: str = "modulate",
    support: SupportConfig | None = None,
    gains: GainsConfig = GainsConfig(),
    seed: int = 0,
    callback: Callback | None = None,
    beside: MuteSet | None = None,
    ratios: Tensor | None = None,
) -> MuteSet:
    """As :func:`forget`, of a :class:`Pair`; ``ratios``: see ``support_by_fisher``."""
    _check_mode(mode)
    if support is None and mode == "mute":
        support = SupportConfig()
    keep = None if support else Neurons(masked, beside).number(share)
    first = support.steps if support else 0
    total = first + (gains.steps if mode == "modulate" else 0)

    def report(phase: str, offset: int) -> Callback | None:
        return callback and (lambda step, _, info: callback(offset + step, total, {"phase": phase, **info}))

    if support:
        mutes = find_support(masked, pair, share, support, seed, report("support", 0), beside)
    else:
        mutes = support_by_fisher(masked, pair, share, beside, gains.candidates, ratios)
    if mode == "modulate":
        mutes = fit_gains(masked, pair, mutes, gains, seed, report("gains", first), beside, keep)
    return mutes


def _check_mode(mode: str) -> None:
    if mode not in ("mute", "modulate"):
        raise ValueError(f'mode must be "mute" or "modulate", got {mode!r}')


def find_support(
    masked: Masked,
    pair: Pair,
    share: int | float,
    config: SupportConfig = SupportConfig(),
    seed: int = 0,
    callback: Callback | None = None,
    beside: MuteSet | None = None,
) -> MuteSet:
    """Phase one: a MuteSet of mode "mute" that silences the ``share`` of neurons found.

    Forward, the k neurons of lowest score are off; backward, the mask is σ(score) (straight-through).
    Loss: mean relu(margin − CE) over the forget tokens + η·KL(reference ‖ masked) on the neighbours.
    All gradients are divided by ONE root mean square: a scale per coordinate, as Adam has, would rank
    neurons by how consistent the sign of their gradient is instead of by their effect.
    ``pair``: a :class:`Pair` of the same handle. ``share``, ``callback``, ``beside``: as in :func:`forget`.
    Raises ValueError on a bad share and RuntimeError if the loss diverged.
    """
    neurons = Neurons(masked, beside)
    k = neurons.number(share)
    noise = torch.randn(neurons.count, generator=torch.Generator().manual_seed(seed))
    scores = (INITIAL_SCORE + 1e-4 * noise).to(neurons.device)  # ties at the start are broken at random
    scores[neurons.excluded] = torch.inf
    scores.requires_grad_()
    velocity = torch.zeros_like(scores)
    mean_square: Any = 0.0  # a tensor from the first step on
    ids = pair.steps(config.batch_size, seed)
    with without_dropout(masked.model):
        for step in range(1, config.steps + 1):
            soft = scores.sigmoid()
            hard = torch.ones_like(soft).index_fill(0, _lowest(scores, k), 0.0)
            mask = neurons.start * (soft + (hard - soft).detach())
            with masked.applying(neurons.by_layer(mask)):
                losses, kl = pair.losses(next(ids))
                loss = hinge(losses, config.margin) + config.kl_weight * kl
                (grad,) = torch.autograd.grad(loss, scores)
            mean_square = config.decay * mean_square + (1 - config.decay) * grad.square().mean()
            scale = (mean_square / (1 - config.decay**step)).sqrt().clamp(min=1e-12)
            velocity = config.momentum * velocity + (1 - config.momentum) * grad / scale
            scores.data -= config.lr * (1 - (step - 1) / config.steps) * velocity
            if callback:
                callback(step, config.steps, _info(loss, losses, kl, k / neurons.count))
    if scores.isnan().any():
        raise RuntimeError("the scores are not finite: the loss was NaN or infinite in some step")
    method = {"recipe": "two-phase", "support": asdict(config)}
    return neurons.mute_set(_lowest(scores, k), torch.zeros(k), "mute", (0.0, 1.0), method, seed)


def fit_gains(
    masked: Masked,
    pair: Pair,
    mutes: MuteSet,
    config: GainsConfig = GainsConfig(),
    seed: int = 0,
    callback: Callback | None = None,
    beside: MuteSet | None = None,
    keep: int | None = None,
) -> MuteSet:
    """The neurons of ``mutes`` with gains in ``config.gain_range``: a MuteSet of mode "modulate".

    Trained with Adam on the hinge on log-odds + η·KL. η is steered so that KL stays at its budget:
    η ← clip(η·exp(rate·clip(KL/target − 1, −1, 1)), *kl_weight_range).
    ``keep``: None, and gains start at 0, silenced. A number of neurons: gains start at 1, untouched; after
    ``config.choosing`` of the steps only so many stay, those whose gains went farthest from 1.
    ``pair``, ``callback``, ``beside``: as in :func:`find_support`.
    """
    neurons = Neurons(masked, beside)
    support = neurons.ids(mutes)
    gains = torch.full([len(support)], 0.0 if keep is None else 1.0, device=neurons.device)
    gains.clamp_(*config.gain_range)
    choosing = 0 if keep is None else round(config.choosing * config.steps)
    fit = _Gains(neurons, pair, config, seed, callback)
    if keep is not None:
        gains = fit.train(support, gains, choosing)
        chosen = (gains - 1).abs().topk(keep).indices
        support, gains = support[chosen], gains[chosen]
    gains = fit.train(support, gains, config.steps - choosing)
    method = {**mutes.method, "gains": asdict(config)} | ({"beside": beside.method} if beside else {})
    return neurons.mute_set(support, gains, "modulate", config.gain_range, method, seed)


class _Gains:
    """Training of gains, in one or two runs: steps, the order of samples and η go on through both."""

    def __init__(
        self, neurons: Neurons, pair: Pair, config: GainsConfig, seed: int, callback: Callback | None
    ) -> None:
        self.neurons, self.pair, self.config, self.callback = neurons, pair, config, callback
        self.weight = torch.tensor(config.kl_weight, device=neurons.device)
        self.ids = pair.steps(config.batch_size, seed)
        self.step = 0

    def train(self, support: Tensor, start: Tensor, steps: int) -> Tensor:
        """Gains float32 [k] of the neurons ``support`` int64 [k], after ``steps`` from ``start`` on."""
        neurons, config, masked = self.neurons, self.config, self.neurons.masked
        gains = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([gains], lr=config.lr, betas=config.betas)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with without_dropout(masked.model):
            for _ in range(steps):
                mask = neurons.start.index_put((support,), gains)
                with masked.applying(neurons.by_layer(mask)):
                    losses, kl = self.pair.losses(next(self.ids))
                    loss = odds_hinge(losses, config.margin) + self.weight.to(kl.device) * kl
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
                schedule.step()
                gains.data.clamp_(*config.gain_range)
                excess = (kl.detach().to(self.weight.device) / config.kl_target - 1).clamp(-1, 1)
                self.weight = (self.weight * (config.kl_weight_rate * excess).exp()).clamp(
                    *config.kl_weight_range
                )
                self.step += 1
                if self.callback:
                    muted = len(support) / neurons.count
                    self.callback(self.step, config.steps, _info(loss, losses, kl, muted))
        return gains.detach()


def _lowest(scores: Tensor, k: int) -> Tensor:
    return scores.detach().topk(k, largest=False).indices


def _info(loss: Tensor, losses: Tensor, kl: Tensor, muted: float) -> dict[str, Any]:
    return {"loss": loss.item(), "forget_loss": losses.mean().item(), "kl": kl.item(), "muted": muted}
