"""Which neurons hold the texts, from two backward passes: squared gradients there against those elsewhere."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from neumuter.models.devices import move
from neumuter.models.modes import without_dropout
from neumuter.mutes.mute_set import MuteSet
from neumuter.training.batches import SAMPLES_PER_PASS, PairedBatches, check_pair
from neumuter.training.journal import Journal
from neumuter.training.losses import hinge_runs
from neumuter.training.neurons import Neurons
from neumuter.training.processes import agree

# Retain samples that F is measured on: a random sample where there are more.
MEASURED_RETAIN = 512
# Where nothing else is known of it, a run whose log-odds lie so many nats below 0 is forgotten already.
MARGIN = 3.0
# This share of the mean Fisher information is added, so that neurons that nothing uses do not come first.
DAMPING = 0.1


def propose_by_fisher(
    pair: PairedBatches,
    budget: int | float,
    existing: MuteSet | None = None,
    times: float = 1.0,
    ratios: Tensor | None = None,
) -> MuteSet:
    """Select the ``budget`` of neurons with the largest ratio g²/F.

    Args:
        budget: a share of the masked neurons (float in (0, 1]) or their number (int).
        existing: a mute set that is in force meanwhile; its neurons are left alone.
        times: multiplies the budget, up to all neurons that may be selected.
        ratios: what ``rank_by_fisher`` gave for the same pair and existing set, if it is known.

    Returns:
        A MuteSet of mode "mute" with gains of 0.

    Raises:
        ValueError: a bad budget.
    """
    check_pair(pair, budget=budget, times=times, existing=existing)
    neurons = Neurons(pair.masked, existing)
    k = min(int(times * neurons.count_of(budget)), int((~neurons.excluded).sum()))
    ratios = rank_by_fisher(pair, existing) if ratios is None else ratios.to(neurons.device)
    method = {"recipe": "fisher", "budget": budget, "times": times, "damping": DAMPING, "margin": MARGIN}
    return neurons.mute_set(ratios.topk(k).indices, torch.zeros(k), "mute", (0.0, 1.0), method, 0)


def rank_by_fisher(
    pair: PairedBatches, existing: MuteSet | None = None, journal: Journal | None = None
) -> Tensor:
    """Compute g²/F of every neuron.

    g² is the mean over forget samples of the squared gradient of a sample's log-odds (see
    ``hinge_runs``) with respect to its gates, at gates of 1. F is the same of the mean loss over the retain
    samples, at most ``MEASURED_RETAIN`` of them: their empirical Fisher information, which is the curvature
    of KL(reference ‖ masked) there. To first order g² is what a small change of a gate forgets, and F what
    it costs.

    Args:
        existing: a mute set that is in force meanwhile.
        journal: see ``fit_mutes``.

    Returns:
        float32 [neurons]; −∞ for neurons that may not be selected.
    """
    check_pair(pair, existing=existing)
    neurons = Neurons(pair.masked, existing)
    forget = range(pair.forget_count)
    order = torch.randperm(pair.retain_count, generator=torch.Generator().manual_seed(0))
    retain = (order[:MEASURED_RETAIN].sort().values + pair.forget_count).tolist()

    def known(losses: Tensor, sample: int) -> Tensor:
        of_sample = pair.ceilings_of(sample), pair.runs_of(sample)
        ceilings, runs = (move(part, losses.device) for part in of_sample)
        return hinge_runs(losses, ceilings, runs, MARGIN).mean()

    find = functools.partial(_mean_square_gradients, pair, neurons, journal or Journal())
    gained = find("gained", forget, known)
    lost = find("lost", retain, lambda losses, _: losses.mean())
    ratios = gained / (lost + DAMPING * lost.mean())
    ratios[neurons.excluded] = -torch.inf
    return agree(ratios)


def _mean_square_gradients(
    pair: PairedBatches,
    neurons: Neurons,
    journal: Journal,
    name: str,
    sample_ids: Sequence[int],
    function: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """The mean over samples of the squared gradient of ``function``, float32 [neurons].

    ``function`` maps the losses of a sample's counted tokens, float32 [N] in nats, and its id to a scalar.
    Every sample has a mask row of its own, so one backward pass gives the gradients of all samples apart.
    """

    def sum_squares(ids: Sequence[int]) -> Tensor:
        mask = neurons.start.repeat(len(ids), 1).requires_grad_()
        by_layer = mask.split(list(neurons.widths.values()), 1)
        with pair.masked.applying(dict(zip(neurons.widths, by_layer, strict=True))):
            found = zip(pair.sample_losses(ids), ids, strict=True)
            loss = torch.stack([function(losses, i) for losses, i in found]).sum()
            (gradient,) = torch.autograd.grad(loss, mask)
        return gradient.square().sum(0)

    processes, pieces = pair.processes, pair.pieces

    def add_up(ids: Sequence[int]) -> Tensor:
        if processes is None:
            return functools.reduce(torch.add, pieces.run(sum_squares, ids))
        # Processes that share samples have to run equally many passes: each part is one.
        size = max(1, SAMPLES_PER_PASS >> pieces.halvings)
        parts, own = processes.share([ids[start : start + size] for start in range(0, len(ids), size)])
        found = [functools.reduce(torch.add, pieces.run(sum_squares, part)) for part in parts]
        return processes.sum([sum(found[:own], torch.zeros(neurons.count, device=neurons.device))])[0]

    at_once = SAMPLES_PER_PASS * (processes.count if processes else 1)
    start = torch.zeros(neurons.count, device=neurons.device)
    with without_dropout(pair.masked.model):
        return journal.sum(name, sample_ids, at_once, add_up, start) / len(sample_ids)
