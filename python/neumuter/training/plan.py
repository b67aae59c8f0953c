"""What mask training and serving cost, computed from a config.json alone: nothing is loaded or downloaded.

One training step of NeuMuter's objective is traced on the model as one device holds it, and once more as one
device of several holds it under tensor parallelism. The other layouts follow from the first by arithmetic.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoConfig, PreTrainedConfig

from neumuter.files import PathLike
from neumuter.models.recomputation import decoder_layers
from neumuter.training.batches import SAMPLES_PER_PASS, PairedBatches
from neumuter.training.step import Step
from neumuter.training.tracing import Nothing, Trace, trace

# Dense 16-bit FLOP/s and bytes/s of the data sheets.
CARDS = {
    "A100": (312e12, 2.04e12),
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "B200": (2250e12, 8.0e12),
    "MI300X": (1307e12, 5.3e12),
}
# This share of a device's memory may be in use.
FILLED = 0.95
# A score, its gradient and the two moments of Adam, all float32.
STATE_BYTES = 16
# Fewer samples of each kind take no less memory, because the neurons are ranked on so many at a time.
LEAST_SAMPLES = SAMPLES_PER_PASS // 2


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes.

    layouts: {name: {part: bytes per device}} for the number of devices asked, those first that are faster.
    refused: {name: why} of those that there are not for this model.
    """

    model: str
    parameters: int
    neurons: int
    weights: int
    # Scores, their gradients and Adam's moments.
    masks: int
    # The last hidden states of the retain samples.
    reference: int
    # What is kept for the backward pass, and what is needed beyond all of these at the peak.
    activations: int
    temporary: int
    # FLOPs of one training step, and the bytes that its operations read and write.
    flops: int
    moved: int
    # Of each layer, when serving: (bytes of a token's keys and values, window or None).
    cache: tuple[tuple[int, int | None], ...]
    layouts: dict[str, dict[str, int]]
    refused: dict[str, str]

    def choose(self, memory: float) -> str | None:
        """The layout to train in, which fits ``memory`` bytes a device with 5 % to spare; None if none does.

        A copy in each process comes first, because nothing waits for weights there, and one process last.
        """
        peaks = {name: sum(parts.values()) for name, parts in self.layouts.items()}
        return next((name for name, peak in peaks.items() if peak <= FILLED * memory), None)

    @property
    def training(self) -> int:
        """Peak bytes of mask training on one device."""
        return self.weights + self.masks + self.reference + self.activations + self.temporary

    def serving(self, sequences: int, tokens: int) -> int:
        """Bytes of serving ``sequences`` of ``tokens`` tokens each with one mute set, on one device."""
        kept = sum(size * min(tokens, window or tokens) for size, window in self.cache)
        return self.weights + 4 * self.neurons + sequences * kept

    def step_seconds(self, card: str) -> tuple[float, str]:
        """The time of a training step at the roofline of a card: (seconds, what binds)."""
        compute, bandwidth = CARDS[card]
        times = {"arithmetic": self.flops / compute, "memory": self.moved / bandwidth}
        binds = max(times, key=times.__getitem__)
        return times[binds], binds


class Fitting(NamedTuple):
    """The ``layout`` that a plan has chosen, or None, and for which samples and whether activations are
    recomputed it holds."""

    plan: Plan
    layout: str | None
    samples: int
    recompute: bool


def load_config(path: PathLike) -> PreTrainedConfig:
    """Load the config at ``path``, a config.json or the folder that has one.

    Raises:
        FileNotFoundError: there is none.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{path} is neither a config.json nor a folder that has one")
    config: PreTrainedConfig = AutoConfig.from_pretrained(file, trust_remote_code=False)
    return config


def plan(
    config: PreTrainedConfig,
    devices: int = 1,
    samples: int = 8,
    tokens: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    recompute: bool = False,
) -> Plan:
    """Plan mask training and serving for a config of transformers.

    Tensor parallelism is left out inside a process group, where it cannot be traced.

    Args:
        samples: of each kind, forget and retain, per step and device.
        tokens: of each sample.
        dtype: of the weights.
        recompute: whether activations are computed again in the backward pass.

    Raises:
        ValueError: a model that ``attach`` refuses; experts in another dtype than bfloat16, which fake
            tensors do not multiply; or a model whose forward pass depends on values, which they do not have.
    """
    config = config.get_text_config()
    found = trace(config, _make_step, "ddp", 1, samples, tokens, dtype, recompute)
    masked, model = found.masked, found.masked.model
    cache = _cache(model)
    neurons = sum(len(score) for score in masked.scores.values())
    masked.detach()
    parts = _parts(found, neurons)
    layouts, refused = {"one device": parts}, {}
    if devices > 1:
        layouts = _layouts(parts, model, devices)
        if not dist.is_initialized():
            try:
                split = trace(config, _make_step, "tp", devices, samples, tokens, dtype, recompute)
                layouts["tensor parallel"] = _parts(split, neurons)
            except (ImportError, ValueError, RuntimeError) as error:
                refused["tensor parallel"] = str(error)
        # One process comes last.
        layouts["device_map"] = layouts.pop("device_map")
    return Plan(
        model=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        neurons=neurons,
        flops=found.flops,
        moved=found.moved,
        cache=cache,
        layouts=layouts,
        refused=refused,
        **parts,
    )


def find_fitting(
    config: PreTrainedConfig,
    memory: float,
    devices: int = 1,
    samples: int = 8,
    tokens: int = 256,
    dtype: torch.dtype = torch.bfloat16,
) -> Fitting:
    """Find the layout that fits ``memory`` bytes a device: first as asked, then with activations recomputed,
    then with half the samples, and so on.

    Args:
        devices, samples, tokens, dtype: as of ``plan``. There are never fewer than ``LEAST_SAMPLES`` samples.

    Raises:
        ValueError: see ``plan``.
    """
    samples = max(samples, LEAST_SAMPLES)
    while True:
        for recompute in (False, True):
            found = plan(config, devices, samples, tokens, dtype, recompute)
            layout = found.choose(memory)
            too_large = all(parts["weights"] > memory for parts in found.layouts.values())
            if layout or too_large or (recompute and samples == LEAST_SAMPLES):
                return Fitting(found, layout, samples, recompute)
        samples = max(samples // 2, LEAST_SAMPLES)


def _make_step(pair: PairedBatches) -> Step:
    """The step of NeuMuter's objective."""
    return Step(
        pair,
        list(pair.masked.scores.values()),
        lambda inputs, counter: pair.masked.sampling(0, counter, inputs.samples),
        [lambda found: found.kl - found.mean(found.losses)],
        Nothing(),
    )


def _parts(found: Trace, neurons: int) -> dict[str, int]:
    known = {
        "weights": found.weights,
        "masks": STATE_BYTES * neurons,
        "reference": found.reference,
        "activations": found.activations,
    }
    # Of the masks, the scores and their gradients are in the trace already.
    return known | {"temporary": found.peak - sum(known.values()) + STATE_BYTES * neurons // 2}


def _bytes(*modules: nn.Module) -> int:
    """Of the parameters and buffers, tied ones once."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(_size(t) for t in tensors.values())


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _cache(model: nn.Module) -> tuple[tuple[int, int | None], ...]:
    """Of each layer with keys and values: (bytes of one token's, the window that it keeps or None)."""
    with cast(FakeTensor, next(model.parameters())).fake_mode, torch.no_grad():
        output = model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True)
    cache = getattr(output, "cache", None) or output.past_key_values
    found = []
    for layer in cache.layers:
        tensors = [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
        found.append((sum(map(_size, tensors)), getattr(layer, "sliding_window", None)))
    return tuple(found)


def _layouts(parts: dict[str, int], model: Any, devices: int) -> dict[str, dict[str, int]]:
    """Bytes per device: {layout: {part: bytes}}.

    DDP copies the weights. FSDP2 and ZeRO-3 split them, and gather them where they are needed. Before a layer
    runs, three are there for a moment: what was received of it and of the one before, and its own weights.
    In the backward pass these are two, with the head. device_map spreads the layers with their activations;
    the embeddings and the head are counted with each.
    """
    layers = [_bytes(layer) for layer in decoder_layers(model)]
    outside = parts["weights"] - sum(layers)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    last = outside if head is None or head.weight is embeddings.weight else outside - _bytes(embeddings)
    kept = parts["activations"]
    forward = 3 * max(layers) - kept // len(layers)
    backward = last + 2 * max(layers) + parts["temporary"]
    spread = {"weights": outside + math.ceil(sum(layers) / devices)}
    return {
        "DDP": parts,
        "FSDP2, ZeRO-3": parts
        | {"weights": math.ceil(parts["weights"] / devices), "temporary": max(forward, backward)},
        "device_map": parts
        | spread
        | {part: math.ceil(parts[part] / devices) for part in ("masks", "activations")},
    }
