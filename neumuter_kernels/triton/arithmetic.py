"""Exponentials, reciprocals and rounding inside Triton kernels.

A kernel is compiled for one of three kinds of arithmetic. ACCURATE is for float32, to a few ulp: eager uses
the accurate exp, so the hardware's fast one would show. FAST is for bfloat16 and float16, whose rounding is
far coarser, on NVIDIA's GPUs: approximate instructions, and conversions of two numbers at once, because those
of one take as long as an exponential. PLAIN is what Triton makes of exp, division and conversions: for
float64, for other makers' GPUs and for the interpreter.
"""

import torch
import triton
import triton.language as tl

PLAIN, ACCURATE, FAST = 0, 1, 2
WARP = 32 if torch.version.hip is None else 64
# Whether kernels may contain NVIDIA's assembly. The interpreter runs the same algorithms without it.
HAS_PTX = torch.version.hip is None and not triton.knobs.runtime.interpret


def arithmetic(dtype: torch.dtype) -> int:
    """The kind of arithmetic for activations or logits of a dtype."""
    if dtype in (torch.bfloat16, torch.float16):
        return FAST if HAS_PTX else PLAIN
    return ACCURATE if dtype == torch.float32 else PLAIN


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
def fast_power_of_two(x):
    """2^x, at most 2 ulp from it; 0 where that is below the normal numbers."""
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def exponential(x, ARITHMETIC: tl.constexpr):
    if ARITHMETIC == 1:
        result = accurate_exponential(x)
    elif ARITHMETIC == 2:
        result = fast_power_of_two(x * 1.4426950408889634)
    else:
        result = tl.exp(x)
    return result


@triton.jit
def inverse(x, ARITHMETIC: tl.constexpr):
    """1/x; FAST: at most 1 ulp from it, 0 where that is below the normal numbers."""
    if ARITHMETIC == 1:
        result = tl.div_rn(1.0, x)
    elif ARITHMETIC == 2:
        result = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = 1.0 / x
    return result


@triton.jit
def widened(x, ARITHMETIC: tl.constexpr):
    """Numbers as they lie in memory, in the dtype that they are computed in."""
    if x.dtype == tl.float64:
        result = x
    elif ARITHMETIC == 2 and x.dtype == tl.bfloat16:
        result = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        result = x.to(tl.float32)
    return result


@triton.jit
def rounded(x, DTYPE: tl.constexpr, ARITHMETIC: tl.constexpr):
    """The numbers of DTYPE that are next to x, in the dtype of x."""
    if ARITHMETIC != 2:
        result = x.to(DTYPE).to(x.dtype)
    elif DTYPE.is_bf16():
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2;"
            " shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }", "=r,=r,r,r", [x],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 both; .reg .b16 low, high; cvt.rn.f16x2.f32 both, $3, $2; mov.b32 {low, high}, both;"
            " cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }", "=f,=f,f,f", [x],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return result
