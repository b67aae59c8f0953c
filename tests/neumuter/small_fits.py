"""Small requests, on which every recipe runs in about a second."""

import dataclasses
import functools

import neumuter
from neumuter import recipes
from neumuter.training.batches import PairedBatches
from tests.neumuter.test_recipes import QUICK_GAINS, QUICK_GATES, QUICK_SUPPORT, ragged, samples

FORGET, KEEP = ragged(samples(1, 5, 9), 9, 4, 6, 9, 3), ragged(samples(2, 7, 11), 11, 5, 4, 8, 11, 6, 7)
GAINS = dataclasses.replace(QUICK_GAINS, steps=9, batch_size=2)
SUPPORT = dataclasses.replace(QUICK_SUPPORT, steps=7, batch_size=3)
GATES = dataclasses.replace(QUICK_GATES, epochs=3, batch_size=2, threshold=0.999)


def after_another(pair, tell=None, undo=False):
    """A second request after a first, whose slopes are known; or the first undone, without any text."""
    masked, config = pair.masked, recipes.FittedConfig(GAINS)
    first = recipes.mute_random(masked, 9, seed=5)
    known = [recipes.measure_slopes(PairedBatches(masked, samples(7, 2), KEEP), first)]
    if undo:
        pair = PairedBatches(masked, None, KEEP)
        return recipes.refit_gains(pair, first, [], known, GAINS, seed=3, callback=tell)
    return recipes.fit_mutes(pair, 9, config=config, seed=3, callback=tell, existing=first, former=known)


RECIPES = {
    "former": after_another,
    "undo": functools.partial(after_another, undo=True),
    "fitted": lambda pair, tell=None: recipes.fit_mutes(
        pair, 9, config=recipes.FittedConfig(GAINS), seed=3, callback=tell
    ),
    "support": lambda pair, tell=None: recipes.fit_mutes(
        pair, 9, "mute", recipes.FittedConfig(GAINS, SUPPORT), seed=3, callback=tell
    ),
    "paper": lambda pair, tell=None: recipes.train_gates(pair, GATES, 3, tell),
    "refined": lambda pair, tell=None: recipes.train_gates(
        pair, dataclasses.replace(GATES, refined=True), 3, tell
    ),
}


def run(model, recipe, tell=None):
    with neumuter.attach(model, start_layer=1) as masked:
        return recipe(PairedBatches(masked, FORGET, KEEP), tell)


def fitted_neurons(pair):
    return recipes.fitted.Neurons(pair.masked)
