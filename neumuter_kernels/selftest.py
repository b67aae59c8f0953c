"""Tests every op of this machine against the reference, in about a second."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import neumuter_kernels as nk
from neumuter_kernels import reference
from neumuter_kernels.info import backends

# The largest relative error (see ``relative_error``) that rounding alone explains.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# The width is odd, so that the vector loops leave some columns over.
TOKENS, WIDTH, ROWS = 12, 331, 3


class Result(NamedTuple):
    """``error`` says what is wrong with ``op`` on tensors of ``device``; None: nothing."""

    device: str
    op: str
    error: str | None


def run(device: str) -> Iterator[Result]:
    """Test every op, one after another.

    Args:
        device: what tensors are on, for example "cpu" or "cuda:0".

    Yields:
        A Result per op. An exception becomes an error there.
    """
    for op in backends():
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                error = next(CHECKS[op](device), None)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        yield Result(device, op, error)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖ in float64; exact is what the reference gives in float64."""
    found, exact = found.detach().cpu().double(), exact.detach().cpu().double()
    return float((found - exact).norm() / exact.norm().clamp(min=1e-30))


# Each check yields what is wrong.


def _masked(
    op: Callable[..., Tensor], meaning: Callable[..., Tensor], inputs: int, device: str
) -> Iterator[str]:
    """Values and gradients of a masked activation of ``inputs`` tensors, with and without row ids."""
    row_ids = torch.arange(TOKENS) % (ROWS + 1) - 1
    for dtype, tolerance in TOLERANCE.items():
        for number, activation in enumerate(reference.ACTIVATIONS):
            ids = row_ids if number % 2 else None
            tensors = [torch.randn(TOKENS, WIDTH).to(dtype) for _ in range(inputs)]
            mask, grad = torch.rand(ROWS, WIDTH), torch.randn(TOKENS, WIDTH).to(dtype)
            here = [x.to(device).requires_grad_() for x in (*tensors, mask)]
            exact = [x.double().requires_grad_() for x in (*tensors, mask)]
            h = op(*here, None if ids is None else ids.to(device), activation)
            true = meaning(*exact, ids, activation)
            found = (h, *torch.autograd.grad(h, here, grad.to(device)))
            wanted = (true, *torch.autograd.grad(true, exact, grad.double()))
            for name, x, y in zip(("value", *["gradient"] * len(here)), found, wanted, strict=True):
                yield from _far(f"{name} of {activation}, {dtype}", x, y, tolerance)


def _masked_ffn(device: str) -> Iterator[str]:
    yield from _masked(nk.masked_act, reference.masked_act, 1, device)
    yield from _masked(nk.masked_glu, reference.masked_glu, 2, device)
    for interleaved in (False, True):
        gate_up, mask = torch.randn(TOKENS, 2 * WIDTH), torch.rand(ROWS, WIDTH)
        h = nk.masked_glu(gate_up=gate_up.to(device), mask=mask.to(device), interleaved=interleaved)
        wanted = reference.masked_glu_packed(gate_up.double(), mask.double(), interleaved=interleaved)
        yield from _far(f"packed, interleaved={interleaved}", h, wanted, TOLERANCE[torch.float32])


def _hard_concrete(device: str) -> Iterator[str]:
    scores, grad, ids = 3 * torch.randn(WIDTH), torch.randn(ROWS, WIDTH), torch.arange(ROWS)
    for training in (True, False):
        leaf = scores.to(device).requires_grad_()
        gates = nk.hard_concrete(leaf, ROWS, seed=7, step=3, layer=2, training=training)
        if not torch.equal(gates.cpu(), reference.hard_concrete(scores, ids, 7, 3, 2, training=training)):
            yield f"gates differ from the reference in their bits, training={training}"
        (slope,) = torch.autograd.grad(gates, leaf, grad.to(device))
        exact = reference.hard_concrete_backward(grad, scores, ids, 7, 3, 2, training=training)
        yield from _far(f"gradient, training={training}", slope, exact, TOLERANCE[torch.float32])


def _token_losses(
    op: Callable[..., Tensor], meaning: Callable[..., tuple[Tensor, Tensor]], others: Tensor, device: str
) -> Iterator[str]:
    """Losses and gradients of logits against ``others``: targets, or the logits of the reference."""
    for dtype, tolerance in TOLERANCE.items():
        logits, rounded = (x.to(dtype) if x.is_floating_point() else x for x in (_logits(), others))
        slopes = logits.to(device, copy=True)
        losses = op(slopes, rounded.to(device))
        wanted = meaning(logits.double(), rounded.double() if rounded.is_floating_point() else rounded)
        yield from _far(f"losses, {dtype}", losses, wanted[0], TOLERANCE[torch.float32])
        yield from _far(f"gradients, {dtype}", slopes, wanted[1], tolerance)


def _logits() -> Tensor:
    return 4 * torch.randn(TOKENS, WIDTH)


def _cross_entropy(device: str) -> Iterator[str]:
    targets = torch.randint(WIDTH, (TOKENS,))
    yield from _token_losses(nk.cross_entropy_, reference.cross_entropy, targets, device)


def _kl_divergence(device: str) -> Iterator[str]:
    yield from _token_losses(nk.kl_divergence_, reference.kl_divergence, _logits(), device)


def _select_muted(device: str) -> Iterator[str]:
    scores = torch.randn(4, WIDTH).mul(4).round().div(4)  # many ties
    flat, widths, here = scores.flatten(), [WIDTH] * 4, scores.to(device)
    ways = {
        "budget": (nk.select_muted(here, budget=100), reference.select_muted(flat, widths, budget=100)),
        "threshold": (
            nk.select_muted(here, threshold=0.25),
            reference.select_muted(flat, widths, threshold=reference.logit(0.25)),
        ),
    }
    for way, (found, wanted) in ways.items():
        for name, x, y in zip(("indptr", "indices", "gains"), found, wanted, strict=True):
            if not torch.equal(x.cpu(), y):
                yield f"{name} by {way} differ from the reference"


def _mute(device: str) -> Iterator[str]:
    selected = [nk.select_muted(torch.randn(2, WIDTH), budget=40) for _ in range(2)]
    indptr = torch.stack([selected[0].indptr, selected[1].indptr + 40])
    indices = torch.cat([one.indices for one in selected])
    gains, rows = torch.randn(80), torch.randint(-1, 2, (TOKENS,))
    for dtype in TOLERANCE:
        hidden = torch.randn(TOKENS, WIDTH).to(dtype)
        wanted = reference.mute(hidden, indptr, indices, gains, rows, 1)
        h, *sets, ids = (x.to(device, copy=True) for x in (hidden, indptr, indices, gains, rows))
        if not torch.equal(nk.mute_(h, sets[0], sets[1], sets[2], ids, 1).cpu(), wanted):
            yield f"bits differ from the reference, {dtype}"


CHECKS: dict[str, Callable[[str], Iterator[str]]] = {
    "masked_ffn": _masked_ffn,
    "hard_concrete": _hard_concrete,
    "cross_entropy_": _cross_entropy,
    "kl_divergence_": _kl_divergence,
    "select_muted": _select_muted,
    "mute_": _mute,
}


def _far(name: str, found: Tensor, exact: Tensor, tolerance: float) -> Iterator[str]:
    """What is wrong if the relative error of ``found`` exceeds ``tolerance``."""
    if found.shape != exact.shape:
        yield f"{name}: shape {list(found.shape)}, not {list(exact.shape)}"
        return
    error = relative_error(found, exact)
    # Written so that NaN, too, is an error.
    if not error <= tolerance:
        yield f"{name}: relative error {error:.2g}, at most {tolerance:g} expected"
