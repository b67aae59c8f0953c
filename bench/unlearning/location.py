"""LOCATION: does it matter which neurons are touched? Neurons at random, with fitted gains.

Two questions of critics of localised unlearning. Would any neurons do, if only their gains are fitted? And
does the method need gains below 0 or above 1, which make neurons work against the texts? The models and their
texts are those of CALIBRATED.
"""

import functools

from bench.unlearning.calibrated import Asked, Worded
from bench.unlearning.methods import CONTROLS, run
from bench.unlearning.pretrained import SMOLLM2

SETTINGS = {"gated, 0.9 M": Worded, SMOLLM2: Asked}
METHODS = ("neumuter, modulate", *CONTROLS)


def cases(quick=False):
    """Yields a case for each model, seed and method."""
    for model, kind in [*SETTINGS.items()][: 1 if quick else None]:
        for seed in kind.seeds[: 1 if quick else None]:
            setting = functools.cache(functools.partial(kind, seed))
            yield from _cases({"model": model, "seed": seed}, setting, METHODS[2:] if quick else METHODS)


def _cases(about, setting, methods):
    yield about | {"method": "before"}, lambda: {"share": 0.0} | setting().measure(setting().full)
    for method in methods:
        yield about | {"method": method}, lambda method=method: run(setting().job(setting().share), method)
