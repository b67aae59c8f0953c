"""RELEARNED: what comes back of forgotten records when half of them are learned again?

SYNTH's first model after each method is trained on a random half of the forgotten records and asked for the
other half. Beside our default stand fits that are meant to prevent it. Three of them have the hinge counted
once more after an attack: where the down projections have learned half of the step's records, or where gains
or down projections have moved to the worst place near by. *Deep* fits have more neurons and a wider margin.
Constants were chosen on seeds 5 and 6.
"""

import copy
import dataclasses
import functools
import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F

import neumuter
from bench.unlearning.fitting import Fit
from bench.unlearning.methods import MASKS, WEIGHTS, tune
from bench.unlearning.synth import RECIPE, Setting
from neumuter import evaluation, recipes
from neumuter.evaluation.robustness import robustness
from neumuter.recipes.fisher import rank_by_fisher
from neumuter.serving.fold import fold
from neumuter.training.batches import PairedBatches
from neumuter.training.neurons import Neurons
from neumuter.training.weights import WeightsConfig

# Nobody has tuned anything on these.
SEEDS = (307, 311, 313)
SHARE = 0.05
# At 3e-4 and more, training on one half soon destroys the memory of the other half, too.
ATTACK = WeightsConfig(method="relearn", steps=100, batch_size=6, lr=1e-4)
STEPS = (10, 30, 100)
# The steps of a fit in which an attack takes part, and what a deep one has.
FIT_STEPS, DEEP_SHARE, DEEP_MARGIN = 100, 0.3, 5.0
# How far away the worst place is: root mean square of gains, and of weights as a share of their norm.
GAINS_RADIUS, WEIGHTS_RADIUS, DEEP_RADIUS = 0.1, 0.01, 0.02
# Of Adam, which relearns in the loop.
INNER_STEPS, INNER_LR = 3, 1e-3
# Weight methods at a tenth of SYNTH's learning rate.
GENTLE, GENTLE_LR = {"npo, gentle": "npo", "simnpo, gentle": "simnpo"}, 1e-4


def cases(quick=False):
    """Yields a case for each seed and method."""
    for seed in SEEDS[:1] if quick else SEEDS:
        setting = functools.cache(lambda seed=seed: Setting("gated, 0.9 M", seed))
        for method in ("before", "first layer", "in the loop") if quick else METHODS:
            about = {"seed": seed, "method": method}
            yield about, lambda method=method, setting=setting: measure(setting(), make(setting(), method))


def make(setting, method):
    """The model after ``method``."""
    job = setting.job(SHARE)
    if method == "retrained":
        return setting.retrained()
    if method in GENTLE:
        gentle = dataclasses.replace(job, recipe=job.recipe | {"lr": GENTLE_LR})
        return tune(gentle, GENTLE[method]).requires_grad_(False)
    if method in WEIGHTS:
        return tune(job, method).requires_grad_(False)
    model = copy.deepcopy(setting.full)
    if method in MASKS:
        fold(model, MASKS[method](job))
    elif method in FITS:
        with neumuter.attach(setting.full, start_layer=0) as masked:
            mutes = FITS[method](PairedBatches(masked, job.forget, job.retain), setting.seed)
        fold(model, mutes)
    return model


def measure(setting, model):
    """What is left, and what comes back of the half that is asked for."""
    batch = setting.encode(setting.forget, "continuation") | {"texts": torch.arange(len(setting.forget))}

    def ask(model, asked):
        records = [setting.forget[i] for i in asked["texts"]]
        secrets = setting.encode(records, "secret")
        return {
            "extraction": evaluation.extraction_rate(model, setting.encode(records, "continuation")),
            "secrets": evaluation.secret_extraction(model, secrets),
            "ma": evaluation.memorization_accuracy(model, secrets),
        }

    states = robustness(model, None, [batch], ask, ATTACK, STEPS, seed=setting.seed)
    return setting.measure(model) | {
        f"{state} {name}": value
        for state in ("half", *(f"relearned {steps}" for steps in STEPS))
        for name, value in states[state].items()
    }


def _ours(share=SHARE, layers=None, **constants):
    """A fit of ``fit_mutes``; ``layers``: the number of layers, from the first one on, that have neurons."""

    def find(pair, seed):
        ratios = rank_by_fisher(pair)
        for part in list(Neurons(pair.masked).by_layer(ratios).values())[layers:] if layers else ():
            part.fill_(-torch.inf)
        config = recipes.FittedConfig(_constants(**constants))
        return recipes.fit_mutes(pair, share, config=config, seed=seed, ratios=ratios)

    return find


def _constants(**others):
    return recipes.GainsConfig(**{key: RECIPE[key] for key in ("steps", "batch_size")} | others)


class Attacked(Fit):
    """A fit to whose gradient ``add(fit, gains, ids)`` adds, given the forget samples of a step."""

    def __init__(self, pair, config, seed, add):
        super().__init__(pair, config, seed)
        self.add = add
        self.downs = [ffn.down_parameter for ffn in pair.masked.ffns]
        self.draws = torch.Generator().manual_seed(seed)

    def attack(self, gains, ids):
        self.add(self, gains, [i for i in ids if i < self.pair.forget_count])

    def losses(self, gains, ids):
        """Of the tokens of forget samples, [N]."""
        with self.applying(gains):
            return torch.cat(list(self.pair.sample_losses(ids)))

    def known(self, gains, ids):
        """The hinge of forget samples."""
        return self.hinge(self.losses(gains, ids), ids)

    def find_slopes(self, loss):
        """The gradients of ``loss()`` with respect to the weights of the down projections."""
        for weight in self.downs:
            weight.requires_grad_(True)
        slopes = torch.autograd.grad(loss(), self.downs)
        for weight in self.downs:
            weight.requires_grad_(False)
        return slopes

    @contextmanager
    def moving(self):
        """Put the weights of the down projections back at the end."""
        originals = [weight.clone() for weight in self.downs]
        yield
        with torch.no_grad():
            for weight, original in zip(self.downs, originals, strict=True):
                weight.copy_(original)


def _relearn(fit, gains, ids):
    """The hinge of half of the records, once the down projections have learned the others."""
    order = torch.randperm(len(ids), generator=fit.draws)
    learned, asked = ([ids[i] for i in half] for half in order.tensor_split(2))
    with fit.moving():
        adam = torch.optim.Adam(fit.downs, INNER_LR)
        for _ in range(INNER_STEPS):
            slopes = fit.find_slopes(lambda: fit.losses(gains.detach(), learned).mean())
            for weight, slope in zip(fit.downs, slopes, strict=True):
                weight.grad = slope
            adam.step()
        for weight in fit.downs:
            weight.grad = None
        fit.known(gains, asked).backward()


def _move_gains(fit, gains, ids):
    """The hinge at the worst gains near by."""
    near = gains.detach().requires_grad_()
    (slope,) = torch.autograd.grad(fit.known(near, ids), near)
    fit.known(gains + GAINS_RADIUS * math.sqrt(len(gains)) * F.normalize(slope, dim=0), ids).backward()


def _move_weights(fit, gains, ids, radius=WEIGHTS_RADIUS):
    """The hinge at the worst down projections near by."""
    slopes = fit.find_slopes(lambda: fit.known(gains.detach(), ids))
    steepness, size = (torch.cat([part.flatten() for part in parts]).norm() for parts in (slopes, fit.downs))
    with fit.moving():
        with torch.no_grad():
            for weight, slope in zip(fit.downs, slopes, strict=True):
                weight += radius * size * slope / steepness.clamp(min=1e-12)
        fit.known(gains, ids).backward()


def _attacked(add, share=SHARE, **constants):
    def find(pair, seed):
        config = _constants(steps=FIT_STEPS, **constants)
        fit = Attacked(pair, config, seed, add)
        proposed = recipes.propose_by_fisher(pair, share, times=config.candidates)
        return fit.find(proposed, fit.neurons.count_of(share), "relearned")

    return find


_move_far = functools.partial(_move_weights, radius=DEEP_RADIUS)
FITS = {
    "gains 0 to 1": _ours(gain_range=(0.0, 1.0)),
    "first layer": _ours(layers=1),
    "more steps": _ours(steps=FIT_STEPS),
    "in the loop": _attacked(_relearn),
    "sharp gains": _attacked(_move_gains),
    "sharp weights": _attacked(_move_weights),
    "wide margin": _ours(steps=FIT_STEPS, margin=DEEP_MARGIN),
    "more neurons": _ours(DEEP_SHARE, steps=FIT_STEPS),
    "deep": _ours(DEEP_SHARE, steps=FIT_STEPS, margin=DEEP_MARGIN),
    "deep, gains 0 to 1": _ours(DEEP_SHARE, steps=FIT_STEPS, margin=DEEP_MARGIN, gain_range=(0.0, 1.0)),
    "deep, in the loop": _attacked(_relearn, DEEP_SHARE, margin=DEEP_MARGIN),
    "deep, sharp weights": _attacked(_move_far, DEEP_SHARE, margin=DEEP_MARGIN),
}
METHODS = ("before", "retrained", "neumuter, modulate", *FITS, "npo", "simnpo", *GENTLE)
