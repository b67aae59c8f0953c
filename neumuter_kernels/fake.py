"""Fake kernels: the shapes and dtypes that each op returns, for torch.compile and meta tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from neumuter_kernels.reference import Layout, compute_dtype


def _empty(x: Tensor, wanted: bool = True) -> Tensor:
    return x.new_empty(x.shape if wanted else (0,))


@torch.library.register_fake("neumuter::masked_ffn")
def _(
    gate: Tensor, up: Tensor | None, mask: Tensor, row_ids: Tensor | None, activation: int, layout: int
) -> Tensor:
    return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // (2 if Layout(layout).packed else 1)))


@torch.library.register_fake("neumuter::masked_ffn_backward")
def _(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    mask: Tensor,
    row_ids: Tensor | None,
    activation: int,
    layout: int,
    input_grad: bool,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(gate, input_grad), _empty(gate, input_grad and up is not None), _empty(mask, mask_grad)


@torch.library.register_fake("neumuter::hard_concrete")
def _(scores: Tensor, sample_ids: Tensor, *settings: object) -> Tensor:
    return scores.new_empty((sample_ids.shape[0], scores.shape[0]))


@torch.library.register_fake("neumuter::hard_concrete_backward")
def _(grad: Tensor, scores: Tensor, *settings: object) -> Tensor:
    return _empty(scores)


@torch.library.register_fake("neumuter::select_muted")
def _(
    scores: Tensor, widths: Sequence[int], budget: int | None, threshold: float, gamma: float, zeta: float
) -> tuple[Tensor, Tensor, Tensor]:
    n = scores.shape[0]
    capacity = n if budget is None else min(budget, n)
    return (
        scores.new_empty((len(widths) + 1,), dtype=torch.int32),
        scores.new_empty((capacity,), dtype=torch.int32),
        scores.new_empty((capacity,)),
    )


@torch.library.register_fake("neumuter::mute_")
def _(
    hidden: Tensor, indptr: Tensor, indices: Tensor, gains: Tensor, row_ids: Tensor | None, layer: int
) -> None:
    pass


@torch.library.register_fake("neumuter::cross_entropy_")
@torch.library.register_fake("neumuter::kl_divergence_")
def _(logits: Tensor, _: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=compute_dtype(logits.dtype))
