"""The processor time of launching masked_glu on a GPU: small tensors, and no waiting for the result.

Whole models of today's sizes are bound by launching wherever a layer computes for less than this time.
"""

import functools

import torch

from bench.kernels.activations import eager, ours
from bench.timing import BACKENDS, Contender, compare, compiled

TOKENS, WIDTH = 8, 1024  # the GPU is done with them sooner than the processor with launching


def cases(device, effort, small=False):
    """Yields (what a row is about, how it is measured); nothing without a GPU."""
    if device != "cuda":
        print("Launching can be measured on a GPU alone; there is none here.")
        return
    for which in ("forward", "forward+backward"):
        about = {"op": "masked_glu", "pass": which, "shape": [TOKENS, WIDTH], "dtype": "bfloat16"}
        yield about, functools.partial(measured, which, device, effort)


def measured(which, device, effort, backend=BACKENDS[False]):
    """A row of the processor's times."""
    gate, up, grad = (torch.randn(1, TOKENS, WIDTH, device=device).bfloat16() for _ in range(3))
    mask = torch.rand(1, WIDTH, device=device)
    leaves = [x.requires_grad_() for x in (gate, up, mask)]

    def forward(function):
        with torch.no_grad():
            return function([gate, up], mask, "silu")

    def both(function):
        return torch.autograd.grad(function([gate, up], mask, "silu"), leaves, grad)

    run = forward if which == "forward" else both
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    ways = {"ours": ours, "eager": eager, "torch.compile": compiled(eager, backend)}
    contenders = [
        # Waiting before each run: a full queue would make the processor wait within it.
        Contender(name, lambda _, f=function: run(f), prepare=wait)
        for name, function in ways.items()
    ]
    return compare(contenders, None, "cpu", effort)  # the processor's clock
