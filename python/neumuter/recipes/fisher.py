"""Which neurons hold the texts, from two backward passes: squared gradients there against those elsewhere."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from neumuter.models.modes import without_dropout
from neumuter.mutes.mute_set import MuteSet
from neumuter.training.batches import Pair
from neumuter.training.losses import odds_hinge
from neumuter.training.masked import Masked
from neumuter.training.neurons import Neurons

ROWS = 8  # samples per pass
MARGIN = 2.0  # nats: tokens whose log-odds are lower are forgotten already
DAMPING = 0.1  # of the mean Fisher information, so that neurons that nothing uses do not come first


def support_by_fisher(
    masked: Masked,
    pair: Pair,
    share: int | float,
    beside: MuteSet | None = None,
    times: float = 1.0,
    ratios: Tensor | None = None,
) -> MuteSet:
    """A MuteSet of mode "mute" that silences the ``share`` of neurons with the largest ratio g²/F.

    ``pair``: a :class:`Pair` of the same handle; ``share``: float share or int number. ``beside``: a MuteSet
    in force meanwhile, whose neurons are left alone. ``times``: as many neurons, or all that there are.
    ``ratios``: what ``neuron_ratios`` gave for the same pair and set beside, if it is known.
    Raises ValueError on a bad share.
    """
    neurons = Neurons(masked, beside)
    k = min(int(times * neurons.number(share)), int((~neurons.excluded).sum()))
    ratios = neuron_ratios(masked, pair, beside) if ratios is None else ratios
    method = {"recipe": "fisher", "share": share, "times": times, "damping": DAMPING, "margin": MARGIN}
    return neurons.mute_set(ratios.topk(k).indices, torch.zeros(k), "mute", (0.0, 1.0), method, 0)


def neuron_ratios(masked: Masked, pair: Pair, beside: MuteSet | None = None) -> Tensor:
    """g²/F of every neuron, float32 [neurons]; −∞ of those that may not be selected.

    g² is the mean over forget samples of the squared gradient of a sample's mean log-odds (see
    ``training.losses.odds_hinge``) with respect to its gates, at gates of 1; F that of the mean loss over the
    neighbours, their empirical Fisher information, which is the curvature of KL(reference ‖ masked) there: to
    first order g² is what a small change of a gate forgets, and F what it costs.
    """
    neurons = Neurons(masked, beside)
    forget = range(pair.forget_count)
    neighbours = range(pair.forget_count, pair.forget_count + pair.neighbour_count)
    gained = mean_square_gradients(masked, pair, neurons, forget, lambda losses: odds_hinge(losses, MARGIN))
    lost = mean_square_gradients(masked, pair, neurons, neighbours, torch.mean)
    ratios = gained / (lost + DAMPING * lost.mean())
    ratios[neurons.excluded] = -torch.inf
    return ratios


def mean_square_gradients(
    masked: Masked,
    pair: Pair,
    neurons: Neurons,
    sample_ids: Sequence[int],
    function: Callable[[Tensor], Tensor],
) -> Tensor:
    """The mean over samples of the squared gradient of ``function`` of a sample's losses, float32 [neurons].

    ``function``: of the losses in nats of a sample's counted tokens, float32 [N], a scalar.

    Every sample has a mask row of its own, so one backward pass gives the gradients of all samples apart.
    """
    total = torch.zeros(neurons.count, device=neurons.device)
    with without_dropout(masked.model):
        for start in range(0, len(sample_ids), ROWS):
            ids = sample_ids[start : start + ROWS]
            mask = neurons.start.repeat(len(ids), 1).requires_grad_()
            by_layer = mask.split(list(neurons.widths.values()), 1)
            with masked.applying(dict(zip(neurons.widths, by_layer, strict=True))):
                loss = torch.stack([function(losses) for losses in pair.sample_losses(ids)]).sum()
            (gradient,) = torch.autograd.grad(loss, mask)
            total += gradient.square().sum(0)
    return total / len(sample_ids)
