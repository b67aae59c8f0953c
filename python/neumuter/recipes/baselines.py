"""What the recipes are measured against: neurons at random, and neurons by one gradient."""

import torch

from neumuter.losses import token_losses
from neumuter.masking import neuron_count
from neumuter.recipes.neurons import Neurons
from neumuter.recipes.pair import without_dropout


def mute_random(masked, share, seed=0):
    """A MuteSet that silences ``share`` of the neurons (float share or int number), drawn uniformly."""
    neurons = Neurons(masked)
    order = torch.randperm(neurons.count, generator=torch.Generator().manual_seed(seed))
    ids = order[: neuron_count(share, neurons.count)].to(neurons.device)
    return neurons.mute_set(
        ids, torch.zeros(len(ids)), "mute", (0.0, 1.0), {"recipe": "random", "share": share}, seed
    )


def mute_by_attribution(masked, forget_batch, share):
    """A MuteSet that silences the neurons whose gate has the largest first-order effect.

    One gradient of the forget loss L (mean over the counted tokens) with respect to all gates at 1:
    silencing neuron f changes L by about −∂L/∂m_f, so the lowest gradients go first. ``share``: float
    share or int number of neurons. ``forget_batch``: see :class:`neumuter.recipes.pair.Pair`.
    """
    neurons = Neurons(masked)
    k = neuron_count(share, neurons.count)
    mask = torch.ones(neurons.count, device=neurons.device, requires_grad=True)
    batch = {key: value.to(neurons.device) for key, value in forget_batch.items()}
    with without_dropout(masked.model), masked.applying(neurons.by_layer(mask)):
        logits = masked.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
    (grad,) = torch.autograd.grad(token_losses(logits, batch["labels"]).mean(), mask)
    ids = grad.topk(k, largest=False).indices
    return neurons.mute_set(
        ids, torch.zeros(k), "mute", (0.0, 1.0), {"recipe": "attribution", "share": share}, 0
    )
