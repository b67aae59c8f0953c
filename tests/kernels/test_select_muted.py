"""Selection and compaction: exact, stable, and what happens at the edges of float32."""

import pytest
import torch

import neumuter_kernels as nk
from neumuter_kernels import reference
from tests.kernels.backends import DEVICES

INF, NAN = float("inf"), float("nan")


def misleading(n=100_000, sample=8192):
    """Low where the CPU kernel samples to guess the cut, so that its guess is far too low."""
    scores = torch.rand(n)
    scores[torch.arange(sample) * n // sample] = -1.0
    return scores


SCORES = {
    "random": lambda: [torch.randn(1000) for _ in range(5)],
    "many blocks": lambda: [torch.randn(40_000), torch.randn(70_001)],
    "unequal, some empty": lambda: [torch.randn(n) for n in (0, 3, 0, 17, 1, 0)],
    "all equal": lambda: [torch.full((700,), 2.398) for _ in range(3)],
    "few values": lambda: [torch.randint(-2, 3, (3000,)).float() for _ in range(2)],
    "signed zeros": lambda: [torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0, -1e-45])],
    "infinities": lambda: [torch.tensor([INF, -INF, 3e38, -3e38, 0.0, INF, -INF])],
    "NaN": lambda: [torch.tensor([NAN, 1.0, -NAN, -1.0]), torch.tensor([NAN, NAN]), torch.tensor([0.5])],
    "denormals": lambda: [torch.tensor([1e-40, -1e-40, 2e-40, -2e-40, 1e-45, 0.0])],
    "a sample misleads": lambda: [misleading()],
    "one neuron": lambda: [torch.zeros(1)],
    "no neuron": lambda: [torch.zeros(0)],
}


def same(ours, expected):
    assert ours[0].dtype == ours[1].dtype == torch.int32
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scores", SCORES)
def test_budgets(device, scores, poisoned):
    layers = SCORES[scores]()
    flat, widths = torch.cat(layers), [len(s) for s in layers]
    on_device = [s.to(device) for s in layers]
    n = len(flat)
    for k in sorted({0, 1, 2, 3, 5, n // 3, n - 1, n, n + 10} & set(range(n + 11))):
        same(nk.select_muted(on_device, budget=k), reference.select_muted(flat, widths, budget=k))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scores", SCORES)
def test_thresholds(device, scores, poisoned):
    layers = SCORES[scores]()
    flat, widths = torch.cat(layers), [len(s) for s in layers]
    on_device = [s.to(device) for s in layers]
    for r in (1e-30, 0.15, 0.5, 0.9, 1 - 1e-12):
        expected = reference.select_muted(flat, widths, threshold=reference.logit(r))
        same(nk.select_muted(on_device, threshold=r), expected)


def test_what_the_result_means():
    scores = torch.tensor([[3.0, -2.0, 0.0, -9.0], [-9.0, 5.0, -2.0, -3.0]])
    indptr, indices, gains = nk.select_muted(scores, budget=5)
    assert indptr.tolist() == [0, 2, 5]
    assert indices.tolist() == [1, 3, 0, 2, 3]
    gate = (torch.sigmoid(torch.tensor([-2.0, -9.0, -9.0, -2.0, -3.0])) * 1.2 - 0.1).clamp(0, 1)
    torch.testing.assert_close(gains, gate, rtol=1e-5, atol=1e-6)
    # A budget that falls among the equal scores −2 takes the one of the lower layer.
    assert nk.select_muted(scores, budget=4).indices.tolist() == [1, 3, 0, 3]
    # A share is rounded down; a threshold leaves the rest of its capacity marked.
    assert nk.select_muted(scores, budget=0.3).indices.tolist() == [3, 0]
    by_threshold = nk.select_muted(scores, threshold=0.01)
    assert by_threshold.indices.tolist() == [3, 0, -1, -1, -1, -1, -1, -1]
    assert by_threshold.gains[2:].tolist() == [1.0] * 6


def test_same_bits_for_any_number_of_threads():
    scores = torch.randn(7, 30_000).round(decimals=2)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(nk.select_muted(scores, budget=0.1))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        same(other, results[0])


def test_nan_raises_in_debug_mode(monkeypatch):
    monkeypatch.setenv("NEUMUTER_DEBUG", "1")
    with pytest.raises(ValueError, match="NaN"):
        nk.select_muted(torch.tensor([[NAN, 1.0]]), budget=1)


def test_opcheck():
    for budget in (0, 3, None):
        args = (torch.randn(10), [4, 6], budget, 0.2, -0.1, 1.1)
        torch.library.opcheck(torch.ops.neumuter.select_muted.default, args)


def test_compiles_without_graph_breaks():
    compiled = torch.compile(lambda s: nk.select_muted(s, budget=7), fullgraph=True)
    scores = torch.randn(3, 20)
    same(compiled(scores), nk.select_muted(scores, budget=7))


BAD = [
    (TypeError, "budget and threshold", {}),
    (TypeError, "budget and threshold", {"budget": 1, "threshold": 0.5}),
    (TypeError, "budget", {"budget": True}),
    (TypeError, "budget", {"budget": "1%"}),
    (ValueError, "budget", {"budget": -1}),
    (ValueError, "budget", {"budget": 1.5}),
    (ValueError, "threshold", {"threshold": 1.0}),
    (TypeError, "scores", {"scores": torch.zeros(2, 2).double(), "budget": 1}),
    (ValueError, "scores", {"scores": torch.zeros(4), "budget": 1}),
    (ValueError, "scores", {"scores": [], "budget": 1}),
    (ValueError, "stretch", {"budget": 1, "stretch": (1.1, -0.1)}),
    (ValueError, "stretch", {"budget": 1, "stretch": (float("nan"), 1.1)}),
]


@pytest.mark.parametrize(("error", "names", "arguments"), BAD)
def test_bad_input_names_the_argument(error, names, arguments):
    with pytest.raises(error, match=names):
        nk.select_muted(**{"scores": torch.zeros(2, 2)} | arguments)
