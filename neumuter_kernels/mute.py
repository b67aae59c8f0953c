"""The application of mute sets to activations, in place."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from neumuter_kernels.checks import (
    check_activations,
    check_constant,
    check_int,
    check_not_negated,
    check_row_ids,
    describe,
)
from neumuter_kernels.reference import compute_dtype
from neumuter_kernels.registration import Cuda, register

_mute: Callable[..., None] = torch.ops.neumuter.mute_.default


def mute_(
    hidden: Tensor,
    indptr: Tensor,
    indices: Tensor,
    gains: Tensor,
    row_ids: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """Multiply the muted neurons of one layer by their gains, in place; every token has a set of its own.

    It reads and writes these neurons alone: of about 1 % muted ones, 1 % of ``hidden``. It is for serving
    many mute sets in one batch, whatever computes the activations. It has no gradient.

    Args:
        hidden: [..., F] of T tokens, float32, bfloat16, float16 (or float64), rows of one stride. Products
            are computed in float32 (float64) and rounded once.
        indptr: int32 [S, L + 1], or [L + 1] for S = 1, as ``select_muted`` returns it: the neurons of set s
            in layer l are the slots indptr[s, l] … indptr[s, l + 1] − 1. Sets may lie anywhere and share
            slots.
        indices: int32 [N], neurons in [0, F), each at most once per set and layer.
        gains: float32 [N].
        row_ids: int32 or int64, the set of each token, or −1 for none. None: the tokens are S equal
            consecutive runs. Other ids raise RuntimeError on the CPU; on a GPU, where a check would wait
            for the device, they are skipped. (Built without nvcc, the op waits for the GPU in any case.)
        layer: int in [0, L).

    Returns:
        hidden.

    Raises:
        TypeError, ValueError: an argument is not as above, or hidden or gains are part of an autograd graph.
        RuntimeError: the rows of hidden have no single stride, overlap, or share memory with another
            argument.
    """
    check_activations("hidden", hidden)
    check_constant("hidden", hidden, "and mute_ has no gradient: use masked_act with 'identity'")
    check_not_negated("hidden", hidden)
    tensors = {
        "indptr": (indptr, torch.int32),
        "indices": (indices, torch.int32),
        "gains": (gains, torch.float32),
    }
    for name, (tensor, dtype) in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype:
            raise TypeError(f"{name} must be a {dtype} tensor, got {describe(tensor)}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} like hidden, got {describe(tensor)}")
    check_constant("gains", gains, "and mute_ has no gradient: use masked_act with 'identity'")
    indptr = indptr.unsqueeze(0) if indptr.dim() == 1 else indptr
    if indptr.dim() != 2 or indptr.shape[1] < 2:
        raise ValueError(f"indptr must have shape [S, L + 1] or [L + 1], got {list(indptr.shape)}")
    if indices.dim() != 1 or indices.shape != gains.shape:
        raise ValueError(
            f"indices and gains must both be [N], got {list(indices.shape)} and {list(gains.shape)}"
        )
    check_int("layer", layer, indptr.shape[1] - 1)
    tokens = hidden.shape[:-1].numel()
    if row_ids is not None:
        check_row_ids(row_ids, tokens, hidden.device)
    elif not len(indptr) or tokens % len(indptr):
        raise ValueError(f"without row_ids the {tokens} tokens must split into {len(indptr)} equal runs")
    _mute(hidden, indptr, indices, gains, row_ids, layer)
    # Autograd must not use hidden as it was before, which another node may have saved.
    increment_version(hidden)
    return hidden


def _fake(
    hidden: Tensor, indptr: Tensor, indices: Tensor, gains: Tensor, row_ids: Tensor | None, layer: int
) -> None:
    pass


def mute_in_pytorch(
    hidden: Tensor, indptr: Tensor, indices: Tensor, gains: Tensor, row_ids: Tensor | None, layer: int
) -> None:
    """The op set by set, in plain PyTorch. It waits for the device, which the CUDA code does not."""
    sets, width = indptr.shape[0], hidden.shape[-1]
    if not hidden.numel():
        return
    flat = hidden.view(-1, width)
    if len(flat) > 1 and flat.stride(0) < width:
        raise RuntimeError("hidden must have rows of one stride that do not overlap")
    if row_ids is None:
        row_ids = torch.arange(sets, device=hidden.device).repeat_interleave(len(flat) // max(sets, 1))
    row_ids = row_ids.reshape(-1)
    ends = indptr[:, layer : layer + 2].tolist()
    for row in row_ids.unique().tolist():
        if 0 <= row < sets:
            first, last = ends[row]
            neurons, factors = indices[first:last].long(), gains[first:last]
            # An index out of range would end the CUDA context, or count from the end.
            inside = (neurons >= 0) & (neurons < width)
            place = (row_ids == row).nonzero(), neurons[inside]
            products = flat[place].to(compute_dtype(flat.dtype)) * factors[inside]
            flat[place] = products.to(flat.dtype)


register("mute_", fake=_fake, gpu=Cuda(mute_in_pytorch, "plain PyTorch"), vectorised=False)
