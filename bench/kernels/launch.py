"""The processor time of launching masked_glu on a GPU: small tensors, and no waiting for the result.

Whole models of today's sizes are bound by launching wherever a layer computes for less than this time.

Without a GPU, a process with the runtime and the driver of bench/stub_gpu measures what is above them, with
the backward pass in the thread that asks for it: less than with a GPU, for ours and for eager alike.
"""

import functools
import json
import subprocess
import sys

import torch

from bench import ROOT, stub_gpu
from bench.kernels.activations import eager, ours
from bench.timing import BACKENDS, FULL, QUICK, Contender, compare, compiled

TOKENS, WIDTH = 8, 1024  # the GPU is done with them sooner than the processor with launching
PASSES = ("forward", "forward+backward")


def cases(device, effort, small=False):
    """Yields (what a row is about, how it is measured)."""
    about = {"op": "masked_glu", "shape": [TOKENS, WIDTH], "dtype": "bfloat16"}
    if device == "cuda":
        for which in PASSES:
            yield about | {"pass": which}, functools.partial(measured, which, device, effort)
    elif reason := stub_gpu.why_not():
        print(f"Without a GPU, measuring what launching costs {reason}.")
    else:
        rows = functools.cache(functools.partial(measured_on_a_stub, effort))
        for which in PASSES:
            yield about | {"pass": which, "stub": True}, functools.partial(lambda n: rows()[n], which)


def measured_on_a_stub(effort):
    """A row of each pass."""
    command = [sys.executable, "-m", "bench.kernels.launch", "quick" if effort == QUICK else "full"]
    done = subprocess.run(command, cwd=ROOT, env=stub_gpu.environment(), stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main(effort):
    """On a stub: writes what ``measured_on_a_stub`` returns."""
    from bench.stub_gpu.noted import Driver

    Driver().set("stub_note", 0)
    # Waking up the thread of the backward pass may take longer than its work where cores are few.
    with torch.autograd.set_multithreading_enabled(False):
        rows = {which: measured(which, "cuda", effort, backend=None) for which in PASSES}
    json.dump(rows, sys.stdout)


def measured(which, device, effort, backend=BACKENDS[False]):
    """A row of the processor's times; backend: of torch.compile, None without it."""
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
    ways = {"ours": ours, "eager": eager}
    if backend is not None:
        ways["torch.compile"] = compiled(eager, backend)
    contenders = [
        # Waiting before each run: a full queue would make the processor wait within it.
        Contender(name, lambda _, f=function: run(f), prepare=wait)
        for name, function in ways.items()
    ]
    return compare(contenders, None, "cpu", effort)  # the processor's clock


if __name__ == "__main__":
    main(QUICK if sys.argv[1:] == ["quick"] else FULL["cpu"])
