"""A training step on tensors that have shapes and no values: what it would keep in memory, compute and move.

The real step runs, operation by operation, on the model as one process holds it. Where several share the
model, transformers splits it over a process group of torch that communicates with nobody.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_tie_weights

from neumuter.models.layouts import check_layout, make_distributed_config, split
from neumuter.texts.store import Windows
from neumuter.training.batches import PairedBatches
from neumuter.training.masked import Masked, attach
from neumuter.training.step import Measured, Step

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
# In the first step DTensor works out layouts on tensors of its own.
STEPS = {"ddp": 1, "fsdp": 1, "tp": 2, "fsdp+tp": 2}


@dataclass(frozen=True)
class Trace:
    """Of the last step, in bytes: ``weights`` and ``reference`` (the last hidden states of the retain
    samples) are always there, ``activations`` from the forward pass to the backward pass. ``peaks``: the most
    that is there of all while "layers" run forward, in the "head" with the losses, and in the "backward"
    pass. ``flops``; ``moved``: what its operations read and write; ``reduced``: what is summed over the
    processes of tensor parallelism."""

    masked: Masked
    weights: int
    reference: int
    activations: int
    peaks: dict[str, int]
    flops: int
    moved: int
    reduced: int

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


class Counting(TorchDispatchMode):
    """Bytes alive, the most that were, the bytes that operations read and write, and sum up; and FLOPs.

    A storage is counted from the operation that makes it, or sees it first, to its end. FSDP2 empties
    storages and fills them again, which is counted, too.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._sizes: dict[int, int] = {}
        self.alive = 0
        self.begin()

    def begin(self) -> None:
        """Begin anew with what is alive now."""
        self.peak, self.moved, self.flops, self.reduced = self.alive, 0, 0, 0

    def take_peak(self) -> int:
        """The peak since this was called, or since ``begin``."""
        found, self.peak = self.peak, self.alive
        return found

    def __enter__(self) -> "Counting":
        resize = self._resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            found = resize(storage, size)
            if storage._cdata in self._sizes:
                self._grow(storage)
            return found

        torch.UntypedStorage.resize_ = counted  # type: ignore[assignment, method-assign]
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]  # torch's
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # It makes operations on its parts of this one, which come here again.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        inputs = _tensors((args, kwargs))
        for tensor in inputs:
            self._see(tensor)
        result = function(*args, **(kwargs or {}))
        if function._overloadpacket in _FLOPS:
            self.flops += _FLOPS[function._overloadpacket](*args, **(kwargs or {}), out_val=result)
        if function._overloadpacket._qualified_op_name.endswith(("::all_reduce", "::allreduce_")):
            self.reduced += sum(x.numel() * x.element_size() for x in inputs)
        outputs = _tensors(result)
        fresh = sum(map(self._see, outputs))
        # A view moves nothing.
        if fresh:
            self.moved += sum(x.numel() * x.element_size() for x in (*inputs, *outputs))
        return result

    def _see(self, tensor: Tensor) -> int:
        """Count a storage that is new; return by how many bytes."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:
            return 0
        self._sizes[storage._cdata] = 0
        weakref.finalize(storage, self._forget, storage._cdata)
        return self._grow(storage)

    def _grow(self, storage: torch.UntypedStorage) -> int:
        more = storage.nbytes() - self._sizes[storage._cdata]
        self._sizes[storage._cdata] += more
        self.alive += more
        self.peak = max(self.peak, self.alive)
        return more

    def _forget(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among these that take memory."""
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor) and not x.is_meta]


def trace(
    config: PreTrainedConfig,
    make_step: Callable[[PairedBatches], Step],
    layout: str = "ddp",
    processes: int = 1,
    samples: int = 8,
    tokens: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    recompute: bool = False,
    local: int | None = None,
) -> Trace:
    """Trace a training step of a recipe, as one of the processes takes it.

    Args:
        config: of the model, as transformers has it.
        make_step: makes the step.
        layout: see ``neumuter.models.layouts``.
        samples: of each kind that this process has in the step.
        tokens: of each sample.
        dtype: of the weights.
        recompute: whether activations are computed again in the backward pass.
        local: the processes of each machine; see ``neumuter.models.layouts.divide``.

    Raises:
        ValueError: a model that ``attach`` or the layout refuses; experts in another dtype than bfloat16,
            which fake tensors do not multiply; or a forward pass that depends on values.
    """
    with _without_values(config), _imagined(processes):
        # They are tied where it has been split, as when transformers loads it.
        with torch.device("meta"), no_tie_weights():
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        model.eval().requires_grad_(False)
        if layout != "ddp":
            check_layout(layout, model, processes, local)
            split(model, make_distributed_config(layout, processes, model, local))
        with FakeTensorMode(allow_non_fake_inputs=True), Counting() as counting:
            model.to_empty(device="cpu")
            model.tie_weights()
            weights = counting.alive
            masked = attach(model)
            if dtype != torch.bfloat16 and "experts" in masked.seams.values():
                raise ValueError(f"dtype must be bfloat16 for a model with experts, got {dtype}")
            if recompute:
                masked.recomputation.begin()
            pair = PairedBatches(masked, _windows(samples, tokens), _windows(samples, tokens))
            # Each process has samples of its own, and what is summed over processes is small.
            pair.processes = None
            # Now the reference states are there.
            pair.take(range(2 * samples))
            step = make_step(pair)
            activations, peaks = [], {}
            before = counting.alive

            def watch(found: Measured) -> Tensor:
                activations.append(counting.alive - before)
                peaks["head"] = counting.take_peak()
                return found.kl

            def leave_layers(*_: Any) -> None:
                peaks["layers"] = counting.take_peak()

            pair.head.base.register_forward_hook(leave_layers)
            step.terms = [*step.terms, watch]
            step.update = Nothing()
            for _ in range(STEPS[layout]):
                counting.begin()
                step.once(range(2 * samples))
                peaks["backward"] = counting.take_peak()
        return Trace(
            masked=masked,
            weights=weights,
            reference=samples * (tokens - 1) * pair.head.state_bytes,
            activations=activations[-1],
            peaks=peaks,
            flops=counting.flops,
            moved=counting.moved,
            reduced=counting.reduced,
        )


class Nothing:
    """An update that changes nothing: torch's Adam reads the number of the step."""

    def apply(self, measured: Measured, counter: Tensor) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass


def _windows(count: int, tokens: int) -> Windows:
    windows = Windows()
    for _ in range(count):
        windows.add([0] * tokens, 0)
    return windows


@contextlib.contextmanager
def _imagined(processes: int) -> Iterator[None]:
    """Context: a process group of so many, of which this process is the first, and the others are not there.

    Raises:
        RuntimeError: there is a process group already.
    """
    if processes == 1:
        yield
        return
    # It registers the backend as well.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a layout can only be traced outside of process groups")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _without_values(config: PreTrainedConfig) -> Iterator[None]:
    """Context: names the model whose forward pass looks at values."""
    try:
        yield
    except DataDependentOutputException as error:
        raise ValueError(
            f"the forward pass of {config.model_type} depends on values ({error}), which a plan does not "
            "have; measure a step of the model instead"
        ) from None
