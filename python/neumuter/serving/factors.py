"""What a gain multiplies in stored weights: scales, or weights themselves. Rounded once, and watched."""

import torch
from torch import Tensor

# Factors that a gain makes small lose bits, most of all in float16. More than this share is reported.
COARSE = 0.01


def scaled(factors: Tensor, gains: Tensor | float) -> Tensor:
    """Multiply ``factors`` by gains that broadcast to them, in float32 at least, and round once."""
    wide = torch.promote_types(factors.dtype, torch.float32)
    return (factors.to(wide) * gains).to(factors.dtype)


def rounding(factors: Tensor, gains: Tensor | float) -> float:
    """How far rounding moves ``scaled(factors, gains)``, as a share of its length.

    Infinite or NaN where a product is out of range.
    """
    exact = factors.double() * gains
    moved = (scaled(factors, gains).double() - exact).norm() / exact.norm()
    return float(moved) if exact.any() else 0.0
