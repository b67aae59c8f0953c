"""Activations and their slopes inside Triton kernels."""

import triton
import triton.language as tl

from neumuter_kernels.triton.arithmetic import exponential, fast_power_of_two, inverse


@triton.jit
def activation(x, ACTIVATION: tl.constexpr, ARITHMETIC: tl.constexpr):
    """φ(x) and φ'(x) of the activation of that number in reference.ACTIVATIONS."""
    if ACTIVATION == 0:  # silu
        s = inverse(1.0 + exponential(-x, ARITHMETIC), ARITHMETIC)
        value = x * s
        slope = s + value * (1.0 - s)
    elif ACTIVATION == 1:  # gelu
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * cdf
        slope = cdf + x * exponential(-0.5 * x * x, ARITHMETIC) * 0.3989422804014327
    elif ACTIVATION == 2:  # gelu_tanh: ½(1 + tanh v) = σ(2v), without the cancellation; likewise 1 − σ
        squared = x * x
        if ARITHMETIC == 2:  # the constants below times log₂ e
            e = fast_power_of_two(x * (-2.302208198144325 - 0.1029432395800235 * squared))
        else:
            e = exponential(x * (-1.5957691216057308 - 0.07135481627260025 * squared), ARITHMETIC)
        s = inverse(1.0 + e, ARITHMETIC)
        value = x * s
        if ARITHMETIC == 1 or x.dtype == tl.float64:
            spread = value * tl.where(x > 0.0, e * s, 1.0 - s)
        else:
            spread = value - value * s
        slope = s + spread * (1.5957691216057308 + 0.21406444881780073 * squared)
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
