"""cross_entropy_ and kl_divergence_ in Triton: one program per token, two walks over its logits.

The first walk keeps a maximum and scaled sums per thread, so that threads meet only once, at its end. Sums
are scaled anew once for all logits that a thread reads in a turn. The second walk writes the gradients over
the logits. It reads them out of the L2 cache if the tokens of a call fit there: the recipes' chunks of 32 MiB
fit into that of a large GPU, a thousand tokens of a large vocabulary do not.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from neumuter_kernels.reference import compute_dtype
from neumuter_kernels.triton.arithmetic import WARP, arithmetic, exponential, inverse, widened

THREADS, ACCESSES = 256, 2  # of a program, and of a thread per turn, each of 16 bytes


def turn(element_size: int) -> dict[str, int]:
    """The logits of one turn of a loop as the constants of a kernel: ACCESSES × THREADS × EACH."""
    return {"ACCESSES": ACCESSES, "THREADS": THREADS, "EACH": 16 // element_size}


@triton.jit
def logits_of_turn(start, ACCESSES: tl.constexpr, THREADS: tl.constexpr, EACH: tl.constexpr):
    """Which logits are read in the turn that starts there; neighbours in the last axis lie in one thread."""
    access = tl.arange(0, ACCESSES)[:, None, None] * (THREADS * EACH)
    return start + access + tl.arange(0, THREADS)[None, :, None] * EACH + tl.arange(0, EACH)[None, None, :]


@triton.jit
def load_logits(row, f, V, anchor, ARITHMETIC: tl.constexpr):
    """Logits f of a row less its anchor; past its end −inf, which adds nothing to any sum."""
    return widened(tl.load(row + f, mask=f < V, other=-float("inf")), ARITHMETIC) - anchor


@triton.jit
def anchor_of(row, f, V, ARITHMETIC: tl.constexpr):
    """A number near a row's maximum: less it, p − q does not cancel between rows of other levels."""
    most = tl.max(largest_of_thread(load_logits(row, f, V, 0.0, ARITHMETIC)), axis=0)
    return tl.where(tl.abs(most) < 3.0e38, most, 0.0)


@triton.jit
def largest_of_thread(x):
    return tl.max(tl.max(x, axis=2), axis=0)


@triton.jit
def sum_of_thread(x):
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def no_logits(row, THREADS: tl.constexpr):
    """The maximum and the sum of each thread before the first logit; finite, so that nothing becomes NaN."""
    if row.dtype.element_ty == tl.float64:
        most = tl.full((THREADS,), -3.0e38, tl.float64)
    else:
        most = tl.full((THREADS,), -3.0e38, tl.float32)
    return most, most * 0.0


@triton.jit
def grown(most, total, x, ARITHMETIC: tl.constexpr):
    """The maximum and the sum of exp(logit − maximum) of each thread with more logits; how to rescale."""
    more = largest_of_thread(x)
    larger = tl.where(more > most, more, most)
    rescale = exponential(most - larger, ARITHMETIC)
    e = exponential(x - larger[None, :, None], ARITHMETIC)
    return larger, total * rescale + sum_of_thread(e), rescale, e


@triton.jit
def threads_together(most, total, ARITHMETIC: tl.constexpr):
    """The maximum, and what scales each thread's sums to it."""
    largest = tl.max(most, axis=0)
    return largest, exponential(most - largest, ARITHMETIC)


@triton.jit
def scaled(differences, scale):
    """A sum with an infinite term too, where nothing is left of its probability: 0·∞ is 0 here."""
    return tl.where(scale == 0.0, 0.0, differences * scale)


@triton.jit
def cross_entropy_kernel(
    logits, targets, losses, V,
    ARITHMETIC: tl.constexpr, ACCESSES: tl.constexpr, THREADS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * V
    first = logits_of_turn(0, ACCESSES, THREADS, EACH)
    most, total = no_logits(row, THREADS)
    for start in range(0, V, ACCESSES * THREADS * EACH):
        x = load_logits(row, start + first, V, 0.0, ARITHMETIC)
        most, total, _, _ = grown(most, total, x, ARITHMETIC)
    largest, scale = threads_together(most, total, ARITHMETIC)
    z = tl.sum(total * scale, axis=0)
    target = tl.load(targets + token)
    valid = (target >= 0) & (target < V)
    wanted = tl.load(row + target, mask=valid, other=float("nan")).to(z.dtype)
    tl.debug_barrier()  # the target's logit is read before anyone overwrites it
    tl.store(losses + token, tl.log(z) - (wanted - largest))
    # Without a target there is no gradient, and what looks like one would be trained on.
    part = tl.where(valid, inverse(z, ARITHMETIC), float("nan"))
    for start in range(0, V, ACCESSES * THREADS * EACH):
        f = start + first
        p = exponential(load_logits(row, f, V, largest, ARITHMETIC), ARITHMETIC) * part
        tl.store(row + f, p - tl.where(f == target, 1.0, 0.0), mask=f < V)


@triton.jit
def kl_divergence_kernel(
    logits, reference, losses, V,
    ARITHMETIC: tl.constexpr, ACCESSES: tl.constexpr, THREADS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row, row_p = logits + token * V, reference + token * V
    first = logits_of_turn(0, ACCESSES, THREADS, EACH)
    most_q, total_q = no_logits(row, THREADS)
    most_p, total_p, differences = most_q, total_q, total_q
    anchor_q, anchor_p = anchor_of(row, first, V, ARITHMETIC), anchor_of(row_p, first, V, ARITHMETIC)
    for start in range(0, V, ACCESSES * THREADS * EACH):
        f = start + first
        q = load_logits(row, f, V, anchor_q, ARITHMETIC)
        p = load_logits(row_p, f, V, anchor_p, ARITHMETIC)
        most_q, total_q, _, _ = grown(most_q, total_q, q, ARITHMETIC)
        most_p, total_p, rescale, e = grown(most_p, total_p, p, ARITHMETIC)
        terms = tl.where(e > 0.0, e * (p - q), 0.0)
        differences = scaled(differences, rescale) + sum_of_thread(terms)
    largest_q, scale_q = threads_together(most_q, total_q, ARITHMETIC)
    largest_p, scale_p = threads_together(most_p, total_p, ARITHMETIC)
    z_q, z_p = tl.sum(total_q * scale_q, axis=0), tl.sum(total_p * scale_p, axis=0)
    difference = tl.sum(scaled(differences, scale_p), axis=0) / z_p
    tl.store(losses + token, difference + (largest_q - largest_p) + tl.log(z_q / z_p))
    part_q, part_p = inverse(z_q, ARITHMETIC), inverse(z_p, ARITHMETIC)
    for start in range(0, V, ACCESSES * THREADS * EACH):
        f = start + first
        q = load_logits(row, f, V, anchor_q, ARITHMETIC) - largest_q
        p = load_logits(row_p, f, V, anchor_p, ARITHMETIC) - largest_p
        gradient = exponential(q, ARITHMETIC) * part_q - exponential(p, ARITHMETIC) * part_p
        tl.store(row + f, gradient, mask=f < V)


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
            ARITHMETIC=arithmetic(logits.dtype),
            num_warps=THREADS // WARP,
            **turn(logits.element_size()),
        )
    return losses


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """For targets int64 [N]."""
    return _launch(cross_entropy_kernel, logits, targets)


def kl_divergence_(logits: Tensor, reference: Tensor) -> Tensor:
    """For reference logits [N, V]."""
    return _launch(kl_divergence_kernel, logits, reference)
