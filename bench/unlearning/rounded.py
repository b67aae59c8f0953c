"""ROUNDED: does a model that forgot remember when its weights are rounded to few bits?

SYNTH's first model after each method, with its linear weights rounded as five formats round them; beside it
the original and the model retrained without the records, rounded alike. The output layer stays as it is.
"""

import copy
import functools

import torch

from bench.unlearning.methods import MASKS, tune
from bench.unlearning.synth import Setting
from neumuter.evaluation.robustness import quantise
from neumuter.serving.fold import fold

# Nobody has tuned anything on these.
SEEDS = (307, 311, 313)
SHARE = 0.05
OURS = "neumuter, modulate"
METHODS = ("before", "retrained", OURS, "npo", "simnpo", "difference")


def _by_gguf(kind):
    def rounded(weight):
        import gguf

        kinds = gguf.GGMLQuantizationType[kind]
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kinds), kinds))

    return rounded


def _by_nf4(weight):
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
    return functional.dequantize_4bit(packed, state)


def _each(rounded):
    """Round every linear weight of a model by ``rounded``, but that of the output layer."""

    def round_all(model):
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
                module.weight.data = rounded(module.weight.data).view_as(module.weight)
        return model

    return round_all


FORMATS = {
    "none": lambda model: model,
    "int8": lambda model: quantise(model, 8),
    "q8_0": _each(_by_gguf("Q8_0")),
    "int4": lambda model: quantise(model, 4),
    "nf4": _each(_by_nf4),
    "q4_0": _each(_by_gguf("Q4_0")),
}


def cases(quick=False):
    """Yields a case for each seed, method and format."""
    for seed in SEEDS[:1] if quick else SEEDS:
        setting = functools.cache(lambda seed=seed: Setting("gated, 0.9 M", seed))
        for method in METHODS[2:3] if quick else METHODS:
            made = functools.cache(lambda method=method, setting=setting: make(setting(), method))
            for name in ("none", "int4") if quick else FORMATS:
                about = {"seed": seed, "method": method, "format": name}
                yield about, functools.partial(_measure, setting, made, name)


def _measure(setting, made, name):
    return setting().measure(FORMATS[name](copy.deepcopy(made())))


def make(setting, method):
    """The model after ``method``."""
    if method == "retrained":
        return setting.retrained()
    job = setting.job(SHARE)
    if method not in ("before", OURS):
        return tune(job, method).requires_grad_(False)
    model = copy.deepcopy(setting.full)
    if method == OURS:
        fold(model, MASKS[method](job))
    return model
