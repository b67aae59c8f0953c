"""cross_entropy_ and kl_divergence_ in Triton: one program per token, two walks over its logits.

The first walk keeps a maximum and scaled sums per lane, so that lanes meet only once, at its end; the
second writes the gradients over the logits, mostly out of the L2 cache.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from neumuter_kernels.reference import compute_dtype
from neumuter_kernels.triton.activations import exponential

WARPS = 8


def block(element_size: int) -> int:
    """Logits per turn of a loop: one access of 16 bytes for each of the 256 threads."""
    return 4096 // element_size


@triton.jit
def wide(x):
    """x as it is computed with."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


@triton.jit
def load_logits(row, f, V, anchor):
    """Logits f of a row less its anchor; past its end −inf, which adds nothing to any sum."""
    return wide(tl.load(row + f, mask=f < V, other=-float("inf"))) - anchor


@triton.jit
def anchor_of(row, V, BLOCK: tl.constexpr):
    """A number near a row's maximum: less it, p − q does not cancel between rows of other levels."""
    most = tl.max(load_logits(row, tl.arange(0, BLOCK), V, 0.0), axis=0)
    return tl.where(tl.abs(most) < 3.0e38, most, 0.0)


@triton.jit
def no_logits(row, BLOCK: tl.constexpr):
    """The maximum and the sum of each lane before the first logit; finite, so that nothing becomes NaN."""
    if row.dtype.element_ty == tl.float64:
        most = tl.full((BLOCK,), -3.0e38, tl.float64)
    else:
        most = tl.full((BLOCK,), -3.0e38, tl.float32)
    return most, most * 0.0


@triton.jit
def grown(most, total, x, ACCURATE: tl.constexpr):
    """The maximum and the sum of exp(logit − maximum) of each lane with one more logit; how to rescale."""
    larger = tl.where(x > most, x, most)
    rescale = exponential(most - larger, ACCURATE)
    e = exponential(x - larger, ACCURATE)
    return larger, total * rescale + e, rescale, e


@triton.jit
def lanes_together(most, total, ACCURATE: tl.constexpr):
    """The maximum, and what scales each lane's sums to it."""
    largest = tl.max(most, axis=0)
    return largest, exponential(most - largest, ACCURATE)


@triton.jit
def scaled(differences, scale):
    """A sum with an infinite term too, where nothing is left of its probability: 0·∞ is 0 here."""
    return tl.where(scale == 0.0, 0.0, differences * scale)


@triton.jit
def cross_entropy_kernel(logits, targets, losses, V, BLOCK: tl.constexpr):
    ACCURATE: tl.constexpr = logits.dtype.element_ty == tl.float32
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * V
    lanes = tl.arange(0, BLOCK)
    most, total = no_logits(row, BLOCK)
    for start in range(0, V, BLOCK):
        most, total, _, _ = grown(most, total, load_logits(row, start + lanes, V, 0.0), ACCURATE)
    largest, scale = lanes_together(most, total, ACCURATE)
    z = tl.sum(total * scale, axis=0)
    target = tl.load(targets + token)
    valid = (target >= 0) & (target < V)
    wanted = wide(tl.load(row + target, mask=valid, other=float("nan")))
    tl.debug_barrier()  # the target's logit is read before anyone overwrites it
    tl.store(losses + token, tl.log(z) - (wanted - largest))
    for start in range(0, V, BLOCK):
        f = start + lanes
        p = exponential(load_logits(row, f, V, largest), ACCURATE) / z
        tl.store(row + f, p - tl.where(f == target, 1.0, 0.0), mask=f < V)


@triton.jit
def kl_divergence_kernel(logits, reference, losses, V, BLOCK: tl.constexpr):
    ACCURATE: tl.constexpr = logits.dtype.element_ty == tl.float32
    token = tl.program_id(0).to(tl.int64)
    row, row_p = logits + token * V, reference + token * V
    lanes = tl.arange(0, BLOCK)
    most_q, total_q = no_logits(row, BLOCK)
    most_p, total_p, differences = most_q, total_q, total_q
    anchor_q, anchor_p = anchor_of(row, V, BLOCK), anchor_of(row_p, V, BLOCK)
    for start in range(0, V, BLOCK):
        f = start + lanes
        q, p = load_logits(row, f, V, anchor_q), load_logits(row_p, f, V, anchor_p)
        most_q, total_q, _, _ = grown(most_q, total_q, q, ACCURATE)
        most_p, total_p, rescale, e = grown(most_p, total_p, p, ACCURATE)
        differences = scaled(differences, rescale) + tl.where(e > 0.0, e * (p - q), 0.0)
    largest_q, scale_q = lanes_together(most_q, total_q, ACCURATE)
    largest_p, scale_p = lanes_together(most_p, total_p, ACCURATE)
    z_q, z_p = tl.sum(total_q * scale_q, axis=0), tl.sum(total_p * scale_p, axis=0)
    difference = tl.sum(scaled(differences, scale_p), axis=0) / z_p
    tl.store(losses + token, difference + (largest_q - largest_p) + tl.log(z_q / z_p))
    for start in range(0, V, BLOCK):
        f = start + lanes
        q = exponential(load_logits(row, f, V, anchor_q) - largest_q, ACCURATE) / z_q
        p = exponential(load_logits(row_p, f, V, anchor_p) - largest_p, ACCURATE) / z_p
        tl.store(row + f, q - p, mask=f < V)


def _launch(kernel: Any, logits: Tensor, other: Tensor) -> Tensor:
    """Losses [N] of logits [N, V], whose gradients replace them."""
    tokens, vocabulary = logits.shape
    losses = logits.new_empty(tokens, dtype=compute_dtype(logits.dtype))
    if tokens:
        kernel[(tokens,)](
            logits,
            other.contiguous(),
            losses,
            vocabulary,
            BLOCK=block(logits.element_size()),
            num_warps=WARPS,
        )
    return losses


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """For targets int64 [N]."""
    return _launch(cross_entropy_kernel, logits, targets)


def kl_divergence_(logits: Tensor, reference: Tensor) -> Tensor:
    """For reference logits [N, V]."""
    return _launch(kl_divergence_kernel, logits, reference)
