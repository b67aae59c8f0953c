"""A fit of gains as ``fit_mutes`` makes it, whose hinge and gradient an experiment can change."""

import math

import torch

from neumuter.training.losses import hinge_runs, weigh_harm
from neumuter.training.neurons import Neurons


def find_left(pair, losses, sample, margin):
    """What ``hinge_runs`` gives for a forget sample, whose tokens have these losses, [N]."""
    ceilings, runs = (part.to(losses.device) for part in (pair.ceilings_of(sample), pair.runs_of(sample)))
    return hinge_runs(losses, ceilings, runs, margin)


class Fit:
    """Gains of the neurons that are proposed, of which those stay that moved most.

    A subclass can change what is ``left`` of a sample, or the ``hinge`` of all. ``config``: a ``GainsConfig``
    with its number of steps. KL has the same target for every number of neurons.
    """

    def __init__(self, pair, config, seed):
        self.pair, self.config, self.seed = pair, config, seed
        self.neurons = Neurons(pair.masked)

    def hinge(self, losses, ids):
        """The mean of what is left of the forget samples among ``ids``, given their token losses."""
        ids = [i for i in ids if i < self.pair.forget_count]
        parts = losses.split([self.pair.count_tokens([i])[0] for i in ids])
        return torch.cat([self.left(part, i) for part, i in zip(parts, ids, strict=True)]).mean()

    def left(self, losses, sample):
        """What is left to forget of the tokens of a sample, [N]."""
        return find_left(self.pair, losses, sample, self.config.margin)

    def attack(self, gains, ids):
        """Add to the gradient of ``gains`` what else is to count in a step with the samples ``ids``."""

    def find(self, proposed, count, recipe):
        """``count`` of the neurons of the mute set ``proposed``; ``recipe``: what the set says it is from."""
        config, neurons = self.config, self.neurons
        self.support, gains = neurons.ids(proposed), torch.ones(proposed.count, device=neurons.device)
        choosing = round(config.choosing * config.steps)
        self.eta, source = config.kl_weight, self.pair.steps(config.batch_size, self.seed)
        gains = self._train(gains, choosing, source)
        chosen = (gains - 1).abs().topk(count).indices
        self.support = self.support[chosen]
        gains = self._train(gains[chosen], config.steps - choosing, source)
        about = {"recipe": recipe}
        return neurons.mute_set(self.support, gains, "modulate", config.gain_range, about, self.seed)

    def _train(self, gains, steps, source):
        config, gains = self.config, gains.clone().requires_grad_()
        adam = torch.optim.Adam([gains], config.lr, config.betas)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        for _ in range(steps):
            ids = next(source)
            with self.applying(gains):
                losses, divergences = self.pair.token_losses(ids)
            adam.zero_grad()
            (self.hinge(losses, ids) + self.eta * weigh_harm(divergences).mean()).backward()
            self.attack(gains, ids)
            adam.step()
            decay.step()
            with torch.no_grad():
                gains.clamp_(*config.gain_range)
            excess = min(max(divergences.mean().item() / config.kl_target - 1, -1), 1)
            low, high = config.kl_weight_range
            self.eta = min(max(self.eta * math.exp(config.kl_weight_rate * excess), low), high)
        return gains.detach()

    def applying(self, gains):
        mask = self.neurons.start.index_put((self.support,), gains)
        return self.pair.masked.applying(self.neurons.by_layer(mask))
