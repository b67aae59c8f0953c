"""cross_entropy_ and kl_divergence_ against what else turns logits into losses and their gradients."""

import functools
import importlib.util

import torch
import torch.nn.functional as F

import neumuter_kernels as nk
from bench.timing import BACKENDS, Contender, compare, compiled, copying
from neumuter_kernels import reference
from neumuter_kernels.selftest import TOLERANCE

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
# Tokens and vocabulary: a chunk of SmolLM2's and of Llama 3's logits.
CASES = {
    "cpu": [(170, 49152, FLOAT32), (170, 49152, BFLOAT16)],
    "cuda": [(1024, 128256, FLOAT32), (1024, 128256, BFLOAT16)],
}


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.float(), targets, reduction="none")


def kl_divergence(logits, other):
    q, p = (x.float().log_softmax(-1) for x in (logits, other))
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


# Of each op: ours, plain PyTorch, the reference, tensors of the logits' size that must move.
OPS = {
    "cross_entropy_": (nk.cross_entropy_, cross_entropy, reference.cross_entropy, 2),
    "kl_divergence_": (nk.kl_divergence_, kl_divergence, reference.kl_divergence, 3),
}


def cases(device, effort, small=False):
    """Yields (what a row is about, how it is measured)."""
    for tokens, vocabulary, dtype in [(8, 500, FLOAT32)] if small else CASES[device]:
        for op in OPS:
            about = {
                "op": op, "pass": "losses+gradients", "shape": [tokens, vocabulary],
                "dtype": str(dtype).removeprefix("torch."),
            }  # fmt: skip
            yield about, functools.partial(_measured, op, tokens, vocabulary, dtype, device, effort, small)


def _measured(op, tokens, vocabulary, dtype, device, effort, small):
    ours, plain, exact, moved = OPS[op]
    logits, other = (4 * torch.randn(2, tokens, vocabulary, device=device)).to(dtype)
    argument = torch.randint(vocabulary, (tokens,), device=device) if op == "cross_entropy_" else other
    expected = exact(logits.double(), argument.double() if argument is other else argument)
    ways = {"eager": plain, "torch.compile": compiled(plain, BACKENDS[small])}
    if op == "cross_entropy_" and device == "cuda":
        ways |= _others()
    contenders = [in_place(ours, logits, argument, expected)]
    contenders += [by_autograd(name, way, logits, argument, expected) for name, way in ways.items()]
    moved_bytes = moved * logits.numel() * logits.element_size()
    return compare(contenders, copying(moved_bytes, device), device, effort, moved_bytes)


def _others():
    """The cross-entropies of other libraries that are installed."""
    found = {}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_cross_entropy

        found["Liger"] = lambda logits, targets: liger_cross_entropy(logits, targets, reduction="none")
    if importlib.util.find_spec("quack"):
        from quack.cross_entropy import cross_entropy as quack_cross_entropy

        found["quack"] = lambda logits, targets: quack_cross_entropy(logits, targets, reduction="none")
    return found


def in_place(op, logits, argument, expected):
    """Ours. It overwrites its logits, so each run begins with what the one before left: as much work."""
    own = logits.clone()

    def check():
        given = logits.clone()
        return disagreement(op(given, argument), given, expected)

    return Contender("ours", lambda _: op(own, argument), check=check)


def by_autograd(name, function, logits, argument, expected):
    """Liger overwrites its logits, too, so that what is checked begins with a copy of its own."""
    own = logits.clone().requires_grad_()

    def run(leaf):
        losses = function(leaf, argument)
        (gradient,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses))
        return losses.detach(), gradient

    def check():
        return disagreement(*run(logits.clone().requires_grad_()), expected)

    return Contender(name, lambda _: run(own), check=check)


def disagreement(losses, gradients, expected):
    """None, or which of the results is too far from the reference in float64."""
    allowed = TOLERANCE[gradients.dtype]
    for name, a, b in zip(("losses", "gradients"), (losses, gradients), expected, strict=True):
        error = ((a.double() - b).norm() / b.norm()).item()
        if not error <= allowed:
            return f"{name}: relative error {error:.1e}, allowed {allowed:.0e}"
    return None
