"""Values as bytes, and back: tensors as safetensors, and all else as JSON. Nothing is pickled."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

# Under this name the file has the JSON, as bytes.
TEXT = "json"


def pack(value: Any, kinds: Sequence[type] = ()) -> bytes:
    """Write tensors, numbers, words, None, and lists, tuples and mappings of these.

    Args:
        kinds: further classes of values: dataclasses and named tuples.

    Raises:
        TypeError: a value is of another class.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_describe(value, tuple(kinds), tensors)).encode()
    return save(tensors | {TEXT: torch.frombuffer(bytearray(text), dtype=torch.uint8)})


def unpack(data: bytes, kinds: Sequence[type] = ()) -> Any:
    """Read what ``pack`` wrote; tensors are on the CPU.

    Raises:
        LookupError, TypeError, ValueError, SafetensorError: it did not write that.
    """
    tensors = load(data)
    described = json.loads(tensors.pop(TEXT).numpy().tobytes())
    return _restore(described, {kind.__name__: kind for kind in kinds}, tensors)


def _describe(value: Any, kinds: tuple[type, ...], tensors: dict[str, Tensor]) -> Any:
    """The value as JSON; its tensors are put into ``tensors`` by number. What is no list has one key."""

    def each(values: Any) -> list[Any]:
        return [_describe(item, kinds, tensors) for item in values]

    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors[str(len(tensors))] = value.detach().cpu().clone().contiguous()
        return {"tensor": str(len(tensors) - 1)}
    if type(value) is list:
        return each(value)
    if type(value) is tuple:
        return {"tuple": each(value)}
    if type(value) is dict:
        return {"dict": [each(pair) for pair in value.items()]}
    if type(value) not in kinds:
        raise TypeError(f"a {type(value).__name__} cannot be written")
    fields = (
        value if isinstance(value, tuple) else [getattr(value, f.name) for f in dataclasses.fields(value)]
    )
    return {"kind": [type(value).__name__, *each(fields)]}


def _restore(described: Any, kinds: dict[str, type], tensors: dict[str, Tensor]) -> Any:
    if isinstance(described, list):
        return [_restore(item, kinds, tensors) for item in described]
    if not isinstance(described, dict):
        return described
    ((what, given),) = described.items()
    if what == "tensor":
        return tensors[given]
    items = _restore(given, kinds, tensors)
    if what == "kind":
        return kinds[items[0]](*items[1:])
    return {"tuple": tuple, "dict": dict}[what](items)
