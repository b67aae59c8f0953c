"""HUNDREDS: REAL at the size that people need, with ten times the people.

A pretrained model has learned 480 answers about 80 people by heart. 24, 96 or 240 of the answers are to be
forgotten; the 240 about the other half of the people stay.
"""

import dataclasses
import functools

from bench.unlearning import real
from bench.unlearning.methods import run
from bench.unlearning.pretrained import SMOLLM2
from neumuter.texts import join_batches

PEOPLE = 80  # half of them to forget, six questions each
# On the first seed it was seen that 16 texts of the model itself are too few, and the rate of many gains was
# chosen; on the other one, how many neurons hundreds of texts take by default.
SEEDS = (313, 317)
# By the number of answers to forget: 1 % of the neurons, 20 and 60 for each answer (of 240, ``unlearn`` takes
# 60 by default), and all.
SHARES = {240: (0.01, 0.1, 0.3, 1.0), 96: (0.01, 0.04), 24: (0.01,)}
# Texts of the model itself beside the answers to keep, of which ``unlearn`` takes 120.
FEW = 16
WEIGHTS = ("npo", "simnpo")
# The steps of the methods that tune weights.
STEPS = 160


class Hundreds(real.People):
    """The model that knows all answers, of which the first ``count`` are to be forgotten."""

    recipe = real.RECIPE | {"steps": STEPS}

    def __init__(self, seed, count):
        super().__init__(seed, count=PEOPLE)
        parts = self.forget, self.secrets, self.paraphrased
        self.forget, self.secrets, self.paraphrased = (
            {name: value[:count] for name, value in batch.items()} for batch in parts
        )


def cases(quick=False):
    """Yields a case for each number of answers and method, the largest number first."""
    for seed in SEEDS[: 1 if quick else None]:
        for count in [*SHARES][-1:] if quick else SHARES:
            setting = functools.cache(functools.partial(Hundreds, seed, count))
            about = {"model": SMOLLM2, "seed": seed, "forget": count}
            yield about | {"method": "before"}, functools.partial(_look_at, setting)
            for share in SHARES[count]:
                found = functools.partial(_fit, setting, share)
                yield about | {"method": real.OURS, "budget": share}, found
            for method in ("few samples", *WEIGHTS, "retrained") if count == max(SHARES) else ():
                yield about | {"method": method}, functools.partial(_compare, setting, method)


def _look_at(setting):
    return {"share": 0.0} | setting().measure(setting().full)


def _fit(setting, share):
    return run(setting().job(share), real.OURS)


def _compare(setting, method):
    if method == "retrained":
        return {"share": 0.0} | setting().measure(setting().retrained())
    if method == "few samples":
        kept = join_batches(setting().retain, setting().sample(FEW))
        return run(setting().make_job(0.1, kept), real.OURS) | {"method": method}
    return run(dataclasses.replace(setting().job(1.0), unseen=None), method)
