"""Which neurons hold the texts, trained: a straight-through mask that silences the k lowest scores."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from neumuter.models.modes import without_dropout
from neumuter.mutes.mute_set import MuteSet
from neumuter.training.batches import PairedBatches, check_pair
from neumuter.training.gates import INITIAL_SCORE
from neumuter.training.losses import hinge
from neumuter.training.neurons import Neurons
from neumuter.types import Callback


@dataclass(frozen=True)
class SupportConfig:
    """How the support, the set of neurons, is trained."""

    steps: int = 80
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


def find_support(
    pair: PairedBatches,
    budget: int | float,
    config: SupportConfig = SupportConfig(),
    seed: int = 0,
    callback: Callback | None = None,
    existing: MuteSet | None = None,
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

    Returns:
        A MuteSet of mode "mute" with gains of 0.

    Raises:
        ValueError: a bad budget.
        RuntimeError: the loss diverged.
    """
    check_pair(pair)
    neurons = Neurons(pair.masked, existing)
    k = neurons.count_of(budget)
    noise = torch.randn(neurons.count, generator=torch.Generator().manual_seed(seed))
    # Ties at the start are broken at random.
    scores = (INITIAL_SCORE + 1e-4 * noise).to(neurons.device)
    scores[neurons.excluded] = torch.inf
    scores.requires_grad_()
    velocity = torch.zeros_like(scores)
    mean_square: Any = 0.0
    ids = pair.steps(config.batch_size, seed)
    with without_dropout(pair.masked.model):
        for step in range(1, config.steps + 1):
            soft = scores.sigmoid()
            hard = torch.ones_like(soft).index_fill(0, _find_lowest(scores, k), 0.0)
            mask = neurons.start * (soft + (hard - soft).detach())
            with pair.masked.applying(neurons.by_layer(mask)):
                losses, kl = pair.losses(next(ids))
                loss = hinge(losses, config.margin) + config.kl_weight * kl
                (grad,) = torch.autograd.grad(loss, scores)
            mean_square = config.decay * mean_square + (1 - config.decay) * grad.square().mean()
            scale = (mean_square / (1 - config.decay**step)).sqrt().clamp(min=1e-12)
            velocity = config.momentum * velocity + (1 - config.momentum) * grad / scale
            scores.data -= config.lr * (1 - (step - 1) / config.steps) * velocity
            if callback:
                callback(step, config.steps, describe_step(loss, losses, kl, k / neurons.count))
    if scores.isnan().any():
        raise RuntimeError("the scores are not finite: the loss was NaN or infinite in some step")
    method = {"recipe": "fitted", "support": asdict(config)}
    return neurons.mute_set(_find_lowest(scores, k), torch.zeros(k), "mute", (0.0, 1.0), method, seed)


def describe_step(loss: Tensor, losses: Tensor, kl: Tensor, muted: float) -> dict[str, Any]:
    """What a callback is told of a step; waits for the device."""
    return {"loss": loss.item(), "forget_loss": losses.mean().item(), "kl": kl.item(), "muted": muted}


def _find_lowest(scores: Tensor, k: int) -> Tensor:
    return scores.detach().topk(k, largest=False).indices
