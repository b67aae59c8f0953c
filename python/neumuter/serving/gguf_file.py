"""The FFNs of a GGUF file: where the tensors of each are, and whether a mute set was made for them.

The package ``gguf`` of llama.cpp reads the file's header and dequantises; transformers knows which model it
is, and builds it without weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from neumuter.models.families import find_ffns
from neumuter.models.ffn import FFN, Layout
from neumuter.mutes.fingerprint import SKETCHED, sketch_rows
from neumuter.mutes.matching import refuse_adapter, refuse_other, sketches_differ, structure_differs
from neumuter.mutes.mute_set import MuteSet
from neumuter.serving.edits import read

# How far each type's weights may be from those that it was made from, as a share of their length: twice what
# llama.cpp's quantisers do to normal weights, because a sketch of 32 numbers is off by up to half. Weights of
# another model are 140 % away. The types for ternary weights hold such weights exactly.
TOLERANCES = {
    "F32": 0.02, "F16": 0.02, "BF16": 0.02, "Q8_0": 0.02, "Q6_K": 0.04, "Q5_0": 0.09, "Q5_1": 0.08,
    "Q5_K": 0.08, "Q4_0": 0.18, "Q4_1": 0.16, "Q4_K": 0.15, "IQ4_NL": 0.16, "IQ4_XS": 0.16, "MXFP4": 0.24,
    "NVFP4": 0.24, "Q3_K": 0.32, "IQ3_S": 0.28, "IQ3_XXS": 0.4, "Q2_K": 0.54, "IQ2_S": 0.55, "IQ2_XS": 0.6,
    "IQ2_XXS": 0.7, "IQ1_M": 0.9, "IQ1_S": 0.98, "TQ1_0": 0.02, "TQ2_0": 0.02,
}  # fmt: skip
# Weights that are dequantised at a time.
WEIGHTS_AT_A_TIME = 1 << 24
# In llama.cpp, models of these types have the other type's architecture. Their FFNs are the same.
STORED_AS = {"mistral": "llama"}
# What transformers does not read of a file's metadata, though the widths of experts are there.
EXPERT_WIDTHS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


@dataclass(frozen=True)
class Projection:
    """A projection of one FFN, or of its experts, in a GGUF file.

    tensor: gguf's ``ReaderTensor``. experts: their number, 1 if dense. rows: of each.
    """

    file: Path
    tensor: Any
    experts: int
    rows: int

    @property
    def kind(self) -> str:
        """The name of its type, such as "Q4_K"."""
        name: str = self.tensor.tensor_type.name
        return name

    @property
    def row_bytes(self) -> int:
        return int(self.tensor.n_bytes) // (self.experts * self.rows)

    @property
    def block_bytes(self) -> int:
        from gguf.constants import GGML_QUANT_SIZES

        size: int = GGML_QUANT_SIZES[self.tensor.tensor_type][1]
        return size

    def begin(self, row: int) -> int:
        """Where a row of any expert begins in the file."""
        return int(self.tensor.data_offset) + row * self.row_bytes

    def pieces(self) -> Iterator[Tensor]:
        """Dequantise piece by piece: float32 [rows, E, inputs]."""
        step = max(1, WEIGHTS_AT_A_TIME // (self.experts * int(self.tensor.shape[0])))
        for start in range(0, self.rows, step):
            yield self.weights(start, min(start + step, self.rows)).permute(1, 0, 2)

    def weights(self, start: int, stop: int) -> Tensor:
        """Dequantise rows ``start`` to ``stop`` of each expert: float32 [E, rows, inputs]."""
        firsts = [expert * self.rows for expert in range(self.experts)]
        parts = [read(self.file, self.begin(first + start), self.begin(first + stop)) for first in firsts]
        return self.dequantised(b"".join(parts)).view(self.experts, stop - start, -1)

    def dequantised(self, data: bytes | bytearray) -> Tensor:
        """Dequantise the bytes of whole rows: float32."""
        from gguf import dequantize

        weights = dequantize(np.frombuffer(data, np.uint8), self.tensor.tensor_type)
        return torch.from_numpy(weights.copy())


@dataclass(frozen=True)
class GgufFFN:
    """One FFN of a GGUF file. ``ffn`` belongs to a model on the meta device; ``bias`` is of ``up``.

    ``up`` holds the gate projection in its first half if it is packed.
    """

    ffn: FFN
    up: Projection
    down: Projection
    bias: bool

    @property
    def width(self) -> int:
        """F: the neurons of one expert."""
        return int(self.down.tensor.shape[0])

    @property
    def is_gated(self) -> bool:
        layout = self.ffn.layout
        if isinstance(layout, Layout):
            return bool(layout.gate or layout.gate_up)
        return bool(cast(Any, self.ffn.module).has_gate)

    def up_rows(self, neurons: Tensor) -> list[int]:
        """Find the rows of ``up``, counted over all experts, that make ``neurons``, integers [n]."""
        expert, neuron = neurons.long() // self.width, neurons.long() % self.width
        rows: list[int] = ((expert + 1) * self.up.rows - self.width + neuron).tolist()
        return rows


@dataclass(frozen=True)
class GgufFile:
    """What a file holds: ``architecture``, llama.cpp's name, and ``ffns``, {path in the model: GgufFFN}."""

    architecture: str
    ffns: dict[str, GgufFFN]


def read_gguf(file: Path, mutes: MuteSet) -> GgufFile:
    """Find the FFNs that ``mutes`` was made on, and compare their weights with its.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: the file is damaged, one of several, or holds an architecture or tensors that are not
            known; or the set was made with an adapter.
        MuteMismatchError: the set was made for another model.
    """
    refuse_adapter(mutes, file)
    reader, architecture = open_gguf(file)
    model = _build(file, reader, architecture, mutes)
    ffns = {ffn.path: ffn for ffn in find_ffns(model)}
    refuse_other(structure_differs(model, ffns, mutes))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = _names(architecture, int(reader.get_field(f"{architecture}.block_count").contents()))
    found = {path: _locate(file, ffns[path], tensors, names) for path in mutes.widths}
    refuse_other([text for path, one in found.items() for text in _weights_differ(path, one, mutes)])
    return GgufFile(architecture, found)


def open_gguf(file: Path) -> tuple[Any, str]:
    """Read a GGUF file's header; returns gguf's reader and the architecture."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("reading GGUF files needs the package gguf: pip install gguf") from error
    with open(file, "rb") as start:
        if start.read(4) != b"GGUF":
            raise ValueError(f"{file} is not a GGUF file")
    try:
        reader = GGUFReader(file)
        architecture = str(reader.get_field("general.architecture").contents())
        split = reader.get_field("split.count")
        parts = int(split.contents()) if split else 1
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{file} cannot be read: {error}; it is damaged, or of a newer kind") from error
    if reader.byte_order != "I":
        raise ValueError(f"{file} is stored in the other order of bytes")
    if parts > 1:
        raise ValueError(f"{file} is one of {parts} parts; merge them first: llama-gguf-split --merge")
    return reader, architecture


def _build(file: Path, reader: Any, architecture: str, mutes: MuteSet) -> nn.Module:
    """Build the model of a GGUF file on the meta device."""
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{file}: transformers cannot read the architecture {architecture} from GGUF ({error}); fold "
            "into the checkpoint that it was made from, and convert that"
        ) from error
    for key, attribute in EXPERT_WIDTHS.items():
        if (field := reader.get_field(f"{architecture}.{key}")) and hasattr(config, attribute):
            setattr(config, attribute, field.contents())
    wanted = mutes.architecture["model_type"]
    if STORED_AS.get(wanted) == config.model_type:
        options = config.to_dict()
        for key in ("model_type", "architectures"):
            options.pop(key, None)
        config = AutoConfig.for_model(wanted, **options)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def _names(architecture: str, blocks: int) -> Any:
    """The names that llama.cpp gives to modules: gguf's ``TensorNameMap``."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    return get_tensor_name_map(known[architecture], blocks)


def _locate(file: Path, ffn: FFN, tensors: Mapping[str, Any], names: Any) -> GgufFFN:
    """Find the tensors of an FFN.

    Raises:
        ValueError: they have other names, or other shapes.
    """
    if isinstance(ffn.layout, Layout):
        ups, experts = [ffn.layout.up or ffn.layout.gate_up], 1
    else:
        ups, experts = ["up_proj", "gate_up_proj"], ffn.experts
    width = ffn.width // experts

    def find(children: list[str | None], *rows: int) -> tuple[str, Projection]:
        found = [names.get_name(f"{ffn.path}.{child}") for child in children]
        name = next((name for name in found if name and f"{name}.weight" in tensors), None)
        if name is None:
            raise ValueError(f"the file has no tensor for {ffn.path}.{children[0]} that gguf has a name for")
        tensor = tensors[f"{name}.weight"]
        # gguf gives the innermost dimension first.
        shape = [int(size) for size in tensor.shape]
        if (
            len(shape) != (2 if experts == 1 else 3)
            or shape[1] not in rows
            or shape[2:] not in ([], [experts])
        ):
            raise ValueError(f"{name}.weight has shape {shape[::-1]}, which does not fit {ffn.path}")
        return name, Projection(file, tensor, experts, shape[1])

    name, up = find(ups, width, 2 * width)
    _, down = find([ffn.layout.down], int(up.tensor.shape[0]))
    if int(down.tensor.shape[0]) != width:
        raise ValueError(f"{down.tensor.name} has rows of {down.tensor.shape[0]}, not {width} neurons")
    return GgufFFN(ffn, up, down, f"{name}.bias" in tensors)


def _weights_differ(path: str, one: GgufFFN, mutes: MuteSet) -> list[str]:
    down, layer = one.down, mutes.layers.get(path)
    if down.kind not in TOLERANCES:
        raise ValueError(f"{down.tensor.name} is of type {down.kind}, which is not known")
    selections = [None] if layer is None else [None, layer.indices]
    shape = down.rows, down.experts, one.width
    found = sketch_rows(down.pieces(), shape, *selections)
    return sketches_differ(path, dict(zip(SKETCHED, found, strict=False)), mutes, TOLERANCES[down.kind])
