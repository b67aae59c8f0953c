"""A safetensors file whose header holds JSON, and which may come from a stranger."""

import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from neumuter.files import PathLike, write_atomically

MAX_FILE_BYTES = 1 << 28
# Parsed, a header takes up to 25 times its size in memory.
MAX_HEADER_BYTES = 1 << 24

T = TypeVar("T")


class MuteFileError(ValueError):
    """A mute file, or a file of slopes, that is damaged, of an unknown version, or something else."""


def write_file(
    path: PathLike, tensors: dict[str, Tensor], entry: str, metadata: dict[str, Any], private: bool = False
) -> None:
    """Write ``tensors`` with ``metadata``, JSON values, as the ``entry`` of the header, whole or not at all.

    Raises:
        OSError: the file cannot be written.
        ValueError: the file would be larger than ``read_file`` takes, or its header.
    """
    data = to_safetensors(tensors, metadata={entry: to_json(metadata)})
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"its {len(data)} bytes could not be read again: {MAX_FILE_BYTES} are the most")
    _check_header(data)
    write_atomically(path, data, private)


def read_file(path: PathLike, what: str, entry: str, read: Callable[[Any, dict[str, Any]], T]) -> T:
    """Return what ``read`` makes of the open file and the ``entry`` of its header, a dict.

    Args:
        what: "mute file", for errors.

    Raises:
        MuteFileError: the file is not as ``write_file`` writes it, or ``read`` raised an error.
        OSError: the file cannot be read.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise MuteFileError(f"{path} is not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise MuteFileError(f"{path} has {status.st_size} bytes, a {what} at most {MAX_FILE_BYTES}")
    try:
        with open(path, "rb") as start:
            _check_header(start.read(8))
        with safe_open(Path(path), framework="pt") as file:
            text = (file.metadata() or {}).get(entry)
            if text is None:
                raise ValueError(f"its header has no entry {entry!r}")
            metadata = json.loads(
                text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
            )
            if not isinstance(metadata, dict):
                raise ValueError(f"the entry {entry!r} of its header is not a dict")
            return read(file, metadata)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MuteFileError(f"{path} is not a valid {what}: {error}") from error


def to_json(value: object) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))


def check_keys(what: str, value: object, keys: str) -> None:
    """Raise ValueError unless ``value`` is a dict with exactly these keys, separated by spaces."""
    if not isinstance(value, dict) or set(value) != set(keys.split()):
        raise ValueError(f"{what} must have exactly the entries {keys}")


def _check_header(data: bytes) -> None:
    """Check the size of a safetensors file's header, with which its ``data`` begins."""
    size = int.from_bytes(data[:8], "little")
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {size} bytes, that of a mute file at most {MAX_HEADER_BYTES}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("its header names an entry twice")
    return result


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_constant(text)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"its header holds {name}")
