"""CAPACITY: how many texts can a share of the neurons make a model forget, and at what cost?

A model of the demo's size has learned the records of 480 customers by heart. 24, 96 or 240 of them are to be
forgotten; 240 others stay, all of them worded alike. Another one has learned 1,200, of which 960 are to be
forgotten. Beside the masks stand the methods that tune weights, each with the learning rate that did best on
seed 5 and in as many steps as the masks, and the model retrained without all 240.
"""

import copy
import dataclasses
import functools
import time

import torch

import neumuter
from bench.unlearning.methods import configure
from bench.unlearning.slopes import make_crowd
from bench.unlearning.synth import Setting
from neumuter.demo.model import Training
from neumuter.recipes import fit_mutes
from neumuter.recipes.schedule import count_steps
from neumuter.serving.live import mute
from neumuter.training.batches import PairedBatches
from neumuter.training.weights import tune_weights

# The method was chosen on seed 5; that KL's weight needs a lower limit was seen on 307. Nobody has tuned on
# the others.
SEEDS = (307, 311, 313)
ASKING, STAYING = 240, 240
COUNTS = (24, 96, 240)
SHARES = (0.01, 0.03, 0.1, 1.0)
# More than that, on the first seed alone.
MANY, MANY_SHARES = 960, (0.1, 1.0)
TRAINING = Training(steps=1500, batch_size=40, records_per_batch=32, lr=4e-3)
BATCH_SIZE, WINDOWS = 8, 32
# The log-odds that a secret may keep.
CEILING = -6.0
# Learning rates of the methods that tune weights.
RATES = {"npo": 3e-4, "simnpo": 3e-5, "difference": 3e-6}


class Crowd(Setting):
    """The model that knows all records, of which the first ``count`` are to be forgotten."""

    windows = WINDOWS

    def __init__(self, seed, count, full=None):
        asking = max(ASKING, count)
        records = make_crowd(seed, asking, STAYING)
        self.known = full
        # Each record is seen equally often, however many there are.
        steps = TRAINING.steps * (asking + STAYING) // (ASKING + STAYING)
        training = dataclasses.replace(TRAINING, steps=steps)
        super().__init__("gated, 0.9 M", seed, asking, records, training)
        self.forget = self.forget[:count]

    def train(self, records):
        """The model, trained once for all counts."""
        return self.known or super().train(records)


def cases(quick=False):
    """Yields a case for each seed, number of records, and method with its share of the neurons."""
    whole = functools.cache(lambda seed: Crowd(seed, ASKING))
    for seed in SEEDS[:1] if quick else SEEDS:
        for count in COUNTS[:1] if quick else COUNTS:
            setting = functools.cache(functools.partial(_begin, whole, seed, count))
            yield from _cases(setting, seed, count, SHARES[-1:] if quick else SHARES, () if quick else RATES)
    if not quick:
        setting = functools.cache(functools.partial(Crowd, SEEDS[0], MANY))
        yield from _cases(setting, SEEDS[0], MANY, MANY_SHARES, RATES)
    for seed in SEEDS[:1] if quick else SEEDS:
        found = functools.partial(_retrain, whole, seed)
        yield {"seed": seed, "forget": ASKING, "method": "retrained"}, found


def _begin(whole, seed, count):
    return Crowd(seed, count, whole(seed).full)


def _cases(setting, seed, count, shares, methods):
    about = {"seed": seed, "forget": count}
    yield about | {"method": "before"}, functools.partial(_look_at, setting)
    for share in shares:
        found = functools.partial(_mute, setting, share)
        yield about | {"method": "neumuter, modulate", "budget": share}, found
    for method in methods:
        yield about | {"method": method}, functools.partial(_tune, setting, method)


def _look_at(setting):
    return {"share": 0.0} | setting().measure(setting().full)


def _retrain(whole, seed):
    return {"share": 0.0} | whole(seed).measure(whole(seed).retrained())


def _tune(setting, method):
    return tune(setting(), method)


def _mute(setting, share):
    setting, start = setting(), time.perf_counter()
    with neumuter.attach(setting.full, start_layer=0) as masked:
        mutes = fit_mutes(make_pair(setting, masked, setting.forget), share, seed=setting.seed)
    seconds = time.perf_counter() - start
    row = {"share": mutes.share, "steps": mutes.method["gains"]["steps"], "seconds": seconds}
    with mute(setting.full, mutes):
        return row | setting.measure(setting.full)


def make_pair(setting, masked, records):
    """``records`` to forget, beside the texts to keep."""
    forget = setting.encode(records, "secret")
    # All tokens that count are secrets, which identify their record.
    ceilings = torch.full(forget["labels"].shape, CEILING)
    return PairedBatches(masked, forget, setting.neighbours("retain"), ceilings)


def tune(setting, method, lr=None):
    """The row of a method that tunes weights; ``lr``: another learning rate than that of ``RATES``."""
    start = time.perf_counter()
    model, steps = tune_model(setting, method, lr)
    seconds = time.perf_counter() - start
    return {"steps": steps, "seconds": seconds} | setting.measure(model)


def tune_model(setting, method, lr=None):
    """A model that a method has tuned, and in how many steps."""
    model = copy.deepcopy(setting.full).requires_grad_(True)
    steps = count_steps(len(setting.forget), None, BATCH_SIZE)
    config = configure(method, steps, BATCH_SIZE, lr or RATES[method])
    forget = setting.encode(setting.forget, "secret")
    tune_weights(model, forget, setting.neighbours("retain"), config, setting.seed)
    return model.requires_grad_(False), config.steps
