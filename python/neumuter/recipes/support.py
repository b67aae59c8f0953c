"""Which neurons hold the texts, trained: a straight-through mask that silences the k lowest scores."""

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neumuter.mutes.mute_set import MuteSet
from neumuter.recipes.schedule import choose_samples, count_steps
from neumuter.training.batches import PairedBatches, check_pair
from neumuter.training.constants import check_constants
from neumuter.training.gates import INITIAL_SCORE
from neumuter.training.journal import Journal
from neumuter.training.losses import hinge
from neumuter.training.neurons import Neurons
from neumuter.training.processes import agree
from neumuter.training.step import Measured, Step
from neumuter.types import Callback


@dataclass(frozen=True)
class SupportConfig:
    """How the support, the set of neurons, is trained."""

    # None: see ``neumuter.recipes.schedule.count_steps``.
    steps: int | None = None
    # Samples of each kind per step; None takes all of them.
    batch_size: int | None = 8
    # Nats per forget token that the hinge asks for.
    margin: float = 3.0
    # η, the weight of KL.
    kl_weight: float = 5.0
    # Decays linearly to zero.
    lr: float = 0.1
    momentum: float = 0.9
    # Of the one running mean square that scales all gradients.
    decay: float = 0.99

    def __post_init__(self) -> None:
        check_constants(self, ("lr",))


def find_support(
    pair: PairedBatches,
    budget: int | float,
    config: SupportConfig = SupportConfig(),
    seed: int = 0,
    callback: Callback | None = None,
    existing: MuteSet | None = None,
    journal: Journal | None = None,
) -> MuteSet:
    """Train which ``budget`` of neurons, silenced, takes the forget texts out of the model.

    Forward, the k neurons of lowest score are off; backward, the mask is σ(score) (straight-through).
    The loss is mean relu(margin − CE) over the forget tokens + η·KL(reference ‖ masked) on the retain texts.
    All gradients are divided by ONE root mean square: a scale per coordinate, as Adam has, would rank
    neurons by how consistent the sign of their gradient is instead of by their effect.

    Args:
        budget: a share of the masked neurons (float in (0, 1]) or their number (int).
        callback: called as (step, total, info) after every step; see ``fit_mutes``.
        existing: a mute set that is in force meanwhile; its neurons are left alone.
        journal: see ``fit_mutes``.

    Returns:
        A MuteSet of mode "mute" with gains of 0.

    Raises:
        ValueError: a bad budget.
        RuntimeError: the loss diverged.
    """
    check_pair(pair, budget=budget, config=config, seed=seed, existing=existing)
    ids = choose_samples(pair, config.batch_size, seed)
    steps = count_steps(pair.forget_count, config.steps, config.batch_size)
    config = replace(config, steps=steps)
    neurons = Neurons(pair.masked, existing)
    k = neurons.count_of(budget)
    noise = torch.randn(neurons.count, generator=torch.Generator().manual_seed(seed))
    # Ties at the start are broken at random.
    scores = (INITIAL_SCORE + 1e-4 * noise).to(neurons.device)
    scores[neurons.excluded] = torch.inf
    scores.requires_grad_()
    share = torch.tensor(k / neurons.count, dtype=torch.float64, device=neurons.device)

    def mask(*_: object) -> AbstractContextManager[object]:
        soft = scores.sigmoid()
        hard = torch.ones_like(soft).index_fill(0, _find_lowest(scores, k), 0.0)
        return pair.masked.applying(neurons.by_layer(neurons.start * (soft + (hard - soft).detach())))

    step = Step(
        pair,
        [scores],
        mask,
        [
            lambda found: found.mean(hinge(found.losses, config.margin)),
            lambda found: config.kl_weight * found.kl,
        ],
        _Update(scores, config, steps),
        lambda: share,
    )

    def tell(number: int, info: dict[str, float]) -> None:
        if callback:
            callback(number, steps, info)

    (journal or Journal()).take("support", step, ids, steps, callback and tell)
    if scores.isnan().any():
        raise RuntimeError("the scores are not finite: the loss was NaN or infinite in some step")
    method = {"recipe": "fitted", "support": asdict(config)}
    return neurons.mute_set(agree(_find_lowest(scores, k)), torch.zeros(k), "mute", (0.0, 1.0), method, seed)


class _Update:
    """Descent with momentum, and one scale for all gradients."""

    def __init__(self, scores: Tensor, config: SupportConfig, steps: int) -> None:
        self.scores, self.config, self.steps = scores, config, steps
        self.velocity = torch.zeros_like(scores)
        self.mean_square = torch.zeros((), device=scores.device)

    def apply(self, measured: Measured, counter: Tensor) -> None:
        config, gradient = self.config, self.scores.grad
        assert gradient is not None
        step = counter.double() + 1
        self.mean_square.mul_(config.decay).add_((1 - config.decay) * gradient.square().mean())
        scale = (self.mean_square / (1 - config.decay**step).float()).sqrt().clamp(min=1e-12)
        self.velocity.copy_(config.momentum * self.velocity + (1 - config.momentum) * gradient / scale)
        lr = (config.lr * (1 - (step - 1) / self.steps)).float()
        self.scores.sub_(lr * self.velocity)

    def state(self) -> dict[str, Any]:
        return {"velocity": self.velocity.clone(), "mean_square": self.mean_square.clone()}

    def load(self, state: dict[str, Any]) -> None:
        self.velocity.copy_(state["velocity"])
        self.mean_square.copy_(state["mean_square"])


def _find_lowest(scores: Tensor, k: int) -> Tensor:
    return scores.detach().topk(k, largest=False).indices
