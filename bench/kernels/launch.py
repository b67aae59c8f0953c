"""The processor time of launching masked_glu on a GPU: small tensors, and no waiting for the result.

Whole models of today's sizes are bound by launching wherever a layer computes for less than this time.
"""

import torch

import neumuter_kernels as nk
from bench.kernels import eager
from bench.timing import Contender, compare, compiled

TOKENS, WIDTH = 8, 1024  # the GPU is done with them sooner than the processor with launching


def cases(device, effort, small=False):
    """Yields (what a row is about, how it is measured); nothing without a GPU."""
    if device != "cuda":
        print("Launching can be measured on a GPU alone; there is none here.")
        return
    for which in ("forward", "forward+backward"):
        about = {"op": "masked_glu", "pass": which, "shape": [TOKENS, WIDTH], "dtype": "bfloat16"}
        yield about, lambda which=which: _measured(which, effort)


def _measured(which, effort):
    gate, up, grad = (torch.randn(1, TOKENS, WIDTH, device="cuda").bfloat16() for _ in range(3))
    mask = torch.rand(1, WIDTH, device="cuda")
    leaves = [x.requires_grad_() for x in (gate, up, mask)]

    def forward(function):
        with torch.no_grad():
            return function([gate, up], mask, "silu")

    def both(function):
        return torch.autograd.grad(function([gate, up], mask, "silu"), leaves, grad)

    run = forward if which == "forward" else both
    ways = {"ours": lambda x, m, a: nk.masked_glu(*x, m, activation=a), "eager": eager}
    contenders = [
        # Waiting before each run: a full queue would make the processor wait within it.
        Contender(name, lambda _, f=function: run(f), prepare=torch.cuda.synchronize)
        for name, function in (ways | {"torch.compile": compiled(eager)}).items()
    ]
    return compare(contenders, None, "cpu", effort)  # the processor's clock
