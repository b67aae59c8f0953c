"""The ops on GPU tensors: Triton kernels, imported at the first call.

Importing Triton takes longer than importing this package. ``select_muted`` and ``mute_`` on the GPU are CUDA
C++.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from neumuter_kernels import _C, reference

_ops = torch.ops.neumuter


def masked_ffn(*arguments: Any) -> Tensor:
    from neumuter_kernels.triton import masked_ffn as kernels

    return kernels.forward(*arguments)


def masked_ffn_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from neumuter_kernels.triton import masked_ffn as kernels

    return kernels.backward(*arguments)


def hard_concrete(*arguments: Any) -> Tensor:
    from neumuter_kernels.triton import hard_concrete as kernels

    return kernels.forward(*arguments)


def hard_concrete_backward(*arguments: Any) -> Tensor:
    from neumuter_kernels.triton import hard_concrete as kernels

    return kernels.backward(*arguments)


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    from neumuter_kernels.triton import token_losses as kernels

    return kernels.cross_entropy_(logits, targets)


def kl_divergence_(logits: Tensor, reference: Tensor) -> Tensor:
    from neumuter_kernels.triton import token_losses as kernels

    return kernels.kl_divergence_(logits, reference)


def select_muted(
    scores: Tensor, widths: Sequence[int], budget: int | None, threshold: float, gamma: float, zeta: float
) -> tuple[Tensor, ...]:
    """Without nvcc at build time: select on the CPU. Waits for the device; the CUDA kernel does not."""
    selected = _ops.select_muted(scores.cpu(), widths, budget, threshold, gamma, zeta)
    return tuple(x.to(scores.device) for x in selected)


def mute_(
    hidden: Tensor, indptr: Tensor, indices: Tensor, gains: Tensor, row_ids: Tensor | None, layer: int
) -> None:
    """Without nvcc at build time: set by set, in plain PyTorch, which waits for the device."""
    flat, sets = hidden.view(-1, hidden.shape[-1]), indptr.shape[0]
    if row_ids is None:
        row_ids = torch.arange(sets, device=hidden.device).repeat_interleave(len(flat) // max(sets, 1))
    row_ids = row_ids.view(-1)
    ends = indptr[:, layer : layer + 2].tolist()
    for row in row_ids.unique().tolist():
        if 0 <= row < sets:
            first, last = ends[row]
            place = (row_ids == row).nonzero(), indices[first:last].long()
            products = flat[place].to(reference.compute_dtype(flat.dtype)) * gains[first:last]
            flat[place] = products.to(flat.dtype)


TRITON_OPS = (
    masked_ffn, masked_ffn_backward,
    hard_concrete, hard_concrete_backward,
    cross_entropy_, kl_divergence_,
)  # fmt: skip

_library = torch.library.Library("neumuter", "IMPL", "CUDA")


def _register(op: Callable[..., object]) -> None:
    def on_device(x: Tensor, *rest: object) -> object:
        if x.get_device() == torch.cuda.current_device():  # where Triton launches; the context takes longer
            return op(x, *rest)
        with torch.cuda.device(x.device):
            return op(x, *rest)

    _library.impl(op.__name__, on_device)


for _op in TRITON_OPS:
    _register(_op)
if not _C.build_info()["cuda"]:
    _register(select_muted)
    _register(mute_)
