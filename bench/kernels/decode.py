"""The masked activation at decode sizes: what the mask costs over the unmasked activation."""

import functools

import torch
import torch.nn.functional as F

import neumuter_kernels as nk
from bench.timing import BACKENDS, Contender, compare, compiled
from neumuter_kernels import reference

TOKENS = (1, 8, 64)
WIDTH = 14336  # Llama 3 8B
CALLS = 32  # in one run, each on inputs of its own, as the layers of a model have


def unmasked(gate, up):
    return F.silu(gate) * up


def problem(tokens, width, dtype, device, small=False):
    """The contenders, ours first: a run is a call for each of CALLS layers, or of two if ``small``."""
    layers = 2 if small else CALLS
    generator = torch.Generator(device).manual_seed(0)
    gates, ups = (
        torch.randn(layers, tokens, width, generator=generator, device=device).to(dtype) for _ in range(2)
    )
    masks = torch.rand(layers, 1, width, generator=generator, device=device)
    ones = torch.ones(1, width, device=device)

    def run(function, *tensors):
        with torch.no_grad():
            return [function(*layer) for layer in zip(*tensors, strict=True)]

    def check(function, *tensors):
        for h, gate, up, mask in zip(
            run(function, *tensors), gates, ups, masks if len(tensors) == 3 else [ones] * layers, strict=True
        ):
            exact = reference.masked_glu(gate.double(), up.double(), mask.double())
            error = ((h.double() - exact).norm() / exact.norm()).item()
            if not error <= (1e-5 if dtype == torch.float32 else 1e-2):
                return f"output: relative error {error:.1e}"
        return None

    def contender(name, function, *tensors):
        work = lambda: run(function, *tensors)  # noqa: E731
        if device == "cuda":
            work = captured(work)
        return Contender(name, lambda _: work(), check=lambda: check(function, *tensors))

    return [
        contender("ours, masked", nk.masked_glu, gates, ups, masks),
        contender("eager, unmasked", unmasked, gates, ups),
        contender("torch.compile, unmasked", compiled(unmasked, BACKENDS[small]), gates, ups),
    ]


def captured(work):
    """``work`` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()  # compile first
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def cases(device, effort, small=False):
    """Yields (what a row is about, how it is measured)."""
    width = 64 if small else WIDTH
    for dtype in (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16):
        for tokens in TOKENS[:1] if small else TOKENS:
            about = {
                "op": "masked_glu", "pass": "forward, CUDA graph" if device == "cuda" else "forward",
                "shape": [tokens, width], "dtype": str(dtype).removeprefix("torch."),
            }  # fmt: skip
            yield about, functools.partial(_measured, tokens, width, dtype, device, effort, small)


def _measured(tokens, width, dtype, device, effort, small):
    contenders = problem(tokens, width, dtype, device, small)
    moved = 3 * tokens * width * dtype.itemsize + 4 * width
    row = compare(contenders, None, device, effort, moved, calls=2 if small else CALLS)
    return row | ({"overhead_percent": 100 * (1 / row["ratio"] - 1)} if "ratio" in row else {})
