"""Triton's launches, noted so that the extension can repeat them without Python.

The extension computes an op on GPU tensors by the plan of the call's kind: its dtypes, sizes, strides,
alignments and numbers. Without a plan it calls Python, which computes the op as ever, notes what it allocates
and launches, and leaves that with the extension as the plan of this kind (csrc/launch). So the code that
allocates and launches must look at nothing else of its arguments. A call that runs other ops has no plan.
"""

import contextvars
import functools
import importlib.metadata
import logging
import os
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neumuter_kernels import _C

logger = logging.getLogger(__name__)

# The versions of Triton whose kernels take two pointers to scratch memory behind what their signatures say.
TRITON_VERSIONS = ("3.6", "3.7", "3.8")
HIDDEN_POINTERS = 2
WARP = 32
# A launch with more needs attributes of its own.
MOST_SHARED_BYTES = 227 * 1024
MOST_REFUSED = 4096

NO_TENSOR = -1
FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "?", "u8": "B", "u16": "H",
           "u32": "I", "u64": "Q", "fp32": "f", "f32": "f", "fp64": "d"}  # fmt: skip

_aten = torch.ops.aten
_ALLOCATE = {_aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default,
             _aten.new_empty.default, _aten.new_empty_strided.default}  # fmt: skip
_active: contextvars.ContextVar["_Recording | None"] = contextvars.ContextVar("recording", default=None)
_kernels: dict[int, Any] = {}  # of the plans, by handle: Triton unloads a kernel that nobody holds
_refused: set[tuple[int, ...]] = set()  # the kinds of calls that have no plan


def why_not() -> str | None:
    """Why this process launches Triton's kernels from Python alone; None: the extension does, too."""
    if torch.version.cuda is None:
        return "this torch is for HIP" if torch.version.hip else "this torch is without CUDA"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "Triton interprets its kernels"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed"
    if not version.startswith(tuple(f"{known}." for known in TRITON_VERSIONS)):
        return f"the kernels of Triton {version} are unknown (known: {', '.join(TRITON_VERSIONS)})"
    return _C.why_no_driver() or None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)`` for a grid that is not empty, so that a recording notes it."""
    compiled = kernel[grid](*arguments, **options)
    recording = _active.get()
    if recording is not None:
        recording.note(kernel, compiled, grid, arguments, options)


def recorder(name: str, outputs: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """What the extension calls for a call without a plan: ``function``, whose arguments a key follows.

    name, outputs: of the op. The extension raises what this function raises.
    """

    def record(*given: Any) -> Any:
        *arguments, key = given
        try:
            if not key or tuple(key) in _refused:
                return function(*arguments)
            recording = _Recording(arguments)
            result = recording.run(function)
            _learn(name, key, recording, result)
            return result
        except BaseException as error:
            _C.keep_raised(error)
            nothing = tuple(torch.empty(0) for _ in range(outputs))
            return nothing if outputs > 1 else nothing[0]

    return record


def _learn(name: str, key: Sequence[int], recording: "_Recording", result: Any) -> None:
    try:
        _C.learn_plan(key, *recording.plan((result,) if isinstance(result, Tensor) else result))
        _kernels.update(recording.kernels)
    # Whatever is wrong with the plan, the call has been computed.
    except Exception as error:
        if len(_refused) >= MOST_REFUSED:
            _refused.clear()
        _refused.add(tuple(key))
        say_once(f"some calls of {name} are launched from Python: {error}")
        # Its frames hold the recording, and so the tensors of this call and of its callers, which would live
        # until Python looks for circles.
        recording.refusal = None
        error.__traceback__ = None


@functools.cache
def say_once(text: str) -> None:
    logger.info(text)


class CannotRepeat(Exception):
    """Why a call has no plan."""


class _Recording(TorchDispatchMode):
    """Of one call: what it allocates, what it launches, and why that cannot be repeated, if so."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # A tensor that is given twice becomes two objects, since the next call may get two tensors.
        self.arguments = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        self.tensors: list[Any] = [x for x in self.arguments if x is None or isinstance(x, Tensor)]
        self.given = len(self.tensors)
        self.number = {id(x): n for n, x in enumerate(self.tensors) if x is not None}
        self.views: list[Tensor] = []  # kept, so that no other tensor gets the id of one of them
        self.launches: list[tuple[Any, ...]] = []
        self.kernels: dict[int, Any] = {}
        self.refusal: Exception | None = None
        self.thread, self.seen = threading.get_ident(), 0

    def run(self, function: Callable[..., Any]) -> Any:
        from triton import knobs

        hook = knobs.runtime.launch_enter_hook
        token = _active.set(self)
        hook.add(self._see)
        try:
            with self:
                return function(*self.arguments)
        finally:
            hook.remove(self._see)
            _active.reset(token)

    def _see(self, metadata: Any) -> None:
        """Triton calls this before each launch, so that none is missed that did not go through ``launch``."""
        self.seen += threading.get_ident() == self.thread

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if op in _ALLOCATE:
            self.number[id(result)] = len(self.tensors)
            self.tensors.append(result)
        elif self._is_view(op, args, result):
            self.number[id(result)] = self.number[id(args[0])]
            self.views.append(result)
        else:
            self.refusal = self.refusal or CannotRepeat(f"it runs {op}")
        return result

    def _is_view(self, op: Any, args: Any, result: Any) -> bool:
        tensors = isinstance(result, Tensor) and bool(args) and id(args[0]) in self.number
        storages = [x.untyped_storage()._cdata for x in (result, args[0])] if tensors else [0, 1]
        return storages[0] == storages[1] and not op._schema.is_mutable

    def note(self, kernel: Any, compiled: Any, grid: Sequence[int], arguments: Any, options: Any) -> None:
        """A launch that has just been made."""
        try:
            self.launches.append(self._launch(kernel, compiled, grid, arguments, options))
        except Exception as error:
            self.refusal = self.refusal or error

    def _launch(self, kernel: Any, compiled: Any, grid: Any, arguments: Any, options: Any) -> tuple[Any, ...]:
        metadata, handle, signature = compiled.metadata, compiled.function, compiled.src.signature
        needs = {
            "a cluster": metadata.num_ctas != 1,
            "more shared memory than a plain launch has": metadata.shared > MOST_SHARED_BYTES,
            "a cooperative launch": metadata.launch_cooperative_grid,
            "a dependent launch": metadata.launch_pdl,
            "scratch memory": metadata.global_scratch_size or metadata.profile_scratch_size,
            "instrumentation": getattr(metadata, "instrumentation_mode", ""),
        }
        for need, is_so in needs.items():
            if is_so:
                raise CannotRepeat(f"{metadata.name} needs {need}")
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        types = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        _check_parameters(metadata.name, handle, list(types.values()))
        parameters = [self._parameter(name, kind, given[name]) for name, kind in types.items()]
        parameters += [(NO_TENSOR, 0)] * HIDDEN_POINTERS
        self.kernels[handle] = compiled
        return handle, (*grid, 1, 1)[:3], WARP * metadata.num_warps, metadata.shared, parameters

    def _parameter(self, name: str, kind: str, value: Any) -> tuple[int, int]:
        if kind[0] != "*":
            return NO_TENSOR, int.from_bytes(struct.pack(f"<{FORMATS[kind]}", value), "little")
        if value is None:
            return NO_TENSOR, 0
        number = self.number.get(id(value))
        if number is None:
            raise CannotRepeat(f"nobody knows where its {name} comes from")
        return number, (value.data_ptr() - self.tensors[number].data_ptr()) % 2**64

    def plan(self, outputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """The arguments of learn_plan after the key."""
        if self.refusal is not None:
            raise self.refusal
        if self.seen != len(self.launches):
            raise CannotRepeat(f"it launches {self.seen} kernels, {len(self.launches)} of them by launch()")
        made = self.tensors[self.given :]
        if any(x.device != self.arguments[0].device for x in made):
            raise CannotRepeat("it allocates elsewhere, too")
        allocations = [(*_layout(x), str(x.dtype).removeprefix("torch."), _is_aligned(x)) for x in made]
        return allocations, self.launches, [self._made(x) for x in outputs]

    def _made(self, output: Tensor) -> int:
        """The number of the allocation that ``output`` is."""
        number = self.number.get(id(output), NO_TENSOR)
        whole = self.tensors[number]
        if number < self.given or (_layout(whole), whole.data_ptr()) != (_layout(output), output.data_ptr()):
            raise CannotRepeat("it returns something else than what it allocates")
        return number - self.given


def _layout(x: Tensor) -> tuple[Sequence[int], Sequence[int]]:
    return x.shape, x.stride()


def _is_aligned(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0


def _check_parameters(name: str, handle: int, types: Sequence[str]) -> None:
    """Raise CannotRepeat unless the driver sees the parameters that the signature and the version promise."""
    sizes = [8 if kind[0] == "*" else struct.calcsize(f"<{FORMATS[kind]}") for kind in types]
    sizes += [8] * HIDDEN_POINTERS
    found = [size for _, size in _C.parameters_of(handle)]
    if sizes != found:
        raise CannotRepeat(f"the parameters of {name} have {found} bytes, expected {sizes}")
