"""What is compared: one function per method, each leaves a model to be measured and says what it touched."""

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

import neumuter
from bench.unlearning.memory import PeakMemory
from neumuter import recipes
from neumuter.serving.live import mute
from neumuter.training.batches import PairedBatches
from neumuter.training.masked import NothingSelectedError
from neumuter.training.weights import WeightsConfig, tune_weights


@dataclass(frozen=True)
class Job:
    """A model that knows texts, and what is to be forgotten.

    ``model``: never changed. ``forget``, ``retain``: batches as ``neumuter.types.Batch`` says.
    ``measure(model)``: a dict of metrics. ``recipe``: {"share", "batch_size", "steps", "lr", "paper_epochs"},
    the budget of neurons, the texts of each kind per step, the steps of every trained method but the paper's
    own recipe, its epochs of batch 1, and the weight methods' learning rate.
    """

    model: torch.nn.Module
    forget: dict
    retain: dict
    measure: Callable
    recipe: dict
    seed: int


def run(job, method):
    """The row of one method: its metrics, share of touched neurons, seconds and peak memory, MiB."""
    with PeakMemory() as memory:
        start = time.perf_counter()
        if method in MASKS:
            mutes = MASKS[method](job)
        elif method in WEIGHTS:
            model = tune(job, method)
        else:
            raise ValueError(f"method must be one of {', '.join([*MASKS, *WEIGHTS])}, got {method!r}")
        seconds = time.perf_counter() - start
    row = {"method": method, "seconds": seconds, "peak_mib": memory.mib}
    if method in WEIGHTS:
        return row | job.measure(model.to(job.model.dtype))
    with mute(job.model, mutes) if mutes else nullcontext():
        return row | {"share": mutes.share if mutes else 0.0} | job.measure(job.model)


def tune(job, method):
    """A float32 copy of the model that one of ``WEIGHTS`` has tuned."""
    model = copy.deepcopy(job.model).float().requires_grad_(True)
    config = WeightsConfig(
        method=method, steps=job.recipe["steps"], batch_size=job.recipe["batch_size"],
        lr=job.recipe["lr"], beta=2.5 if method == "simnpo" else 0.1,
    )  # fmt: skip
    tune_weights(model, job.forget, job.retain, config, job.seed)
    return model


def _ours(mode, trained):
    """The mutes of ``neumuter.unlearn``; ``trained``: whether the support is trained or proposed."""

    def find(job):
        sizes = {"steps": job.recipe["steps"], "batch_size": job.recipe["batch_size"]}
        support = recipes.SupportConfig(**sizes) if trained else None
        outcome = neumuter.unlearn(
            job.model,
            None,
            job.forget,
            job.retain,
            budget=job.recipe["share"],
            mode=mode,
            recipe=recipes.FittedConfig(recipes.GainsConfig(**sizes), support),
            samples=0,
            start_layer=0,
            seed=job.seed,
            callback=lambda *_: None,
        )
        return outcome.mutes

    return find


def _masked(find):
    """A method that works on the masked model."""

    def run_attached(job):
        with neumuter.attach(job.model, start_layer=0) as masked:
            return find(job, masked)

    return run_attached


def _paper(job, masked):
    config = recipes.PaperConfig(epochs=job.recipe["paper_epochs"], refined=True)
    try:
        return recipes.train_gates(PairedBatches(masked, job.forget, job.retain), config, job.seed)
    except NothingSelectedError:
        return None


def _fisher(job, masked):
    return recipes.propose_by_fisher(PairedBatches(masked, job.forget, job.retain), job.recipe["share"])


MASKS = {
    "neumuter, modulate": _ours("modulate", trained=False),
    "neumuter, trained support": _ours("modulate", trained=True),
    "neumuter, mute": _ours("mute", trained=True),
    "random": _masked(lambda job, masked: recipes.mute_random(masked, job.recipe["share"], job.seed)),
    "attribution": _masked(
        lambda job, masked: recipes.mute_by_attribution(masked, job.forget, job.recipe["share"])
    ),
    "activation": _masked(
        lambda job, masked: recipes.mute_by_activation(masked, job.forget, job.retain, job.recipe["share"])
    ),
    "fisher": _masked(_fisher),
    "paper": _masked(_paper),
}
WEIGHTS = ("ascent", "difference", "npo", "simnpo")
