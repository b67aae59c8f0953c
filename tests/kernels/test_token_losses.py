"""Losses of tokens and the gradients that replace their logits, against float64 and on every backend."""

import pytest
import torch

import neumuter_kernels as nk
from neumuter_kernels import reference
from tests.kernels import backends
from tests.kernels.backends import assert_as_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [(3, 97), (1, 1), (2, 16), (5, 4100), (0, 7)]
INF = float("inf")


def inputs(shape, dtype, scale=4.0):
    logits, other = (torch.randn(2, *shape) * scale).to(dtype)
    return logits, other, torch.randint(max(shape[1], 1), shape[:1])


OPS = {
    "cross_entropy": lambda logits, other, targets: (nk.cross_entropy_, reference.cross_entropy, targets),
    "kl_divergence": lambda logits, other, targets: (nk.kl_divergence_, reference.kl_divergence, other),
}


def run(op, logits, other, targets, device):
    """Losses and gradients: ours, the reference's in the same dtype, the reference's in float64."""
    ours, plain, argument = OPS[op](logits, other, targets)
    given, second = logits.to(device, copy=True), argument.to(device, copy=True)
    losses = ours(given, second)
    assert torch.equal(second.cpu(), argument)
    exact = plain(logits.double(), argument.double() if argument.is_floating_point() else argument)
    return (losses, given), plain(logits, argument), exact


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_plain_pytorch(op, dtype, shape, device, poisoned):
    ours, plain, exact = run(op, *inputs(shape, dtype), device)
    for name, a, b, c in zip(("losses", "gradients"), ours, plain, exact, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(a.cpu(), c, rtol=1e-12, atol=1e-14)
        else:
            assert_as_accurate(a.cpu(), b, c, name)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("offset", [-3e4, 3e4])
def test_large_logits_do_not_overflow(op, offset, device):
    logits, other, targets = inputs((4, 300), torch.float32, scale=100.0)
    ours, plain, exact = run(op, logits + offset, other - offset, targets, device)
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert_as_accurate(a.cpu(), b, c)


def test_barred_tokens(device):
    """Logits of −∞ (a token that cannot come) add nothing; barred by q alone they cost infinitely much."""
    logits, other, targets = inputs((3, 50), torch.float32)
    logits[:, 7] = other[:, 7] = -INF
    targets[:] = 3
    for op in OPS:
        ours, plain, exact = run(op, logits, other, targets, device)
        for a, b, c in zip(ours, plain, exact, strict=True):
            assert_as_accurate(a.cpu(), b, c)
    other[0, 7] = 0.0
    losses = nk.kl_divergence_(logits.to(device, copy=True), other.to(device)).cpu()
    assert losses[0] == INF
    assert losses[1:].isfinite().all()
    targets[0] = 7
    assert nk.cross_entropy_(logits.to(device, copy=True), targets.to(device))[0] == INF


def test_equal_distributions_diverge_by_nothing(device):
    logits = (torch.randn(4, 5000) * 5).to(device)
    given = logits.clone()
    losses = nk.kl_divergence_(given, logits + 2)
    assert losses.abs().max() < 3e-6
    assert given.abs().max() < 1e-6


def test_nan_stays_nan(device):
    logits, other, targets = inputs((2, 40), torch.float32)
    logits[0, 5] = float("nan")
    for op in OPS:
        ours, argument = OPS[op](logits, other, targets)[0::2]
        given = logits.to(device, copy=True)
        losses = ours(given, argument.to(device))
        assert losses.isnan().tolist() == [True, False]
        assert given[0].isnan().all()


def test_a_target_outside_the_vocabulary():
    logits = torch.randn(2, 5)
    for bad in (-1, 5):
        targets = torch.tensor([1, bad])
        with pytest.raises(RuntimeError, match=rf"targets must lie in \[0, 5\), got {bad}"):
            nk.cross_entropy_(logits.clone(), targets)
        with backends.use("triton") as device:
            given = logits.to(device, copy=True)
            losses = nk.cross_entropy_(given, targets.to(device))
            assert losses.isnan().tolist() == [False, True]
            # What looks like a gradient would be trained on.
            assert given.isnan().all(1).tolist() == [False, True]


def test_same_bits_for_any_number_of_threads():
    logits, other, targets = inputs((9, 9000), torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append([x for op in OPS for x in run(op, logits, other, targets, "cpu")[0]])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_gradient_is_that_of_the_loss():
    """By automatic differentiation of the reference in float64."""
    logits, other, targets = inputs((3, 20), torch.float64)
    for op in OPS:
        ours, plain, argument = OPS[op](logits, other, targets)
        x = logits.clone().requires_grad_()
        (expected,) = torch.autograd.grad(plain(x, argument)[0].sum(), x)
        given = logits.clone()
        ours(given, argument)
        torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    logits, other, targets = inputs((3, 20), dtype)
    torch.library.opcheck(torch.ops.neumuter.cross_entropy_.default, (logits, targets))
    torch.library.opcheck(torch.ops.neumuter.kl_divergence_.default, (logits, other))


def test_compiles_without_graph_breaks():
    logits, other, targets = inputs((3, 20), torch.float32)

    def losses(x, y):
        x, y = x * 2, y * 2
        return nk.cross_entropy_(x, targets) + nk.kl_divergence_(y, x), x, y

    expected = losses(logits, other)
    for a, b in zip(torch.compile(losses, fullgraph=True)(logits, other), expected, strict=True):
        torch.testing.assert_close(a, b)


GOOD = torch.randn(3, 5)
BAD = [
    (TypeError, "logits", nk.cross_entropy_, GOOD.long(), torch.zeros(3, dtype=torch.int64)),
    (ValueError, "logits", nk.cross_entropy_, GOOD.T, torch.zeros(5, dtype=torch.int64)),
    (ValueError, "logits", nk.cross_entropy_, GOOD[0], torch.zeros(3, dtype=torch.int64)),
    (
        ValueError,
        "logits requires grad",
        nk.cross_entropy_,
        GOOD.clone().requires_grad_(),
        torch.zeros(3).long(),
    ),
    (TypeError, "targets", nk.cross_entropy_, GOOD, torch.zeros(3)),
    (ValueError, "targets", nk.cross_entropy_, GOOD, torch.zeros(4, dtype=torch.int64)),
    (TypeError, "reference", nk.kl_divergence_, GOOD, GOOD.double()),
    (ValueError, "reference", nk.kl_divergence_, GOOD, GOOD[:2]),
]


@pytest.mark.parametrize(("error", "names", "op", "logits", "other"), BAD)
def test_bad_input_names_the_argument(error, names, op, logits, other):
    with pytest.raises(error, match=names):
        op(logits, other)
