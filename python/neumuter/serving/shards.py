"""Where the tensors of a checkpoint are in its safetensors files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from neumuter.serving.edits import read

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Place:
    """Where a tensor is: bytes ``begin`` to ``end`` of the file ``shard``.

    ``dtype`` is the name that safetensors has for it.
    """

    shard: Path
    begin: int
    end: int
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> bytearray:
        return read(self.shard, self.begin, self.end)


def find_shards(folder: Path) -> list[Path]:
    """Find the safetensors files that transformers would load from ``folder``.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the index names files outside of the folder.
    """
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise FileNotFoundError(f"{folder} has neither {SAFE_WEIGHTS_NAME} nor {index.name}")
    content = json.loads(index.read_text())
    where = content.get("weight_map") if isinstance(content, dict) else None
    names = list(where.values()) if isinstance(where, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{index} must name shards in its own folder, it names {names[:4]}")
    return [folder / name for name in sorted(set(names))]


def find_places(shards: Sequence[Path]) -> dict[str, Place]:
    """Find all tensors of ``shards``, {name: Place}.

    Raises:
        ValueError: a file is damaged, or two hold the same tensor.
    """
    places: dict[str, Place] = {}
    for shard in shards:
        found = _read_header(shard)
        if twice := places.keys() & found.keys():
            raise ValueError(f"{shard} holds {min(twice)}, which another shard of {shard.parent} holds too")
        places.update(found)
    return places


def _read_header(shard: Path) -> dict[str, Place]:
    try:
        with safe_open(shard, framework="pt"):
            # Opening it checks every name, dtype, shape and offset.
            pass
    except SafetensorError as error:
        raise ValueError(f"{shard} is not a valid safetensors file: {error}") from error
    with open(shard, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: Place(shard, 8 + size + begin, 8 + size + end, x["dtype"], tuple(x["shape"]))
        for name, x in header.items()
        for begin, end in [x["data_offsets"]]
    }
