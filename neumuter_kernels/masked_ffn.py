"""The masked activation of an FFN: ``masked_glu`` for a gated one, ``masked_act`` for a plain one.

Both are the op ``masked_ffn``, which gets the layout of its activations as an argument.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from neumuter_kernels.checks import check_activations, check_row_ids, describe
from neumuter_kernels.reference import ACTIVATIONS, Layout, compute_dtype
from neumuter_kernels.registration import Gradient, Triton, register

_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.neumuter.masked_ffn_backward.default
# The dispatcher takes a microsecond longer for an enum than for an int.
_PLAIN, _SEPARATE, _HALVES, _INTERLEAVED = map(int, Layout)


def masked_glu(
    gate: Tensor | None = None,
    up: Tensor | None = None,
    mask: Tensor | None = None,
    row_ids: Tensor | None = None,
    activation: str = "silu",
    *,
    gate_up: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """The gated FFN activation times the neuron mask: h[t, f] = φ(gate[t, f]) · up[t, f] · mask[r(t), f].

    One pass forward and one pass backward, which gives the gradients of gate, up and mask. Only the inputs
    are saved. It computes in float32 and rounds φ(gate) to the input dtype before the product, as Hugging
    Face's eager MLP does, so a mask of ones reproduces eager's rounding.

    Args:
        gate, up: [..., F], float32, bfloat16, float16 (or float64), the same dtype; any row stride.
        mask: [G, F] or [F] (one row), float32 (float64 for float64 activations).
        row_ids: None: the T tokens are G equal consecutive runs, and run g uses mask row g. So G = 1 is one
            mask for all tokens, and G = B is one row per sample of a [B, S, F] batch. Otherwise int32 or
            int64 with one id in [−1, G) per token; a token with id −1 is unmasked. Other ids raise
            RuntimeError on the CPU; on a GPU, where a check would wait for the device, they count as −1.
        activation: "silu", "gelu" (erf), "gelu_tanh", "relu", "relu2" or "identity" (for activations that
            are computed elsewhere).
        gate_up: [..., 2F] instead of gate and up: both in one tensor, which is read without a copy.
        interleaved: gate_up has gate in its even columns and up in its odd ones (otherwise in its halves).

    Returns:
        h: [..., F] in the dtype of the input.

    Raises:
        TypeError: a dtype is not one of those above, or an argument is missing.
        ValueError: shapes, devices or the activation do not fit; the message names the argument.

    Source: Hou et al., Findings of ACL 2025 (NeuMuter), masks neurons this way.
    """
    if (gate_up is None) == (gate is None or up is None):
        raise TypeError("masked_glu needs gate and up, or gate_up alone")
    number = _activation_number(activation)
    if gate_up is not None:
        if gate is not None or up is not None:
            raise TypeError("masked_glu needs gate and up, or gate_up alone")
        check_activations("gate_up", gate_up)
        if gate_up.shape[-1] % 2:
            raise ValueError(f"gate_up must have an even last dimension, got shape {tuple(gate_up.shape)}")
        mask = _checked_mask(mask, gate_up, gate_up.shape[-1] // 2, row_ids)
        return _forward(gate_up, None, mask, row_ids, number, _INTERLEAVED if interleaved else _HALVES)
    if interleaved:
        raise TypeError("interleaved describes gate_up, but gate and up were given")
    gate = check_activations("gate", gate)
    if not isinstance(up, torch.Tensor):
        raise TypeError(f"up must be a tensor like gate, got {describe(up)}")
    if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
        raise ValueError(f"up must match gate, {describe(gate)}, got {describe(up)}")
    mask = _checked_mask(mask, gate, gate.shape[-1], row_ids)
    return _forward(gate, up, mask, row_ids, number, _SEPARATE)


def masked_act(
    hidden: Tensor,
    mask: Tensor,
    row_ids: Tensor | None = None,
    activation: str = "gelu_tanh",
) -> Tensor:
    """The plain FFN activation times the neuron mask: h[t, f] = φ(hidden[t, f]) · mask[r(t), f].

    Args:
        hidden: [..., F], float32, bfloat16, float16 (or float64); any row stride.
        mask, row_ids, activation: as for ``masked_glu``.

    Returns:
        h: [..., F] in the dtype of hidden, rounded as by ``masked_glu``.

    Raises:
        TypeError, ValueError: as ``masked_glu``.
    """
    number = _activation_number(activation)
    check_activations("hidden", hidden)
    mask = _checked_mask(mask, hidden, hidden.shape[-1], row_ids)
    return _forward(hidden, None, mask, row_ids, number, _PLAIN)


def _activation_number(activation: str) -> int:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return ACTIVATIONS.index(activation)


def _checked_mask(mask: Tensor | None, x: Tensor, width: int, row_ids: Tensor | None) -> Tensor:
    """The mask as [G, F], after a check of it and of row_ids against the activations x."""
    wanted = compute_dtype(x.dtype)
    if not isinstance(mask, torch.Tensor) or mask.dtype != wanted:
        raise TypeError(f"mask must be {wanted} for {x.dtype} activations, got {describe(mask)}")
    if mask.dim() == 1:
        mask = mask.unsqueeze(0)
    if mask.dim() != 2 or mask.shape[1] != width:
        raise ValueError(f"mask must have shape [G, {width}] or [{width}], got {tuple(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"mask must be on {x.device} like the activations, got {mask.device}")
    rows = mask.shape[0]
    if rows == 1 and row_ids is None:
        return mask
    tokens = x.shape[:-1].numel()
    if row_ids is not None:
        check_row_ids(row_ids, tokens, x.device)
    elif tokens and (rows == 0 or tokens % rows):
        raise ValueError(
            f"mask has {rows} rows, into which {tokens} tokens do not divide evenly: give row_ids"
        )
    return mask


def _fake(
    gate: Tensor, up: Tensor | None, mask: Tensor, row_ids: Tensor | None, activation: int, layout: int
) -> Tensor:
    return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // (2 if Layout(layout).packed else 1)))


def _fake_backward(
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
    def like(x: Tensor, wanted: bool) -> Tensor:
        return x.new_empty(x.shape if wanted else (0,))

    return like(gate, input_grad), like(gate, input_grad and up is not None), like(mask, mask_grad)


def _gradients(
    grad: Tensor, tensors: Sequence[Tensor], options: tuple[Any, ...], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    gate, up, mask, _ = needed
    found = _backward(grad, *tensors, *options, gate or up, mask)
    return *(g if need else None for g, need in zip(found, needed[:-1], strict=True)), None


_forward: Callable[..., Tensor] = register(
    "masked_ffn",
    fake=_fake,
    gpu=Triton("masked_ffn", "forward", recorded=True),
    gradient=Gradient(4, _gradients),
)
register("masked_ffn_backward", fake=_fake_backward, gpu=Triton("masked_ffn", "backward", recorded=True))
