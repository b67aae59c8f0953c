"""Mute sets and the mute file: which neurons of which model are multiplied by what."""

import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from neumuter.files import PathLike, without_nan
from neumuter.mutes.container import check_keys, read_file, to_json, write_file
from neumuter.types import check_kind

FORMAT = 1
# Of the header that holds what is no tensor.
ENTRY = "neumuter"
# Numbers in a sketch of weights, see neumuter.mutes.fingerprint.
SKETCHES = 32
MODES = ("mute", "modulate")
MAX_LAYERS = 1 << 14
MAX_WIDTH = 1 << 24
_PATH = re.compile(r"\w{1,64}(\.\w{1,64}){0,31}", re.ASCII)
_NAME = re.compile(r"[\w.-]{1,128}", re.ASCII)


class MutedLayer(NamedTuple):
    """Muted neurons of one FFN: ``indices`` int32 [n] ascending, ``gains`` float32 [n], on the CPU."""

    indices: torch.Tensor
    gains: torch.Tensor


@dataclass(frozen=True, eq=False)
class MuteSet:
    """Selected neurons with their gains, bound to the model that they were made for.

    Args:
        layers: {FFN module path: MutedLayer}, only FFNs with muted neurons.
        widths: {path: F} of every masked FFN, in model order.
        architecture: {"class": the model's class name, "model_type": that of its config}.
        fingerprint: {path: sketches} for every masked FFN, see ``neumuter.mutes.fingerprint``.
        mode: "mute" or "modulate".
        gain_range: the lowest and the highest gain that the mode allows.
        method: hyper-parameters, JSON values.
        metrics: {"before": {...}, "after": {...}}, JSON values.
        adapter: {path: sketches} of some projections that an adapter changed, without it and then with it;
            empty for a model without an adapter.

    Raises:
        ValueError: anything in it is not as described.
    """

    layers: dict[str, MutedLayer]
    widths: dict[str, int]
    architecture: dict[str, str]
    fingerprint: dict[str, list[float]]
    mode: str = "mute"
    gain_range: tuple[float, float] = (0.0, 1.0)
    method: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    metrics: dict[str, Any] = field(default_factory=lambda: {"before": {}, "after": {}})
    adapter: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_metadata(self)
        for path, layer in self.layers.items():
            if path not in self.widths:
                raise ValueError(f"layers has {path!r}, which is not among the masked FFNs in widths")
            check_layer(path, layer, self.widths[path], self.gain_range)
        if not self.layers:
            raise ValueError("no neuron is muted: layers is empty")

    def __repr__(self) -> str:
        total = sum(self.widths.values())
        return (
            f"MuteSet({self.count} of {total} neurons, {self.share:.2%}, in {len(self.layers)} of "
            f"{len(self.widths)} FFNs of {self.architecture['class']}, mode {self.mode!r})"
        )

    @property
    def count(self) -> int:
        """The number of muted neurons."""
        return sum(len(layer.indices) for layer in self.layers.values())

    @property
    def share(self) -> float:
        """Muted neurons as a share of all neurons of the masked FFNs."""
        return self.count / sum(self.widths.values())

    def save(self, path: PathLike) -> None:
        """Write the mute file, whole or not at all; equal content gives equal bytes.

        Raises:
            OSError: the file cannot be written.
            ValueError: method and metrics are too large for a file's header.
        """
        tensors, metadata = self.contents()
        write_file(path, tensors, ENTRY, metadata)

    def contents(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the tensors of a mute file and the rest of it, JSON values."""
        tensors = {}
        for name, layer in self.layers.items():
            # A file holds no tensors that share their memory.
            for part, value in (("indices", layer.indices), ("gains", layer.gains)):
                tensors[f"{name}.{part}"] = value.clone(memory_format=torch.contiguous_format)
        metadata = {
            "format": FORMAT,
            "architecture": self.architecture,
            "mode": self.mode,
            "gain_range": list(self.gain_range),
            "layers": [
                {
                    "path": name,
                    "width": width,
                    "muted": len(self.layers[name].indices) if name in self.layers else 0,
                    "sketch": self.fingerprint[name],
                }
                for name, width in self.widths.items()
            ],
            "method": self.method,
            "seed": self.seed,
            "metrics": without_nan(self.metrics),
        }
        if self.adapter:
            metadata["adapter"] = self.adapter
        return tensors, metadata

    @classmethod
    def load(cls, path: PathLike) -> "MuteSet":
        """Read and fully validate a mute file.

        Raises:
            MuteFileError: the file is anything but a mute file of this format.
            OSError: the file cannot be read.
        """
        return read_file(path, "mute file", ENTRY, cls.from_contents)

    @classmethod
    def from_bytes(cls, data: bytes) -> "MuteSet":
        """Read and fully validate the content of a mute file.

        Raises:
            MuteFileError: it is anything but that of a mute file of this format.
        """
        # safetensors reads the metadata of files alone.
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            return cls.load(file.name)

    @classmethod
    def from_contents(cls, file: Any, metadata: dict[str, Any], others: Sequence[str] = ()) -> "MuteSet":
        """Return the MuteSet that ``contents`` described, fully validated.

        Args:
            file: an open safetensors file. others: tensors in it that are none of the MuteSet's.

        Raises:
            ValueError: anything in it is not as described.
        """
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"format version {metadata.get('format')!r}, this version of neumuter reads {FORMAT}"
            )
        adapter = metadata.pop("adapter", {})
        check_keys("metadata", metadata, "format architecture mode gain_range layers method seed metrics")
        rows = metadata["layers"]
        if not isinstance(rows, list) or len(rows) > MAX_LAYERS:
            raise ValueError(f"layers is not a list of at most {MAX_LAYERS}")
        for row in rows:
            check_keys("an entry of layers", row, "path width muted sketch")
            if type(row["path"]) is not str or type(row["muted"]) is not int:
                raise ValueError("an entry of layers has no text path or no integer muted")
        if len({row["path"] for row in rows}) != len(rows):
            raise ValueError("layers names a path twice")
        counts = {row["path"]: row["muted"] for row in rows if row["muted"] != 0}
        expected = {f"{name}.{kind}" for name in counts for kind in ("indices", "gains")}
        if set(file.keys()) != expected.union(others):
            raise ValueError(
                f"tensors {sorted(set(file.keys()) ^ expected.union(others))[:4]} do not agree with the "
                "header"
            )
        layers = {}
        for name, count in counts.items():
            for kind in ("indices", "gains"):
                shape = file.get_slice(f"{name}.{kind}").get_shape()
                if shape != [count]:
                    raise ValueError(f"{name}.{kind} has shape {shape}, the header says {count} neurons")
            # These are copies, so that what is validated does not change when somebody writes to the file.
            indices, gains = (file.get_tensor(f"{name}.{kind}").clone() for kind in ("indices", "gains"))
            layers[name] = MutedLayer(indices, gains)
        if not isinstance(metadata["gain_range"], list):
            raise ValueError("gain_range is not a list")
        return cls(
            layers=layers,
            widths={row["path"]: row["width"] for row in rows},
            fingerprint={row["path"]: row["sketch"] for row in rows},
            gain_range=tuple(metadata["gain_range"]),
            adapter=adapter,
            **{key: metadata[key] for key in ("architecture", "mode", "method", "seed", "metrics")},
        )


# A mute set, or the path of a mute file.
MuteSource = MuteSet | PathLike


def load_mutes(mutes: MuteSource) -> MuteSet:
    """Return a ``MuteSet``, given that or the path of a mute file."""
    check_kind("mutes", mutes, (MuteSet, str, os.PathLike), "a MuteSet or the path of a mute file")
    return mutes if isinstance(mutes, MuteSet) else MuteSet.load(mutes)


def _check_metadata(mutes: MuteSet) -> None:
    if not isinstance(mutes.architecture, dict):
        raise ValueError(f"architecture must be a dict, got {type(mutes.architecture).__name__}")
    check_keys("architecture", mutes.architecture, "class model_type")
    for key, name in mutes.architecture.items():
        if type(name) is not str or not _NAME.fullmatch(name):
            raise ValueError(f"architecture[{key!r}] must be a name, got {name!r:.80}")
    if mutes.mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mutes.mode!r:.80}")
    if len(mutes.gain_range) != 2 or not all(_is_finite(g) for g in mutes.gain_range):
        raise ValueError(f"gain_range must be two finite numbers, got {mutes.gain_range!r:.80}")
    if mutes.gain_range[0] > mutes.gain_range[1]:
        raise ValueError(f"gain_range must be (lowest, highest), got {mutes.gain_range!r}")
    if mutes.mode == "mute" and not 0 <= mutes.gain_range[0] <= mutes.gain_range[1] <= 1:
        raise ValueError(f"mode 'mute' has gains from 0 to 1, got gain_range {mutes.gain_range!r}")
    for path, width in mutes.widths.items():
        if type(path) is not str or not _PATH.fullmatch(path):
            raise ValueError(f"widths: {path!r:.80} is not a module path")
        if type(width) is not int or not 0 < width <= MAX_WIDTH:
            raise ValueError(f"widths[{path!r}] must be an int from 1 to {MAX_WIDTH}, got {width!r:.80}")
    if mutes.fingerprint.keys() != mutes.widths.keys():
        raise ValueError("fingerprint and widths must name the same FFNs")
    for path, values in mutes.fingerprint.items():
        _check_sketches(f"fingerprint[{path!r}]", values, SKETCHES * (2 if path in mutes.layers else 1))
    if not isinstance(mutes.adapter, dict) or len(mutes.adapter) > MAX_LAYERS:
        raise ValueError(f"adapter must be a dict of at most {MAX_LAYERS}")
    for path, values in mutes.adapter.items():
        if type(path) is not str or not _PATH.fullmatch(path):
            raise ValueError(f"adapter: {path!r:.80} is not a module path")
        _check_sketches(f"adapter[{path!r}]", values, 2 * SKETCHES)
    if type(mutes.seed) is not int or not -(2**63) <= mutes.seed < 2**64:
        raise ValueError(f"seed must be an integer of 64 bits, got {mutes.seed!r:.80}")
    for name in ("method", "metrics"):
        value = getattr(mutes, name)
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a dict, got {type(value).__name__}")
        try:
            to_json(without_nan(value) if name == "metrics" else value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} must hold JSON values only: {error}") from None


def _check_sketches(name: str, values: object, count: int) -> None:
    if type(values) is not list or len(values) != count or not all(map(_is_finite, values)):
        raise ValueError(f"{name} must be a list of {count} finite numbers")


def check_layer(path: str, layer: MutedLayer, width: int, gain_range: tuple[float, float]) -> None:
    """Raise ValueError, naming ``path``, unless ``layer`` fits an FFN of ``width`` neurons."""
    indices, gains = layer
    for name, tensor, dtype in (("indices", indices, torch.int32), ("gains", gains, torch.float32)):
        if tensor.dtype != dtype or tensor.dim() != 1 or tensor.device.type != "cpu":
            raise ValueError(
                f"{path}.{name} must be {dtype} [n] on the CPU, got {tensor.dtype} {tuple(tensor.shape)} on "
                f"{tensor.device}"
            )
    if len(indices) != len(gains) or len(indices) == 0:
        raise ValueError(
            f"{path} has {len(indices)} indices and {len(gains)} gains; it needs a gain per index"
        )
    if indices[0] < 0 or indices[-1] >= width or (indices[1:] <= indices[:-1]).any():
        raise ValueError(f"{path}.indices must ascend within [0, {width})")
    # An int may have more bits than a tensor compares with.
    low, high = map(float, gain_range)
    # NaN compares false. Infinity may compare equal, because low and high are rounded to float32.
    if not ((gains >= low) & (gains <= high) & gains.isfinite()).all():
        raise ValueError(f"{path}.gains must be finite and lie within {low} to {high}")


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e300 and math.isfinite(value)
