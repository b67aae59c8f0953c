"""With NVIDIA's approximate instructions, at the worst that is documented, kernels are as accurate."""

import pytest
import torch

import neumuter_kernels as nk
from tests.kernels import backends, ptx, test_masked_ffn, test_token_losses

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(backends.HAVE_GPU, reason="the GPU has the instructions")
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def fast(monkeypatch):
    with backends.use("triton") as place, ptx.emulated(monkeypatch):
        yield place


@pytest.mark.parametrize(("layout", "dtype"), [("separate", HALVES[0]), ("plain", HALVES[1])])
@pytest.mark.parametrize("activation", nk.ACTIVATIONS)
def test_rounds_where_eager_rounds(fast, layout, dtype, activation):
    test_masked_ffn.test_rounds_where_eager_rounds(fast, layout, dtype, activation)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_as_accurate_as_plain_pytorch(fast, layout, dtype, activation):
    leaves, ids, grad = test_masked_ffn.make_case(layout, (2, 5), 70, 2, dtype, fast)
    test_masked_ffn.check(layout, leaves, ids, grad, activation)


@pytest.mark.parametrize("activation", nk.ACTIVATIONS)
def test_nan_and_inf_follow_eager(fast, activation):
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]], dtype=torch.bfloat16)
    ours = nk.masked_act(x, torch.ones(1, 4), None, activation)[0]
    assert ours[0].isnan()
    assert ours[1] == float("inf")
    assert ours[3] > 0


@pytest.mark.parametrize("op", test_token_losses.OPS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(3, 97), (5, 4100)], ids=str)
def test_losses(fast, op, dtype, shape):
    inputs = test_token_losses.inputs(shape, dtype)
    ours, plain, exact = test_token_losses.run(op, *inputs, fast)
    for name, a, b, c in zip(("losses", "gradients"), ours, plain, exact, strict=True):
        backends.assert_as_accurate(a, b, c, name)
