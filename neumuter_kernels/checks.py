"""What several public functions check of their arguments: TypeError or ValueError, naming the argument."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(x: object) -> str:
    """A value for an error message."""
    if not isinstance(x, torch.Tensor):
        return type(x).__name__
    return f"{x.dtype} {list(x.shape)} on {x.device}"


def check_int(name: str, value: object, limit: int) -> None:
    """Raise unless ``value`` is an int in [0, limit)."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if not 0 <= value < limit:
        raise ValueError(f"{name} must lie in [0, {limit}), got {value}")


def check_activations(name: str, x: object) -> Tensor:
    """``x``, if it is a floating-point tensor [..., F]."""
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        raise TypeError(f"{name} must be a float32, bfloat16, float16 or float64 tensor, got {describe(x)}")
    if x.dim() < 1:
        raise ValueError(f"{name} must have shape [..., F], got a scalar")
    return x


def check_row_ids(row_ids: object, tokens: int, device: torch.device) -> None:
    """Raise unless ``row_ids`` are integers, one per token, on the device of the activations."""
    if not isinstance(row_ids, torch.Tensor) or row_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"row_ids must be an int32 or int64 tensor, got {describe(row_ids)}")
    if row_ids.numel() != tokens:
        raise ValueError(
            f"row_ids must have one entry for each of {tokens} tokens, got {row_ids.numel()} entries"
        )
    if row_ids.device != device:
        raise ValueError(f"row_ids must be on {device} like the activations, got {row_ids.device}")


def check_constant(name: str, x: Tensor, instead: str) -> None:
    """Raise if a derivative with respect to ``x`` is wanted; ``instead`` says what to do."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(f"{name} requires grad, {instead}")
    if is_dual(x):
        raise NotImplementedError(f"{name} has a tangent, {instead}")


def is_dual(x: Tensor | None) -> bool:
    """Whether forward-mode differentiation (torch.func.jvp and the like) goes through ``x``."""
    active = x is not None and forward_ad._current_level >= 0
    return active and forward_ad.unpack_dual(x).tangent is not None


def check_not_negated(name: str, x: Tensor) -> None:
    """Raise ValueError for a lazily negated view, for example the imaginary part of a conjugate."""
    # The memory of such a view holds the negatives of its values, and the ops write to the memory.
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
    """The bytes of its storage that a tensor spans: its first one, and the one after its last."""
    start = int(x.storage_offset()) * x.element_size()
    if not x.numel():
        return start, start
    last = int(sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)))
    return start, start + (last + 1) * x.element_size()
