"""LOCATION: does it matter which neurons are touched? SYNTH with neurons at random, and fitted gains.

Two questions of critics of localised unlearning. Would any neurons do, if only their gains are fitted? And do
gains below 0 or above 1 hide the texts behind neurons that work against them, so that they come back sooner?
"""

import functools

import torch

import neumuter
from bench.unlearning.synth import RECIPE, Setting
from neumuter import evaluation, recipes
from neumuter.evaluation.robustness import robustness
from neumuter.serving.live import mute
from neumuter.training.batches import PairedBatches
from neumuter.training.neurons import Neurons
from neumuter.training.weights import WeightsConfig

# Nobody has tuned anything on these.
SEEDS = (211, 223, 227)
SHARE = 0.05
GAINS = recipes.GainsConfig(steps=RECIPE["steps"], batch_size=RECIPE["batch_size"])
CLAMPED = recipes.GainsConfig(steps=RECIPE["steps"], batch_size=RECIPE["batch_size"], gain_range=(0.0, 1.0))
RELEARNING = WeightsConfig(method="relearn", steps=30, batch_size=6, lr=1e-3)
RELEARNED = (3, 10, 30)
STATES = ("half", *(f"relearned {steps}" for steps in RELEARNED))


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
    """Yields a case for each seed, method and state of the model."""
    for seed in SEEDS[:1] if quick else SEEDS:
        yield from _cases(seed, list(METHODS)[2:3] if quick else METHODS)


def _cases(seed, methods):
    setting = functools.cache(lambda: Setting("gated, 0.9 M", seed))
    yield (
        {"seed": seed, "method": "before", "state": "muted"},
        lambda: {"share": 0.0} | setting().measure(setting().full),
    )
    for method in methods:
        found = functools.cache(lambda method=method: _find(setting(), method))
        yield (
            {"seed": seed, "method": method, "state": "muted"},
            lambda found=found: _measure(setting(), found()),
        )
        states = functools.cache(lambda found=found: _relearn(setting(), found()))
        for state in STATES:
            yield (
                {"seed": seed, "method": method, "state": state},
                lambda states=states, state=state: states()[state],
            )


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


def _relearn(setting, mutes):
    def measure(model, asked):
        return {"forget_extraction": evaluation.extraction_rate(model, asked)}

    batch = setting.encode(setting.forget, "continuation")
    return robustness(setting.full, mutes, batch, measure, RELEARNING, RELEARNED, setting.seed)
