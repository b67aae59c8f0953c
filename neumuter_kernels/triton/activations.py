"""Activations and their slopes inside Triton kernels.

ACCURATE is for float32, computed to a few ulp: eager uses the accurate exp, so the hardware's fast one
would show. It serves bfloat16 and float16, whose rounding is far coarser; float64 is accurate anyway.
"""

import triton
import triton.language as tl


@triton.jit
def reduced_exponential(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """y and the integer n of exp(x) = y·2^n for float32 x, clamped to LOW … HIGH; as reference.exact_exp."""
    # NaN must pass: comparisons with it are false.
    x = tl.where(x < LOW, LOW, x)
    x = tl.where(x > HIGH, HIGH, x)
    rounded = x * 1.44269504 + 12582912.0
    n = rounded - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    q = r * 0.00019919360056519508 + 0.0013947212137281895
    q = q * r + 0.008333262987434864
    q = q * r + 0.04166625440120697
    q = q * r + 0.1666666716337204
    q = q * r + 0.5
    y = ((r * r) * q + r) + 1.0
    return y, rounded.to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def accurate_exponential(x):
    y, exponent = reduced_exponential(x, -104.0, 89.0)
    half = exponent >> 1  # 2^n may not be representable where y·2^n is
    low = ((half + 127) << 23).to(tl.float32, bitcast=True)
    high = ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)
    return y * low * high


@triton.jit
def exponential(x, ACCURATE: tl.constexpr):
    if ACCURATE:
        result = accurate_exponential(x)
    else:
        result = tl.exp(x)
    return result


@triton.jit
def inverse(x, ACCURATE: tl.constexpr):
    if ACCURATE:
        result = tl.div_rn(1.0, x)
    else:
        result = 1.0 / x
    return result


@triton.jit
def activation(x, ACTIVATION: tl.constexpr, ACCURATE: tl.constexpr):
    """φ(x) and φ'(x) of the activation of that number in reference.ACTIVATIONS."""
    if ACTIVATION == 0:  # silu
        s = inverse(1.0 + exponential(-x, ACCURATE), ACCURATE)
        value = x * s
        slope = s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == 1:  # gelu
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * cdf
        slope = cdf + x * exponential(-0.5 * x * x, ACCURATE) * 0.3989422804014327
    elif ACTIVATION == 2:  # gelu_tanh: ½(1 + tanh v) = σ(2v), without the cancellation; likewise 1 − σ
        e = exponential(-(1.5957691216057308 * (x + 0.044715 * x * x * x)), ACCURATE)
        s = inverse(1.0 + e, ACCURATE)
        value = x * s
        complement = tl.where(x > 0.0, e * s, 1.0 - s)
        slope = s + x * (s * complement) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    elif ACTIVATION == 3:  # relu
        value = tl.where(x < 0.0, 0.0, x)
        slope = tl.where(x <= 0.0, 0.0, 1.0)  # as PyTorch, also for NaN
    elif ACTIVATION == 4:  # relu2
        r = tl.where(x < 0.0, 0.0, x)
        value = r * r
        slope = 2.0 * r
    else:  # identity
        value = x
        slope = tl.full(x.shape, 1.0, x.dtype)
    return value, slope
