"""What a model computes with: a few facts in words, and a digest of each of its tensors.

Equal bytes have equal digests, in every layout: a tensor that is split over processes has that of the whole.
Other bytes have other digests, but for a chance of less than one in a billion. What is in no tensor, such as
the number of experts for each token, is in the config.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from neumuter.models.devices import is_offloaded, load_offloaded
from neumuter.models.families import input_device, unwrapped
from neumuter.models.quantised import find_quantisation

# Bytes that are summed up at a time.
PIECE = 1 << 20
# Hexadecimal digits of a digest.
DIGITS = 16
# What a config says of where a model is from, of what it is to return, and of what is described beside it.
BESIDE = (
    "_name_or_path", "transformers_version", "architectures", "model_type", "dtype", "quantization_config",
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "id2label", "label2id",
)  # fmt: skip
# What PEFT says of what a layer adds to its base.
ADAPTER_FACTS = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")


def describe_model(model: nn.Module) -> dict[str, str]:
    """Describe what a result depends on besides the tensors: {fact: value}, the same in every layout."""
    network = unwrapped(model)
    config = getattr(network, "config", None)
    adapters = [
        (path, *(getattr(module, name) for name in ADAPTER_FACTS))
        for path, module in network.named_modules()
        if all(hasattr(module, name) for name in ADAPTER_FACTS)
    ]
    settings = config.to_dict() if config else {}
    return {
        "the model's architecture": str(getattr(config, "model_type", "")),
        "the model's dtype": str(getattr(network, "dtype", "")),
        "the model's attention": str(getattr(config, "_attn_implementation", "")),
        "the model's quantisation": json.dumps(find_quantisation(config), sort_keys=True, default=str),
        "the model's device": input_device(network).type,
        "the model's adapters": _shorten(hashlib.sha256(repr(adapters).encode())) if adapters else "",
    } | {
        f"the model's {name}": json.dumps(value, sort_keys=True, default=str)
        for name, value in settings.items()
        if name not in BESIDE
    }


def describe_tensors(model: nn.Module) -> str:
    """Hash the names, dtypes and shapes of the tensors of a model, of which no values are read."""
    found = [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in _find_tensors(model)]
    return _shorten(hashlib.sha256(json.dumps(found).encode()))


@torch.no_grad()
def digest_weights(model: nn.Module) -> dict[str, str]:
    """Hash each parameter and buffer of a model: {name: digest}.

    Reads each byte once where the tensor is. Parts of split tensors are gathered, one matrix after the other
    (FSDP2: one parameter), so all processes that share the model must call it.
    """
    return {name: _digest(tensor) for name, tensor in _find_tensors(model)}


def _find_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, and what quantised weights are scaled by; offloaded ones are loaded."""
    network = unwrapped(model)
    # The state has what libraries keep beside quantised weights, and not the buffers that the config makes.
    tensors = dict(network.named_buffers()) | network.state_dict()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            path, _, own = name.rpartition(".")
            module = network.get_submodule(path)
            tensor = load_offloaded(module, own) if is_offloaded(module) else tensor
        # torch.compile adds this to paths.
        yield name.replace("_orig_mod.", ""), tensor.detach()


def _digest(tensor: Tensor) -> str:
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    if isinstance(tensor, DTensor) or not hasattr(tensor, "__tensor_flatten__"):
        sums = [part for matrix in _matrices(tensor) for part in _sums(matrix)]
        found.update(torch.stack(sums).cpu().numpy().tobytes() if sums else b"")
    else:
        # torchao's tensors are made of others.
        for name in tensor.__tensor_flatten__()[0]:
            found.update(_digest(getattr(tensor, name)).encode())
    return _shorten(found)


def _shorten(found: Any) -> str:
    return str(found.hexdigest()[:DIGITS])


def _matrices(tensor: Any) -> Iterator[Tensor]:
    """The tensor; or of experts one after the other, because a GPU may not hold those of all processes."""
    if tensor.dim() < 3:
        yield _gathered(tensor)
        return
    if isinstance(tensor, DTensor):
        # FSDP2 splits along dimension 0, and gathers whole parameters in a forward pass, too.
        kept = [Replicate() if placement.is_shard(0) else placement for placement in tensor.placements]
        tensor = tensor.redistribute(placements=kept)
    yield from map(_gathered, tensor)


def _gathered(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def _sums(matrix: Tensor) -> Iterator[Tensor]:
    """Of each piece the sum of its words of 4 bytes, each times a random number: int64 [], modulo 2^64."""
    if matrix.is_meta:
        return
    data = matrix.contiguous().flatten().view(torch.uint8)
    whole = len(data) // 4 * 4
    # Words begin at multiples of 4 bytes.
    data = data.clone() if data.storage_offset() % 4 else data
    factors = _factors(data.device)
    # New memory for each product would take most of the time on a CPU.
    products = torch.empty_like(factors)
    for piece in (*data[:whole].split(PIECE), F.pad(data[whole:], (0, whole + 4 - len(data)))):
        words = piece.view(torch.int32)
        yield torch.mul(words, factors[: len(words)], out=products[: len(words)]).sum()


@functools.lru_cache(maxsize=1)
def _factors(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (PIECE // 4,), generator=generator).to(device)
