"""ROUNDED: does a model that forgot remember when its weights are rounded to few bits?

CALIBRATED's models after each method, with their linear weights rounded as five formats round them; beside
them the original and the model retrained without the texts, rounded alike. The output layer stays as it is.
Gains are folded into the weights before these are rounded; or the original is rounded, and they follow; or
they are found on the rounded model itself.
"""

import copy
import dataclasses
import functools

import torch

from bench.unlearning.calibrated import Asked, Worded
from bench.unlearning.methods import WEIGHTS, find_unseen, fit, tune
from bench.unlearning.others import others_rate
from bench.unlearning.pretrained import SMOLLM2
from neumuter import evaluation
from neumuter.evaluation.language import losses_by_sample
from neumuter.evaluation.robustness import quantise
from neumuter.models.families import find_ffns
from neumuter.serving.fold import fold
from neumuter.training.losses import log_odds
from neumuter.training.masked import attach

SETTINGS = {"gated, 0.9 M": Worded, SMOLLM2: Asked}
METHODS = ("before", "retrained", "calibrated", "live", "npo", "simnpo", "difference")


def _by_gguf(kind):
    def rounded(weight):
        import gguf

        kinds = gguf.GGMLQuantizationType[kind]
        packed = gguf.quants.quantize(weight.float().numpy(), kinds)
        return torch.from_numpy(gguf.quants.dequantize(packed, kinds))

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
                module.weight.data.copy_(rounded(module.weight.data).view_as(module.weight))
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
# Formats of the models on which gains are found.
FITTED = ("q4_0",)


def cases(quick=False):
    """Yields a case for each model, seed, method and format."""
    for model, kind in [*SETTINGS.items()][: 1 if quick else None]:
        for seed in kind.seeds[: 1 if quick else None]:
            setting = functools.cache(functools.partial(kind, seed))
            yield from _cases({"model": model, "seed": seed}, setting, quick)


def _cases(about, setting, quick):
    for method in METHODS[2:4] if quick else METHODS:
        made = functools.cache(lambda method=method: make(setting(), method))
        for name in ("none", "int4") if quick else FORMATS:
            yield (
                about | {"method": method, "format": name},
                lambda made=made, name=name: measure(setting(), FORMATS[name], *made()),
            )
    for name in FITTED:
        yield (
            about | {"method": "fitted", "format": name},
            lambda name=name: measure(setting(), FORMATS["none"], *fit_rounded(setting(), name)),
        )


def make(setting, method):
    """The model after ``method``, and the mute set to apply to it once it is rounded, or None."""
    if method == "retrained":
        return setting.retrained(), None
    if method in WEIGHTS:
        tuned = tune(setting.job(setting.share), method)
        return tuned.to(setting.full.dtype).requires_grad_(False), None
    if method == "live":
        return setting.full, setting.find_mutes("calibrated")
    model = copy.deepcopy(setting.full)
    if method == "calibrated":
        fold(model, setting.find_mutes(method))
    return model, None


def fit_rounded(setting, name):
    """The rounded model, and the mute set that is found on it."""
    model, job = FORMATS[name](copy.deepcopy(setting.full)), setting.job(setting.share)
    given = (setting.tokenizer, job.forget, job.retain, setting.seed)
    job = dataclasses.replace(job, model=model, unseen=lambda: find_unseen(model, *given))
    with attach(model, start_layer=0) as masked:
        return model, fit(job, masked)


def measure(setting, rounded, model, mutes):
    """What is left, and what stays, once ``rounded`` has rounded a copy of the model."""
    model = rounded(copy.deepcopy(model))
    for ffn in find_ffns(model) if mutes else ():
        _multiply(ffn, mutes.layers.get(ffn.path))
    return {
        "forget_extraction": evaluation.extraction_rate(model, setting.batch),
        "forget_secrets": evaluation.secret_extraction(model, setting.secrets),
        "others": others_rate(model, setting.tokenizer, setting.batch, setting.retain),
        "retain_extraction": evaluation.extraction_rate(model, setting.retain),
        "retain_least": _find_least(model, setting.retain),
        "heldout_perplexity": evaluation.perplexity(model, setting.heldout),
    }


def _find_least(model, batch):
    """Of each text the log-odds of its least likely token, which decides whether it comes out; the median."""
    least = [log_odds(losses).min() for losses in losses_by_sample(model, batch)]
    return torch.stack(least).median().item()


def _multiply(ffn, layer):
    """Multiply neurons by their gains, which ``neumuter.mute`` refuses on weights rounded this far."""
    if layer is None:
        return
    gains = torch.ones(ffn.width)
    gains[layer.indices.long()] = layer.gains
    ffn.down.register_forward_pre_hook(lambda _, given: (given[0] * gains.to(given[0]),))
