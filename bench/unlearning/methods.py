"""What is compared: one function per method, each leaves a model to be measured and says what it touched."""

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from neumuter import recipes
from neumuter.masking import NothingSelectedError, attach
from neumuter.muting import mute

from bench.unlearning.memory import PeakMemory


@dataclass(frozen=True)
class Job:
    """A model that knows texts, and what is to be forgotten.

    ``model``: never changed. ``forget``, ``neighbours``: batches as ``neumuter.recipes.Pair`` takes them.
    ``measure(model)``: a dict of metrics. ``recipe``: {"share", "batch_size", "steps", "lr", "paper_epochs"},
    the budget of neurons, the texts of each kind per step, the steps of every trained method but the paper's
    own recipe, its epochs of batch 1, and the weight methods' learning rate.
    """

    model: torch.nn.Module
    forget: dict
    neighbours: dict
    measure: Callable
    recipe: dict
    seed: int


def run(job, method):
    """The row of one method: its metrics, share of touched neurons, seconds and peak memory, MiB."""
    with PeakMemory() as memory:
        start = time.perf_counter()
        if method in MASKS:
            with attach(job.model, start_layer=0) as masked:
                mutes = MASKS[method](job, masked)
        elif method in WEIGHTS:
            model = copy.deepcopy(job.model).float().requires_grad_(True)
            config = recipes.WeightsConfig(
                method=method, steps=job.recipe["steps"], batch_size=job.recipe["batch_size"],
                lr=job.recipe["lr"], beta=2.5 if method == "simnpo" else 0.1,
            )  # fmt: skip
            recipes.tune_weights(model, job.forget, job.neighbours, config, job.seed)
        else:
            raise ValueError(f"method must be one of {', '.join([*MASKS, *WEIGHTS])}, got {method!r}")
        seconds = time.perf_counter() - start
    row = {"method": method, "seconds": seconds, "peak_mib": memory.mib}
    if method in WEIGHTS:
        return row | job.measure(model.to(job.model.dtype))
    with mute(job.model, mutes) if mutes else nullcontext():
        return row | {"share": mutes.share if mutes else 0.0} | job.measure(job.model)


def _paper(job, masked):
    config = recipes.GatesConfig(epochs=job.recipe["paper_epochs"])
    try:
        return recipes.train_gates(masked, job.forget, job.neighbours, config, job.seed)
    except NothingSelectedError:
        return None


def _ours(mode, trained):
    """``trained``: whether which neurons is trained, or taken from two backward passes."""

    def find(job, masked):
        steps, batch_size, share = (job.recipe[key] for key in ("steps", "batch_size", "share"))
        support = recipes.SupportConfig(steps=steps, batch_size=batch_size) if trained else None
        gains = recipes.GainsConfig(steps=steps, batch_size=batch_size)
        return recipes.forget(masked, job.forget, job.neighbours, share, mode, support, gains, job.seed)

    return find


def _fisher(job, masked):
    pair = recipes.Pair(masked, job.forget, job.neighbours)
    return recipes.support_by_fisher(masked, pair, job.recipe["share"])


MASKS = {
    "neumuter, modulate": _ours("modulate", trained=False),
    "neumuter, trained support": _ours("modulate", trained=True),
    "neumuter, mute": _ours("mute", trained=True),
    "random": lambda job, masked: recipes.mute_random(masked, job.recipe["share"], job.seed),
    "attribution": lambda job, masked: recipes.mute_by_attribution(masked, job.forget, job.recipe["share"]),
    "activation": lambda job, masked: recipes.mute_by_activation(
        masked, job.forget, job.neighbours, job.recipe["share"]
    ),
    "fisher": _fisher,
    "paper": _paper,
}
WEIGHTS = ("ascent", "difference", "npo", "simnpo")
