"""LOCATION: does it matter which neurons are touched? SYNTH with neurons at random, and fitted gains.

Two questions of critics of localised unlearning. Would any neurons do, if only their gains are fitted? And
does the method need gains below 0 or above 1, which make neurons work against the texts?
"""

import functools

import torch

import neumuter
from bench.unlearning.synth import RECIPE, Setting
from neumuter import recipes
from neumuter.serving.live import mute
from neumuter.training.batches import PairedBatches
from neumuter.training.neurons import Neurons

# Nobody has tuned anything on these.
SEEDS = (211, 223, 227)
SHARE = 0.05
GAINS = recipes.GainsConfig(steps=RECIPE["steps"], batch_size=RECIPE["batch_size"])
CLAMPED = recipes.GainsConfig(steps=RECIPE["steps"], batch_size=RECIPE["batch_size"], gain_range=(0.0, 1.0))


def _at_random(pair, seed, times):
    """Gains of neurons at random: ``times`` the budget of them, of which the budget stays that moved most."""
    neurons = Neurons(pair.masked)
    count = neurons.count_of(SHARE)
    drawn = torch.randperm(neurons.count, generator=torch.Generator().manual_seed(seed))[: times * count]
    mutes = neurons.mute_set(drawn, torch.zeros(len(drawn)), "mute", (0.0, 1.0), {"recipe": "random"}, seed)
    return recipes.fit_gains(pair, mutes, GAINS, seed, keep=count)


METHODS = {
    "ours": lambda pair, seed: recipes.fit_mutes(pair, SHARE, config=recipes.FittedConfig(GAINS), seed=seed),
    "ours, gains from 0 to 1": lambda pair, seed: recipes.fit_mutes(
        pair, SHARE, config=recipes.FittedConfig(CLAMPED), seed=seed
    ),
    "random neurons, fitted": lambda pair, seed: _at_random(pair, seed, 1),
    "random candidates, fitted": lambda pair, seed: _at_random(pair, seed, 3),
}


def cases(quick=False):
    """Yields a case for each seed and method."""
    for seed in SEEDS[:1] if quick else SEEDS:
        yield from _cases(seed, list(METHODS)[2:3] if quick else METHODS)


def _cases(seed, methods):
    setting = functools.cache(lambda: Setting("gated, 0.9 M", seed))
    before = {"seed": seed, "method": "before"}
    yield before, lambda: {"share": 0.0} | setting().measure(setting().full)
    for method in methods:
        about = {"seed": seed, "method": method}
        yield about, lambda method=method: _measure(setting(), _find(setting(), method))


def _find(setting, method):
    with neumuter.attach(setting.full, start_layer=0) as masked:
        pair = PairedBatches(masked, setting.encode(setting.forget, "secret"), setting.neighbours("retain"))
        return METHODS[method](pair, setting.seed)


def _measure(setting, mutes):
    gains = torch.cat([layer.gains for layer in mutes.layers.values()])
    with mute(setting.full, mutes):
        found = setting.measure(setting.full)
    outside = ((gains < 0) | (gains > 1)).double().mean().item()
    return {"share": mutes.share, "outside": outside} | found
