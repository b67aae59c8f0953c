"""Losses of tokens, whose gradients replace the logits: ``cross_entropy_`` and ``kl_divergence_``."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from neumuter_kernels.checks import FLOATS, check_apart, check_constant, check_not_negated, describe
from neumuter_kernels.reference import compute_dtype
from neumuter_kernels.registration import Triton, register

_cross_entropy: Callable[..., Tensor] = torch.ops.neumuter.cross_entropy_.default
_kl_divergence: Callable[..., Tensor] = torch.ops.neumuter.kl_divergence_.default


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each token in nats; its gradients with respect to the logits replace the logits.

    It reads and writes the logits once, where log_softmax, gather and their backward make several tensors
    of their size. The chain rule from here on is the caller's: multiply row n by the gradient of loss n.

    Args:
        logits: [N, V], contiguous; float32, bfloat16, float16 (or float64). Overwritten by
            softmax(logits) − one-hot(targets), computed in float32 and rounded once.
        targets: int64 [N] in [0, V). Others raise RuntimeError on the CPU; on a GPU their loss and their
            row of logits become NaN.

    Returns:
        losses: [N], float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an argument is not as above, or is part of an autograd graph that would not
            see the change.
    """
    _check_logits(logits)
    if not isinstance(targets, torch.Tensor) or targets.dtype != torch.int64:
        raise TypeError(f"targets must be an int64 tensor, got {describe(targets)}")
    if targets.shape != logits.shape[:1] or targets.device != logits.device:
        raise ValueError(
            f"targets must be [{logits.shape[0]}] on {logits.device}, one per row of logits, "
            f"got {describe(targets)}"
        )
    check_apart("logits", logits, "targets", targets)
    losses = _cross_entropy(logits, targets)
    # Autograd must not use the logits as they were before, which another node may have saved.
    increment_version(logits)
    return losses


def kl_divergence_(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_v p·(ln p − ln q) of each token in nats; the gradients q − p replace the logits of q.

    Args:
        logits: of q; as for ``cross_entropy_``.
        reference: the logits of p, like logits; not changed.

    Returns:
        losses: as ``cross_entropy_``.

    Raises:
        TypeError, ValueError: as ``cross_entropy_``.
    """
    _check_logits(logits)
    if not isinstance(reference, torch.Tensor) or reference.dtype != logits.dtype:
        raise TypeError(f"reference must be a {logits.dtype} tensor like logits, got {describe(reference)}")
    if reference.shape != logits.shape or reference.device != logits.device:
        raise ValueError(f"reference must match logits, {describe(logits)}, got {describe(reference)}")
    check_constant("reference", reference, "and has no gradient: detach it first")
    check_apart("logits", logits, "reference", reference)
    losses = _kl_divergence(logits, reference)
    increment_version(logits)
    return losses


def _check_logits(logits: Tensor) -> None:
    if not isinstance(logits, torch.Tensor) or logits.dtype not in FLOATS:
        raise TypeError(
            f"logits must be a float32, bfloat16, float16 or float64 tensor, got {describe(logits)}"
        )
    if logits.dim() != 2 or not logits.is_contiguous() or (len(logits) and not logits.shape[1]):
        raise ValueError(
            f"logits must be contiguous [N, V] with V > 0, got {describe(logits)}, strides {logits.stride()}"
        )
    check_constant("logits", logits, "but their gradients replace them: detach them first")
    check_not_negated("logits", logits)


def _fake(logits: Tensor, other: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=compute_dtype(logits.dtype))


register("cross_entropy_", fake=_fake, gpu=Triton("token_losses", "cross_entropy_"))
register("kl_divergence_", fake=_fake, gpu=Triton("token_losses", "kl_divergence_"))
