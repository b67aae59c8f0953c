"""Inputs that hypothesis makes up, and how results for them are compared with the reference."""

import importlib.util
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.kernels import backends

INTERPRETED = 16  # times fewer examples in Triton's interpreter
PHASES = (Phase.reuse, Phase.generate, Phase.shrink)
ANY = dict(deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES, report_multiple_bugs=False)
settings.register_profile("fixed", max_examples=100, derandomize=True, database=None, **ANY)
settings.register_profile("search", max_examples=int(os.environ.get("HYPOTHESIS_MAX_EXAMPLES", 5000)), **ANY)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

BACKENDS = ["cpp"] + ["triton"] * (importlib.util.find_spec("triton") is not None)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPECIAL = (math.inf, -math.inf, math.nan, 0.0, -0.0, 1e4, -1e4, 1e-45, -1e-45, 3e-39)
LAYOUTS = ("contiguous", "sliced", "every third", "transposed", "expanded", "negated")


def on_each_backend(cases, interpreted=True):
    """Makes a test of a property: a function of a case, of which ``cases(device)`` is the strategy.

    ``interpreted``: whether the op is one of Triton's.
    """

    def decorate(holds):
        @pytest.mark.parametrize("backend", BACKENDS if interpreted or backends.HAVE_GPU else BACKENDS[:1])
        def test(backend):
            with backends.use(backend) as device:
                slow = backend == "triton" and not backends.HAVE_GPU
                count = settings().max_examples // (INTERPRETED if slow else 1)
                settings(max_examples=count)(given(cases(device))(holds))()

        return test

    return decorate


# --- Inputs ----------------------------------------------------------------------------------

lengths = st.sampled_from((1, 1, 2, 3, 5, 0))
widths = st.sampled_from((1, 2, 7, 8, 17, 33, 64, 100, 0, 1025, 4100))


def laid_out(x, layout):
    """The values of ``x`` (expanded: of its first row) as a view of memory that is filled with sevens."""
    if layout == "sliced":
        return x.new_full((*x.shape[:-1], x.shape[-1] + 5), 7)[..., 2 : 2 + x.shape[-1]].copy_(x)
    if layout == "every third":
        return x.new_full((*x.shape[:-1], 3 * x.shape[-1] + 2), 7)[..., 1:-1:3].copy_(x)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "negated":
        return (-x)._neg_view()
    return x.contiguous()


@st.composite
def tensors(draw, device, shape, dtype, layouts=LAYOUTS, special=SPECIAL):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    if special and (share := draw(st.sampled_from((0.0, 0.0, 0.02, 0.3)))):
        palette = torch.tensor(special, dtype=torch.float64)
        drawn = palette[torch.randint(len(special), shape, generator=generator)]
        x = torch.where(torch.rand(shape, generator=generator) < share, drawn, x)
    return laid_out(x.to(device, dtype), draw(st.sampled_from(layouts)))


@st.composite
def row_ids(draw, device, tokens, rows):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    ids = torch.randint(-1, rows, tokens, generator=generator, dtype=torch.int64)
    ids = ids.to(device, draw(st.sampled_from((torch.int32, torch.int64))))
    return laid_out(ids, draw(st.sampled_from(LAYOUTS[:3]))) if tokens else ids


# --- What is compared ------------------------------------------------------------------------


def bits(x):
    """A copy of the whole memory that a tensor is a view of."""
    return torch.tensor([], dtype=torch.uint8, device=x.device).set_(x.untyped_storage()).clone()


def equal(x, y):
    return x.shape == y.shape and x.dtype == y.dtype and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)


def kinds(x):
    """0: a number, 1: NaN, 2: ∞, 3: −∞."""
    return x.isnan() + 2 * x.isposinf() + 3 * x.isneginf()


def check_values(name, actual, plain, exact, size, dtype):
    """``actual`` is NaN or infinite where plain PyTorch or float64 is, and elsewhere about as accurate.

    It may be off by twice the error of plain PyTorch, and by eight roundings of ``size``, what is added up
    (64 in float64, where the reference is rounded, too). Where a factor is infinite any infinity or NaN will
    do: relu's slope 0 is multiplied by, where PyTorch selects, and tails of gelu that PyTorch takes for 0 are
    not 0. ``plain`` is the reference in ``dtype`` (some results are wider), ``exact`` in float64.
    """
    assert (actual.shape, actual.dtype) == (plain.shape, plain.dtype), name
    ours, theirs, rounded = kinds(actual), kinds(plain), kinds(exact.to(plain.dtype))
    size = size.double().nan_to_num(math.inf)
    overflowed = (theirs > 0) & (rounded == 0)  # what plain PyTorch rounds on its way
    fits = (ours == theirs) | (ours == rounded) | overflowed | ((ours > 0) & size.isinf())
    assert fits.all(), (name, actual[~fits], plain[~fits], exact[~fits])
    info, actual, plain = torch.finfo(dtype), actual.double(), plain.double()
    least = info.tiny if dtype == torch.bfloat16 else 2 * info.eps * info.tiny
    allowed = 2 * (plain - exact).abs() + (64 if dtype == torch.float64 else 8) * info.eps * size + least
    wrong = ~((actual - exact).abs() <= allowed) & (ours == 0) & (theirs == 0) & (rounded == 0)
    assert not wrong.any(), (name, actual[wrong], plain[wrong], exact[wrong])
