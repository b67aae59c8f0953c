"""hard_concrete and its backward in Triton: the bits of reference.py on any device.

Every operation is one IEEE operation: division is tl.div_rn, and the launch forbids fusing
multiplications with additions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neumuter_kernels.reference import stretch_span
from neumuter_kernels.triton.arithmetic import reduced_exponential

BLOCK = 256  # Philox counters per program, of four neurons each


@triton.jit
def exact_exp(x):
    y, exponent = reduced_exponential(x, -87.0, 87.0)
    return y * ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exact_log(x):
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    t = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    z = t * t
    p = t * 0.06915368139743805 + -0.11789807677268982
    p = p * t + 0.11872976273298264
    p = p * t + -0.1238434836268425
    p = p * t + 0.14218658208847046
    p = p * t + -0.16669251024723053
    p = p * t + 0.20002226531505585
    p = p * t + -0.24999986588954926
    p = p * t + 0.3333331048488617
    y = (t * z) * p
    y = (y + e * -2.12194440e-4) - 0.5 * z
    return (t + y) + e * 0.693359375


@triton.jit
def as_wide_as(x, value):
    """``value``, an argument that comes in float64, in the dtype of ``x``: float32 gates stay float32."""
    return tl.full(x.shape, value, x.dtype)


@triton.jit
def sigma_of(scores, sample, step, seed_low, seed_high, layer, inverse_temperature, first, F,
             TRAINING: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """σ of the neurons 4·first … 4·(first + BLOCK) − 1 in one row of gates."""
    f = 4 * first + tl.arange(0, 4 * BLOCK)
    x = tl.load(scores + f, mask=f < F, other=0.0)
    exact: tl.constexpr = x.dtype == tl.float32
    if TRAINING:
        counter = (first + tl.arange(0, BLOCK)).to(tl.uint32)
        zero = tl.zeros((BLOCK,), dtype=tl.uint32)
        w0, w1, w2, w3 = tl.philox_impl(
            counter, zero + sample.to(tl.uint32), zero + layer.to(tl.uint32),
            zero + tl.load(step).to(tl.uint32), seed_low.to(tl.uint32), seed_high.to(tl.uint32), 10,
        )  # fmt: skip
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (4 * BLOCK,))
        u = ((words >> 9).to(tl.int32).to(x.dtype) + 0.5) * 1.1920928955078125e-07
        nu = u * 0.9998 + 1e-4
        complement = (1.0 - u) * 0.9998 + 1e-4
        if exact:
            noise = exact_log(nu) - exact_log(complement)
        else:
            noise = tl.log(nu) - tl.log(complement)
        x = (noise + x) * as_wide_as(x, inverse_temperature)
    if exact:
        sigma = tl.div_rn(1.0, 1.0 + exact_exp(-x))
    else:
        sigma = 1.0 / (1.0 + tl.exp(-x))
    return sigma


SCALARS = ("seed_low", "seed_high", "layer", "inverse_temperature", "gamma", "span", "scale")


@triton.jit(do_not_specialize=SCALARS)
def hard_concrete_kernel(
    scores, sample_ids, step, out, rows, F, seed_low, seed_high, layer,
    inverse_temperature: tl.float64, gamma: tl.float64, span: tl.float64,
    TRAINING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(F, 4 * BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)  # those of all layers are counted
    first = (tl.program_id(0) % blocks) * BLOCK
    number = row // rows
    sample = tl.load(sample_ids + row % rows)
    sigma = sigma_of(scores + number * F, sample, step, seed_low, seed_high, layer + number,
                     inverse_temperature, first, F, TRAINING, BLOCK)  # fmt: skip
    raw = sigma * as_wide_as(sigma, span) + as_wide_as(sigma, gamma)
    z = tl.where(raw < 0.0, 0.0, raw)
    z = tl.where(z > 1.0, 1.0, z)
    f = 4 * first + tl.arange(0, 4 * BLOCK)
    tl.store(out + row * F + f, z, mask=f < F)


@triton.jit(do_not_specialize=SCALARS)
def hard_concrete_backward_kernel(
    grad, scores, sample_ids, step, grad_scores, rows, F, seed_low, seed_high, layer,
    inverse_temperature: tl.float64, gamma: tl.float64, span: tl.float64, scale: tl.float64,
    TRAINING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(F, 4 * BLOCK)
    first = (tl.program_id(0) % blocks) * BLOCK
    number = (tl.program_id(0) // blocks).to(tl.int64)
    scores += number * F
    f = 4 * first + tl.arange(0, 4 * BLOCK)
    sums = tl.zeros((4 * BLOCK,), dtype=scores.dtype.element_ty)
    p_grad = grad + number * rows * F + f
    for row in range(rows):  # in order: the same bits on every run
        sample = tl.load(sample_ids + row)
        sigma = sigma_of(scores, sample, step, seed_low, seed_high, layer + number, inverse_temperature,
                         first, F, TRAINING, BLOCK)  # fmt: skip
        raw = sigma * as_wide_as(sigma, span) + as_wide_as(sigma, gamma)
        b_grad = tl.load(p_grad, mask=f < F, other=0.0)
        p_grad += F
        slope = (sigma * (1.0 - sigma)) * as_wide_as(sigma, scale)
        sums += tl.where((raw > 0.0) & (raw < 1.0), b_grad * slope, 0.0)
    tl.store(grad_scores + number * F + f, sums, mask=f < F)


def _scalars(
    scores: Tensor, seed: int, layer: int, temperature: float, gamma: float, zeta: float
) -> dict[str, float]:
    """The scalar arguments of both kernels, by name."""
    return {
        "seed_low": seed & 0xFFFFFFFF,
        "seed_high": seed >> 32 & 0xFFFFFFFF,
        "layer": layer,
        "inverse_temperature": 1.0 / temperature,
        "gamma": gamma,
        "span": stretch_span((gamma, zeta), scores.dtype),
    }


def forward(
    scores: Tensor,
    sample_ids: Tensor,
    step: Tensor,
    seed: int,
    layer: int,
    temperature: float,
    gamma: float,
    zeta: float,
    training: bool,
) -> Tensor:
    """Gates [rows, F] of scores [F], or [L, rows, F] of [L, F], for sample_ids int64 [rows] and one step."""
    F, rows = scores.shape[-1], sample_ids.numel()
    out = scores.new_empty(*scores.shape[:-1], rows, F)
    if out.numel():
        hard_concrete_kernel[(out.numel() // F * triton.cdiv(F, 4 * BLOCK),)](
            scores.contiguous(), sample_ids.contiguous(), step, out, rows, F,
            **_scalars(scores, seed, layer, temperature, gamma, zeta),
            TRAINING=training, BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    scores: Tensor,
    sample_ids: Tensor,
    step: Tensor,
    seed: int,
    layer: int,
    temperature: float,
    gamma: float,
    zeta: float,
    training: bool,
) -> Tensor:
    """The gradient of the scores [F] for grad [rows, F], or [L, F] for [L, rows, F]."""
    F, rows = scores.shape[-1], sample_ids.numel()
    grad_scores = torch.empty_like(scores, memory_format=torch.contiguous_format)
    if scores.numel():
        scalars = _scalars(scores, seed, layer, temperature, gamma, zeta)
        scale = scalars["span"] * (scalars["inverse_temperature"] if training else 1.0)
        hard_concrete_backward_kernel[(scores.numel() // F * triton.cdiv(F, 4 * BLOCK),)](
            grad.contiguous(), scores.contiguous(), sample_ids.contiguous(), step, grad_scores, rows, F,
            **scalars, scale=scale, TRAINING=training, BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    return grad_scores
