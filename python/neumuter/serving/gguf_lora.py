"""Mute sets as LoRA adapters in GGUF, for llama.cpp: made of the weights of the GGUF file they go onto."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from neumuter.files import PathLike, new_file, refuse_existing
from neumuter.mutes.mute_set import MutedLayer, MuteSource, load_mutes
from neumuter.serving.gguf_file import Projection, open_gguf, read_gguf


def export_gguf_lora(file: PathLike, mutes: MuteSource, out: PathLike) -> None:
    """Write a mute set as a LoRA adapter for llama.cpp, onto one GGUF file.

    Each down projection W [d, F] with k muted neurons f gets A [k, F], which picks them, and B [d, k], whose
    columns are (gain − 1)·W[:, f] of the dequantised weights, in float32. llama.cpp multiplies an adapter by
    alpha / rank, but with alpha 0 by 1: so layers can have ranks of their own. Before ``out`` appears, it is
    read back and compared.

    Args:
        file: the GGUF file that the adapter is for; dense FFNs of any kind, of any type.
        mutes: a ``MuteSet``, or the path of a mute file.
        out: the new file; it must not exist.

    Raises:
        ValueError: experts have muted neurons, or the file is none that ``fold_gguf`` can read.
        MuteMismatchError: the set was made for another model.
        FileExistsError: ``out`` exists.
        ImportError: the package gguf is not installed.
        OSError: what was read back is not right, or ``out`` cannot be written.
    """
    file, out = Path(file), Path(out)
    refuse_existing(out)
    mutes = load_mutes(mutes)
    gguf = read_gguf(file, mutes)
    tensors = {}
    for path, layer in mutes.layers.items():
        one = gguf.ffns[path]
        if not one.ffn.is_dense:
            raise ValueError(f"{path} holds experts, which this adapter cannot scale; fold the set instead")
        name = one.down.tensor.name
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = _factorise(one.down, one.width, layer)
    with new_file(out) as temporary:
        _write(temporary, gguf.architecture, tensors)
        reader, _ = open_gguf(temporary)
        found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
        if found.keys() != tensors.keys() or not all(torch.equal(found[x], tensors[x]) for x in tensors):
            raise OSError(f"{temporary} reads back other than it was written; is the disk in order?")


def _factorise(down: Projection, width: int, layer: MutedLayer) -> tuple[Tensor, Tensor]:
    """Compute A [k, F] and B [d, k]."""
    neurons = layer.indices.long()
    a = torch.zeros(len(neurons), width)
    a[torch.arange(len(neurons)), neurons] = 1
    columns = torch.cat([rows[:, 0, neurons] for rows in down.pieces()])
    return a, (columns * (layer.gains - 1)).contiguous()


def _write(path: Path, architecture: str, tensors: Mapping[str, Tensor]) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
