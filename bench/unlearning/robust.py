"""ROBUST: what comes back of REAL's answers after quantisation, and after learning half of them again.

Beside ours stands the model that never saw them, from which nothing can come back.
"""

import functools

from bench.unlearning.methods import MASKS
from bench.unlearning.real import OURS, SEEDS, People
from neumuter.evaluation.robustness import robustness

STATES = ("int8", "int4", "half", "relearned 10", "relearned 30", "relearned 100")
METHODS = (OURS, "retrained")


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
    if method == "retrained":
        model, mutes = setting.retrained(), None
    else:
        model, mutes = setting.full, MASKS[method](setting.job(0.01))
    return robustness(model, mutes, [setting.forget], setting.measure, seed=setting.seed)
