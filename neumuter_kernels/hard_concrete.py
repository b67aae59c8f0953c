"""Hard-concrete gates of neurons, which are the masks in training."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from neumuter_kernels.checks import check_int, describe
from neumuter_kernels.registration import Gradient, Triton, register

_backward: Callable[..., Tensor] = torch.ops.neumuter.hard_concrete_backward.default


def hard_concrete(
    scores: Tensor,
    rows: int,
    seed: int,
    step: int | Tensor,
    layer: int,
    sample_ids: Tensor | None = None,
    temperature: float = 1 / 3,
    stretch: tuple[float, float] = (-0.1, 1.1),
    training: bool = True,
) -> Tensor:
    """Hard-concrete gates of FFN neurons: samples in training, without noise otherwise.

    Training: z = clamp(σ((logit ν + s)/β)·(ζ − γ) + γ, 0, 1), ν uniform in (1e-4, 1 − 1e-4);
    otherwise z = clamp(σ(s)·(ζ − γ) + γ, 0, 1). The noise is Philox 4x32-10 of (seed, step, layer, sample
    id, neuron) and nothing else: the same bits on every device and for any split of a batch. The backward
    pass computes it again, so it is not stored.

    Args:
        scores: float32 [F] (or float64), the log-odds s; or [L, F] of L layers, one after the other.
        rows: the number of gate rows, usually one per sample of the batch.
        seed: int in [0, 2^63).
        step: int in [0, 2^32), or an int64 tensor of one element on the device of scores. The tensor's
            value may change in a CUDA graph or under torch.compile, where an int is a constant.
        layer: int in [0, 2^32): the number of the layer, or of the first of L.
        sample_ids: int64 [rows], the global index of each sample (taken modulo 2^32); None: 0 … rows − 1. Ids
            on another device than the scores are copied, and a copy from the CPU waits for the GPU.
        temperature: β > 0.
        stretch: (γ, ζ) with γ < 0 and ζ > 1.
        training: whether to add noise; without it all rows are equal.

    Returns:
        z: [rows, F], or [L, rows, F], in the dtype of scores, differentiable with respect to scores.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.

    Source: Louizos et al. 2018, *Learning Sparse Neural Networks through L0 Regularization*, eq. 10–12.
    """
    if not isinstance(scores, torch.Tensor) or scores.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"scores must be a float32 (or float64) tensor, got {describe(scores)}")
    if scores.dim() not in (1, 2):
        raise ValueError(f"scores must have shape [F] or [L, F], got {tuple(scores.shape)}")
    check_int("rows", rows, 2**31)
    check_int("seed", seed, 2**63)
    check_int("layer", layer, 2**32 - (len(scores) - 1 if scores.dim() == 2 else 0))
    if isinstance(step, torch.Tensor):
        if step.numel() != 1 or step.dtype != torch.int64 or step.device != scores.device:
            raise ValueError(f"step must be an int or one int64 on {scores.device}, got {describe(step)}")
    else:
        check_int("step", step, 2**32)
        step = torch.full((), step, dtype=torch.int64, device=scores.device)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if not (stretch[0] < 0 and stretch[1] > 1):
        raise ValueError(f"stretch must be (γ, ζ) with γ < 0 and ζ > 1, got {stretch}")
    if sample_ids is None:
        sample_ids = torch.arange(rows, device=scores.device)
    elif not isinstance(sample_ids, torch.Tensor) or sample_ids.dtype != torch.int64:
        raise TypeError(f"sample_ids must be an int64 tensor, got {describe(sample_ids)}")
    elif sample_ids.shape != (rows,):
        raise ValueError(f"sample_ids must have shape [{rows}], one per row, got {tuple(sample_ids.shape)}")
    elif sample_ids.is_meta and not scores.is_meta:
        raise ValueError(f"sample_ids must hold values for scores on {scores.device}, got a meta tensor")
    sample_ids = sample_ids.to(scores.device)
    return _forward(scores, sample_ids, step, seed, layer, temperature, *stretch, training)


def _fake(scores: Tensor, sample_ids: Tensor, *settings: object) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], sample_ids.shape[0], scores.shape[-1]))


def _fake_backward(grad: Tensor, scores: Tensor, *settings: object) -> Tensor:
    return scores.new_empty(scores.shape)


def _gradients(
    grad: Tensor, tensors: Sequence[Tensor], options: tuple[Any, ...], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    return _backward(grad, *tensors, *options), None, None


_forward: Callable[..., Tensor] = register(
    "hard_concrete",
    fake=_fake,
    gpu=Triton("hard_concrete", "forward"),
    gradient=Gradient(3, _gradients),
)
register("hard_concrete_backward", fake=_fake_backward, gpu=Triton("hard_concrete", "backward"))
