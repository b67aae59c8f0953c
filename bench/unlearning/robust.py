"""ROBUST: what comes back of REAL's answers after quantisation, and after learning half of them again.

Beside ours stand the model that never saw them, from which nothing can come back, and NPO.
"""

import copy
import functools

import torch

from bench.unlearning.methods import MASKS
from bench.unlearning.real import OURS, SEEDS, People
from neumuter.evaluation.robustness import robustness
from neumuter.training.weights import WeightsConfig, tune_weights

STATES = ("int8", "int4", "half", "relearned 10", "relearned 30", "relearned 100")
METHODS = (OURS, "retrained", "npo")


def cases(quick=False):
    """Yields a case per method, seed and state."""
    for method in METHODS[:1] if quick else METHODS:
        for seed in SEEDS[:1] if quick else SEEDS:
            yield from _cases(method, seed)


def _cases(method, seed):
    found = functools.cache(lambda: _states(method, People(seed)))
    for state in STATES:
        yield {"seed": seed, "method": method, "state": state}, lambda state=state: found()[state]


def _states(method, setting):
    model, mutes, job = setting.full, None, setting.job(0.01)
    if method == "retrained":
        model = setting.retrained()
    elif method == "npo":
        model = copy.deepcopy(model).float().requires_grad_(True)
        config = WeightsConfig(
            method="npo", steps=job.recipe["steps"], batch_size=job.recipe["batch_size"], lr=job.recipe["lr"]
        )
        tune_weights(model, job.forget, job.retain, config, setting.seed)
        model = model.to(torch.bfloat16)
    else:
        mutes = MASKS[method](job)
    return robustness(model, mutes, setting.forget, setting.measure, seed=setting.seed)
