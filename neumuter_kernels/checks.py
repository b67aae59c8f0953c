"""What the public functions check of their arguments: TypeError or ValueError, naming the argument."""

import torch
from torch import Tensor

from neumuter_kernels import reference
from neumuter_kernels.reference import ACTIVATIONS

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(x: object) -> str:
    """A value for an error message."""
    if not isinstance(x, torch.Tensor):
        return type(x).__name__
    return f"{x.dtype} {list(x.shape)} on {x.device}"


def check_int(name: str, value: object, limit: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if not 0 <= value < limit:
        raise ValueError(f"{name} must lie in [0, {limit}), got {value}")


def activation_number(activation: str) -> int:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return ACTIVATIONS.index(activation)


def check_activations(name: str, x: object) -> Tensor:
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        raise TypeError(f"{name} must be a float32, bfloat16, float16 or float64 tensor, got {describe(x)}")
    if x.dim() < 1:
        raise ValueError(f"{name} must have shape [..., F], got a scalar")
    return x


def check_logits(logits: Tensor) -> None:
    if not isinstance(logits, torch.Tensor) or logits.dtype not in FLOATS:
        raise TypeError(
            f"logits must be a float32, bfloat16, float16 or float64 tensor, got {describe(logits)}"
        )
    if logits.dim() != 2 or not logits.is_contiguous() or (len(logits) and not logits.shape[1]):
        raise ValueError(
            f"logits must be contiguous [N, V] with V > 0, got {describe(logits)}, strides {logits.stride()}"
        )
    if torch.is_grad_enabled() and logits.requires_grad:
        raise ValueError("logits require grad, and their gradients would replace them: detach them")
    check_not_negated("logits", logits)


def check_not_negated(name: str, x: Tensor) -> None:
    # As the imaginary part of a conjugate is: its memory holds other values.
    if not torch.compiler.is_compiling() and x.is_neg():
        raise ValueError(f"{name} must not be a negated view, since it is written to in place: clone it")


def check_apart(changed: str, x: Tensor, kept: str, y: Tensor) -> None:
    """Raise ValueError if writing to ``x``, called ``changed``, could change ``y``, called ``kept``."""
    if torch.compiler.is_compiling() or x.untyped_storage()._cdata != y.untyped_storage()._cdata:
        return
    (start, end), (other_start, other_end) = _span(x), _span(y)
    if start < other_end and other_start < end:
        raise ValueError(f"{kept} shares memory with {changed}, which are overwritten: clone it")


def _span(x: Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor lies in: the first, and behind the last."""
    start = int(x.storage_offset()) * x.element_size()
    if not x.numel():
        return start, start
    last = int(sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)))
    return start, start + (last + 1) * x.element_size()


def check_mask(mask: Tensor | None, x: Tensor, width: int, row_ids: Tensor | None) -> Tensor:
    """The mask as [G, F], after checking it and row_ids against the activations x."""
    wanted = reference.compute_dtype(x.dtype)
    if not isinstance(mask, torch.Tensor) or mask.dtype != wanted:
        raise TypeError(f"mask must be {wanted} for {x.dtype} activations, got {describe(mask)}")
    if mask.dim() == 1:
        mask = mask.unsqueeze(0)
    if mask.dim() != 2 or mask.shape[1] != width:
        raise ValueError(f"mask must have shape [G, {width}] or [{width}], got {tuple(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"mask must be on {x.device}, where the activations are, got {mask.device}")
    tokens = x.shape[:-1].numel()
    if row_ids is None:
        if tokens and (mask.shape[0] == 0 or tokens % mask.shape[0]):
            raise ValueError(
                f"mask has {mask.shape[0]} rows, but {tokens} tokens do not divide evenly; give row_ids"
            )
    else:
        if not isinstance(row_ids, torch.Tensor) or row_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"row_ids must be an int32 or int64 tensor, got {describe(row_ids)}")
        if row_ids.numel() != tokens:
            raise ValueError(f"row_ids must have one id for each of {tokens} tokens, got {row_ids.numel()}")
        if row_ids.device != x.device:
            raise ValueError(
                f"row_ids must be on {x.device}, where the activations are, got {row_ids.device}"
            )
    return mask
