"""What recipes are measured against: neurons at random, by one gradient, and by how active they are."""

from typing import Any

import torch
from torch import Tensor, nn

from neumuter.models.families import input_device
from neumuter.models.modes import without_dropout
from neumuter.mutes.mute_set import MuteSet
from neumuter.training.losses import token_losses
from neumuter.training.masked import Masked
from neumuter.training.neurons import Neurons
from neumuter.training.selection import neuron_count
from neumuter.types import Batch, check_batch


def mute_random(masked: Masked, budget: int | float, seed: int = 0) -> MuteSet:
    """Silence a ``budget`` of neurons, a share (float) or a number (int), drawn uniformly."""
    neurons = Neurons(masked)
    order = torch.randperm(neurons.count, generator=torch.Generator().manual_seed(seed))
    ids = order[: neuron_count(budget, neurons.count)].to(neurons.device)
    return neurons.mute_set(
        ids, torch.zeros(len(ids)), "mute", (0.0, 1.0), {"recipe": "random", "budget": budget}, seed
    )


def mute_by_attribution(masked: Masked, forget_batch: Batch, budget: int | float) -> MuteSet:
    """Silence the neurons whose gates have the largest first-order effect.

    One gradient of the forget loss L (mean over the counted tokens) with respect to all gates at 1:
    silencing neuron f changes L by about −∂L/∂m_f, so the lowest gradients go first.

    Args:
        forget_batch: see ``neumuter.training.batches``.
        budget: a share of the neurons (float) or a number (int).
    """
    check_batch("forget_batch", forget_batch)
    neurons = Neurons(masked)
    k = neuron_count(budget, neurons.count)
    mask = torch.ones(neurons.count, device=neurons.device, requires_grad=True)
    batch = {key: value.to(neurons.device) for key, value in forget_batch.items()}
    with without_dropout(masked.model), masked.applying(neurons.by_layer(mask)):
        logits = masked.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
    (grad,) = torch.autograd.grad(token_losses(logits, batch["labels"]).mean(), mask)
    ids = grad.topk(k, largest=False).indices
    return neurons.mute_set(
        ids, torch.zeros(k), "mute", (0.0, 1.0), {"recipe": "attribution", "budget": budget}, 0
    )


@torch.no_grad()
def mute_by_activation(
    masked: Masked, forget_batch: Batch, retain_batch: Batch, budget: int | float
) -> MuteSet:
    """Silence the neurons that are most active on the forget texts, relative to the retain texts.

    The score of a neuron is the mean of |activation| over the forget tokens divided by that over the retain
    tokens (selective pruning, Pochinkov and Schoots 2024).

    Args:
        forget_batch, retain_batch: see ``neumuter.training.batches``.
        budget: a share of the neurons (float) or a number (int).

    Raises:
        ValueError: a model with experts, of which different tokens reach different ones.
    """
    neurons = Neurons(masked)
    k = neuron_count(budget, neurons.count)
    active = [_mean_activations(masked, batch) for batch in (forget_batch, retain_batch)]
    ratio = torch.cat([active[0][path] / (active[1][path] + 1e-8) for path in neurons.widths])
    return neurons.mute_set(
        ratio.topk(k).indices,
        torch.zeros(k),
        "mute",
        (0.0, 1.0),
        {"recipe": "activation", "budget": budget},
        0,
    )


def _mean_activations(masked: Masked, batch: Batch) -> dict[str, Tensor]:
    """The mean of |input of the down projection| over real tokens: {path: float32 [F]}."""
    check_batch("batch", batch)
    shown = batch["attention_mask"].bool()
    found, handles = {}, []
    for ffn in masked.ffns:
        if not ffn.is_dense:
            raise ValueError(f"{ffn.path} has experts: neurons cannot be selected by their activation")

        def record(module: nn.Module, arguments: tuple[Any, ...], path: str = ffn.path) -> None:
            hidden = arguments[0].flatten(0, -2)[shown.flatten().to(arguments[0].device)]
            found[path] = hidden.abs().float().mean(0)

        handles.append(ffn.down.register_forward_pre_hook(record))
    try:
        with without_dropout(masked.model), masked.off():
            device = input_device(masked.model)
            ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            masked.model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
