"""What is compared: one function per method, each leaves a model to be measured and says what it touched."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import neumuter
from bench.unlearning.memory import PeakMemory
from neumuter import recipes
from neumuter.evaluation import estimate_unseen, find_ceilings, list_given
from neumuter.recipes import FittedConfig, GainsConfig
from neumuter.serving.live import mute
from neumuter.training.batches import PairedBatches
from neumuter.training.neurons import Neurons
from neumuter.training.selection import NothingSelectedError
from neumuter.training.weights import WeightsConfig, tune_weights


@dataclass(frozen=True)
class Job:
    """A model that knows texts, and what is to be forgotten.

    ``model``: never changed. ``forget``, ``retain``: batches as ``neumuter.types.Batch`` says.
    ``measure(model)``: a dict of metrics. ``recipe``: {"share", "batch_size", "steps", "lr", "paper_epochs"},
    the budget of neurons, the texts of each kind per step, the steps of every trained method but the paper's
    own recipe, its epochs of batch 1, and the weight methods' learning rate. ``unseen()``: what a model that
    never saw the texts would make of them, as ``find_unseen`` estimates it: gains are then fitted as by
    default, in their own number of steps. None: all tokens that count do so alike.
    """

    model: torch.nn.Module
    forget: dict
    retain: dict
    measure: Callable
    recipe: dict
    seed: int
    unseen: Callable | None = None


def find_unseen(model, tokenizer, forget, retain, seed):
    """The probability of each token of ``forget`` that ``unlearn`` expects of a model that never saw it."""
    given = list_given({"forget": forget, "retain": retain}, tokenizer)
    return estimate_unseen(model, forget, given, tokenizer, seed)


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
    if mutes is None:
        return row | {"share": 0.0} | job.measure(job.model)
    with mute(job.model, mutes):
        return row | {"share": mutes.share, "outside": _outside(mutes)} | job.measure(job.model)


def _outside(mutes):
    """The share of the gains that turn a neuron around or strengthen it."""
    gains = torch.cat([layer.gains for layer in mutes.layers.values()])
    return ((gains < 0) | (gains > 1)).double().mean().item()


def configure(method, steps, batch_size, lr):
    """The constants of one of ``WEIGHTS``; β is that of its authors."""
    beta = 2.5 if method == "simnpo" else 0.1
    return WeightsConfig(method=method, steps=steps, batch_size=batch_size, lr=lr, beta=beta)


def tune(job, method):
    """A float32 copy of the model that one of ``WEIGHTS`` has tuned."""
    model = copy.deepcopy(job.model).float().requires_grad_(True)
    config = configure(method, **{key: job.recipe[key] for key in ("steps", "batch_size", "lr")})
    tune_weights(model, job.forget, job.retain, config, job.seed)
    return model


def _trained(mode):
    """The mutes of ``neumuter.unlearn`` with a trained support."""

    def find(job):
        outcome = neumuter.unlearn(
            job.model,
            None,
            job.forget,
            job.retain,
            budget=job.recipe["share"],
            mode=mode,
            recipe=FittedConfig(GainsConfig(**_sizes(job)), recipes.SupportConfig(**_sizes(job))),
            samples=0,
            start_layer=0,
            seed=job.seed,
            callback=lambda *_: None,
        )
        return outcome.mutes

    return find


def _sizes(job):
    return {"steps": job.recipe["steps"], "batch_size": job.recipe["batch_size"]}


def _masked(find):
    """A method that works on the masked model."""

    def run_attached(job):
        with neumuter.attach(job.model, start_layer=0) as masked:
            return find(job, masked)

    return run_attached


def fit(job, masked, **gains):
    """The mutes of ``neumuter.unlearn`` with ``GainsConfig(**gains)``, by default its own."""
    pair, config = _prepare(job, masked, gains)
    return recipes.fit_mutes(pair, job.recipe["share"], config=config, seed=job.seed)


def _fit_at_random(job, masked, times):
    """Neurons at random: ``times`` the budget of them, of which the budget stays whose gains move most."""
    pair, config = _prepare(job, masked, {})
    neurons = Neurons(masked)
    count = neurons.count_of(job.recipe["share"])
    drawn = torch.randperm(neurons.count, generator=torch.Generator().manual_seed(job.seed))[: times * count]
    about = {"recipe": "random"}
    mutes = neurons.mute_set(drawn, torch.zeros(len(drawn)), "mute", (0.0, 1.0), about, job.seed)
    return recipes.fit_gains(pair, mutes, config.gains, job.seed, keep=count)


def _prepare(job, masked, gains):
    """The batches of a fit of gains, and its constants."""
    if job.unseen is None:
        config = FittedConfig(GainsConfig(**_sizes(job) | gains))
        return PairedBatches(masked, job.forget, job.retain), config
    ceilings = find_ceilings(job.unseen())
    pair = PairedBatches(masked, job.forget, job.retain, ceilings)
    return pair, FittedConfig(GainsConfig(**gains))


def _paper(job, masked):
    config = recipes.PaperConfig(epochs=job.recipe["paper_epochs"], refined=True)
    try:
        return recipes.train_gates(PairedBatches(masked, job.forget, job.retain), config, job.seed)
    except NothingSelectedError:
        return None


def _fisher(job, masked):
    return recipes.propose_by_fisher(PairedBatches(masked, job.forget, job.retain), job.recipe["share"])


MASKS = {
    "neumuter, modulate": _masked(fit),
    "neumuter, trained support": _trained("modulate"),
    "neumuter, mute": _trained("mute"),
    "clamped": _masked(lambda job, masked: fit(job, masked, gain_range=(0.0, 1.0))),
    "random, fitted": _masked(lambda job, masked: _fit_at_random(job, masked, 1)),
    "candidates, fitted": _masked(lambda job, masked: _fit_at_random(job, masked, 3)),
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
# What LOCATION compares the default with.
CONTROLS = ("clamped", "random, fitted", "candidates, fitted")
COMPARED = (*(method for method in MASKS if method not in CONTROLS), *WEIGHTS)
