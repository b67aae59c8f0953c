"""What mask training and serving cost, computed from a config.json alone: nothing is loaded or downloaded.

The model is built of fake tensors, which have shapes and no values, and one training step of NeuMuter's
objective runs on them. What it would keep in memory, compute and move is counted operation by operation.
"""

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from neumuter.files import PathLike
from neumuter.models.head import Head
from neumuter.training.masked import Masked, attach

# Dense 16-bit FLOP/s and bytes/s of the data sheets.
CARDS = {
    "A100": (312e12, 2.04e12),
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "B200": (2250e12, 8.0e12),
    "MI300X": (1307e12, 5.3e12),
}
_aten = torch.ops.aten
# What PyTorch's table lacks: products of experts, and attention on the CPU, where fake tensors live.
_FLOPS = flop_registry | {
    _aten._grouped_mm: lambda a, b, *_, out_val, **__: 2 * a.numel() * out_val.shape[-1],
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
        sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)
    ),
}
# This share of a device's memory may be in use.
FILLED = 0.95
# A score, its gradient and the two moments of Adam, all float32.
STATE_BYTES = 16


class _Counting(TorchDispatchMode):
    """Bytes alive, the most that were, the bytes that operations read and write, and FLOPs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.alive = self.peak = self.moved = self.flops = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        # What was there before counting began, such as the weights, is not counted.
        self._seen.update(x.untyped_storage()._cdata for x in inputs)
        result = function(*args, **(kwargs or {}))
        if function._overloadpacket in _FLOPS:
            self.flops += _FLOPS[function._overloadpacket](*args, **(kwargs or {}), out_val=result)
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        fresh = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                fresh += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.alive += fresh
        self.peak = max(self.peak, self.alive)
        # A view moves nothing.
        if fresh:
            self.moved += sum(x.numel() * x.element_size() for x in (*inputs, *tensors))
        return result

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes. ``layouts``: {name: {part: bytes per device}} for the number of devices asked."""

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
    checkpointing: bool = False,
) -> Plan:
    """Plan mask training and serving for a config of transformers.

    Args:
        samples: of each kind, forget and retain, per step and device.
        tokens: of each sample.
        dtype: of the weights.
        checkpointing: whether activations are recomputed in the backward pass.

    Raises:
        ValueError: a model that ``attach`` refuses; experts in another dtype than bfloat16, which fake
            tensors do not multiply; or a model whose forward pass depends on values, which they do not have.
    """
    config = config.get_text_config()
    with _without_values(config), FakeTensorMode():
        model = (
            AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
            .eval()
            .requires_grad_(False)
        )
        weights = _bytes(model)
        layers = [_bytes(layer) for layer in _decoder_layers(model)]
        masked = attach(model)
        if dtype != torch.bfloat16 and "experts" in masked.seams.values():
            raise ValueError(f"dtype must be bfloat16 for a model with experts, got {dtype}")
        cache = _cache(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        step = _Step(masked, samples, tokens)
        with _Counting() as counting:
            step.run(counting)
    neurons = sum(len(score) for score in masked.scores.values())
    parts = {
        "weights": weights,
        "masks": STATE_BYTES * neurons,
        "reference": _size(step.reference),
        "activations": step.kept,
        "temporary": counting.peak - step.kept,
    }
    return Plan(
        model=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()) - neurons,
        neurons=neurons,
        flops=counting.flops,
        moved=counting.moved,
        cache=cache,
        layouts=_layouts(parts, layers, devices, all(ffn.can_be_split for ffn in masked.ffns)),
        **parts,
    )


@contextmanager
def _without_values(config: PreTrainedConfig) -> Iterator[None]:
    """Context: names the model whose forward pass looks at values."""
    try:
        yield
    except DataDependentOutputException as error:
        raise ValueError(
            f"the forward pass of {config.model_type} depends on values ({error}), which a plan does not "
            "have; measure a step of the model instead"
        ) from None


class _Step:
    """One step of NeuMuter's objective on fake samples, forget and retain samples side by side."""

    def __init__(self, masked: Masked, samples: int, tokens: int) -> None:
        self.masked, self.head = masked, Head(masked.model)
        self.ids = torch.zeros(2 * samples, tokens, dtype=torch.int64)
        self.targets = torch.zeros(samples * (tokens - 1), dtype=torch.int64)
        model = cast(PreTrainedModel, masked.model)
        hidden = model.config.get_text_config().hidden_size
        self.reference = torch.zeros(len(self.targets), hidden, dtype=model.dtype)
        # Bytes alive between forward and backward.
        self.kept = 0

    def run(self, counting: _Counting) -> None:
        with self.masked.sampling(0, 0, torch.arange(len(self.ids))):
            hidden = self.head.hidden(self.ids)[:, :-1].flatten(0, 1)
            self.kept = counting.alive
            forget, retain = hidden.chunk(2)
            loss = self.head.token_losses(forget, self.targets).mean()
            loss = self.head.kl_divergences(retain, self.reference).mean() - loss
            loss.backward()


def _decoder_layers(model: nn.Module) -> Iterable[nn.Module]:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    largest: nn.Module | None = max(lists, key=_bytes, default=None)
    return [model] if largest is None else largest.children()


def _bytes(module: nn.Module) -> int:
    """Of the parameters and buffers, tied ones once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(_size(t) for t in tensors.values())


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _cache(model: nn.Module) -> tuple[tuple[int, int | None], ...]:
    """Of each layer with keys and values: (bytes of one token's, the window that it keeps or None)."""
    with torch.no_grad():
        output = model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True)
    cache = getattr(output, "cache", None) or output.past_key_values
    found = []
    for layer in cache.layers:
        tensors = [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
        found.append((sum(map(_size, tensors)), getattr(layer, "sliding_window", None)))
    return tuple(found)


def _layouts(
    parts: dict[str, int], layers: list[int], devices: int, split: bool
) -> dict[str, dict[str, int]]:
    """Bytes per device: {layout: {part: bytes}}, for decoder layers of the given sizes.

    DDP copies the weights. FSDP2 and ZeRO-3 split them, and gather the embeddings and the head, the layer at
    work and the next. Tensor parallelism splits the layers, if masks can follow; its activations are counted
    whole, which is too much. device_map spreads the layers with their activations; the embeddings and the
    head are counted with each.
    """
    if devices == 1:
        return {"one device": parts}
    outside = parts["weights"] - sum(layers)
    gathered = outside - outside // devices + 2 * max(layers)
    spread = {"weights": outside + math.ceil(sum(layers) / devices)}
    return {
        "DDP": parts,
        "FSDP2, ZeRO-3": parts
        | {"weights": math.ceil(parts["weights"] / devices), "temporary": parts["temporary"] + gathered},
        **({"tensor parallel": parts | spread} if split else {}),
        "device_map": parts
        | spread
        | {part: math.ceil(parts[part] / devices) for part in ("masks", "activations")},
    }
