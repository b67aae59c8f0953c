"""Hard-concrete gates: the same bits everywhere, the right distribution, the right gradient."""

import inspect
import math

import pytest
import torch

import neumuter_kernels as nk
from neumuter_kernels import reference

SIZES = [(0, 5), (3, 0), (1, 1), (2, 3), (5, 1001), (3, 4100)]  # rows, F


def test_philox_known_answers():
    """The vectors that Random123 publishes for philox4x32-10."""
    full = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((full,) * 4, (full, full), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, answer in cases:
        assert tuple(int(w) for w in reference.philox_4x32(counter, key)) == answer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("rows", "F"), SIZES)
def test_same_bits_as_the_reference(device, rows, F, training, poisoned):
    scores = 4 * torch.randn(F)
    ids = torch.randint(0, 2**32, (rows,))
    options = (2**62 + 12345, 2**32 - 1, 7)
    expected = reference.hard_concrete(scores, ids, *options, training=training)
    ours = nk.hard_concrete(scores.to(device), rows, *options, sample_ids=ids.to(device), training=training)
    assert torch.equal(ours.cpu(), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("layers", "rows", "F"), [(3, 2, 1001), (1, 3, 4), (5, 1, 4100), (2, 0, 3), (0, 2, 3)]
)
def test_layers_at_once_have_the_bits_of_each_alone(device, layers, rows, F, training, poisoned):
    scores = (4 * torch.randn(layers, F)).to(device).requires_grad_()
    ids = torch.randint(0, 2**32, (rows,), device=device)
    step = torch.tensor(9, device=device)
    gates = nk.hard_concrete(scores, rows, 5, step, 7, sample_ids=ids, training=training)
    grad = torch.randn(gates.shape, device=device)
    (gradient,) = torch.autograd.grad(gates, scores, grad)
    assert gates.shape == (layers, rows, F)
    for number in range(layers):
        alone = scores[number].detach().requires_grad_()
        own = nk.hard_concrete(alone, rows, 5, step, 7 + number, sample_ids=ids, training=training)
        assert torch.equal(gates[number], own)
        assert torch.equal(gradient[number], torch.autograd.grad(own, alone, grad[number])[0])
    options = (ids.cpu(), 5, 9, 7)
    assert (
        torch.equal(gates.cpu(), reference.hard_concrete(scores.detach().cpu(), *options, training=training))
        or layers == 0
    )
    exact = reference.hard_concrete_backward(
        grad.cpu().double(), scores.detach().cpu().double(), *options, training=training
    )
    torch.testing.assert_close(gradient.cpu().double(), exact, rtol=1e-4, atol=1e-5)


def test_the_last_layer_must_have_a_number(device):
    with pytest.raises(ValueError, match="layer"):
        nk.hard_concrete(torch.zeros(3, 4, device=device), 1, 0, 0, 2**32 - 2)


def test_extreme_scores_have_the_same_bits(device):
    scores = torch.tensor([0.0, -0.0, 1e-40, 50.0, -50.0, 1e30, -1e30, float("inf"), -float("inf")])
    for training in (True, False):
        ours = nk.hard_concrete(scores.to(device), 2, 1, 2, 3, training=training)
        expected = reference.hard_concrete(scores, torch.arange(2), 1, 2, 3, training=training)
        assert torch.equal(ours.cpu(), expected)


def test_noise_depends_on_nothing_but_its_key(device):
    """Not on the other samples of a batch nor their order; but on every part of the key."""
    scores = torch.randn(50, device=device)
    ids = torch.tensor([9, 2, 4, 7], device=device)
    together = nk.hard_concrete(scores, 4, 1, 2, 3, sample_ids=ids)
    for i in range(4):
        alone = nk.hard_concrete(scores, 1, 1, 2, 3, sample_ids=ids[i : i + 1])
        assert torch.equal(alone[0], together[i])
    for other in ((5, 2, 3), (1, 5, 3), (1, 2, 5), (1 + 2**33, 2, 3)):
        assert not torch.equal(nk.hard_concrete(scores, 4, *other, sample_ids=ids), together)


def test_distribution():
    """P(z > 0) = σ(s − β·ln(−γ/ζ)) and P(z = 1) by symmetry (Louizos et al. 2018, eq. 12)."""
    beta, (low, high) = 1 / 3, (-0.1, 1.1)
    for s in (-2.0, 0.0, 1.5):
        z = nk.hard_concrete(torch.full((100_000,), s), 4, seed=3, step=0, layer=0)
        open_ = 1 / (1 + math.exp(-(s - beta * math.log(-low / high))))
        one = 1 / (1 + math.exp(-(s - beta * math.log((1 - low) / (high - 1)))))
        assert abs((z > 0).double().mean().item() - open_) < 2e-3
        assert abs((z == 1).double().mean().item() - one) < 2e-3


@pytest.mark.parametrize("training", [True, False])
def test_gradient(device, training):
    scores = (2 * torch.randn(1030)).to(device).requires_grad_()
    grad = torch.randn(3, 1030, device=device)
    z = nk.hard_concrete(scores, 3, 1, 2, 3, training=training)
    (ours,) = torch.autograd.grad(z, scores, grad)
    ids = torch.arange(3)
    exact = reference.hard_concrete_backward(
        grad.double().cpu(), scores.detach().double().cpu(), ids, 1, 2, 3, training=training
    )
    torch.testing.assert_close(ours.double().cpu(), exact, rtol=2e-5, atol=2e-6)
    assert torch.equal(
        ours,
        torch.autograd.grad(nk.hard_concrete(scores, 3, 1, 2, 3, training=training), scores, grad)[0],
    )


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(device, training):
    scores = torch.randn(9, dtype=torch.float64, device=device, requires_grad=True)
    torch.autograd.gradcheck(lambda s: nk.hard_concrete(s, 2, 1, 2, 3, training=training), scores)


def test_opcheck():
    ids = torch.tensor([4, 5])
    args = (ids, torch.tensor(2), 1, 3, 1 / 3, -0.1, 1.1, True)
    torch.library.opcheck(
        torch.ops.neumuter.hard_concrete.default, (torch.randn(9, requires_grad=True), *args)
    )
    backward = torch.ops.neumuter.hard_concrete_backward.default
    torch.library.opcheck(backward, (torch.randn(2, 9), torch.randn(9), *args))


def test_compiles_without_graph_breaks():
    scores = torch.randn(40, requires_grad=True)
    compiled = torch.compile(lambda s: nk.hard_concrete(s, 2, 1, 2, 3) ** 2, fullgraph=True)
    z = compiled(scores)
    assert torch.equal(z, nk.hard_concrete(scores, 2, 1, 2, 3) ** 2)
    z.sum().backward()
    assert scores.grad.abs().sum() > 0


BAD = [
    (TypeError, "scores", {"scores": torch.randn(4).bfloat16()}),
    (ValueError, "scores", {"scores": torch.randn(2, 2, 2)}),
    (ValueError, "rows", {"rows": -1}),
    (ValueError, "seed", {"seed": -1}),
    (ValueError, "step", {"step": 2**32}),
    (ValueError, "layer", {"layer": -1}),
    (ValueError, "temperature", {"temperature": 0}),
    (ValueError, "stretch", {"stretch": (0.1, 1.1)}),
    (ValueError, "sample_ids", {"sample_ids": torch.arange(3)}),
    (TypeError, "sample_ids", {"sample_ids": torch.zeros(2)}),
    (TypeError, "sample_ids", {"sample_ids": [0, 1]}),
    (TypeError, "rows", {"rows": 2.0}),
    (TypeError, "step", {"step": None}),
    (ValueError, "step", {"step": torch.zeros(2, dtype=torch.int64)}),
    (ValueError, "temperature", {"temperature": float("nan")}),
]


@pytest.mark.parametrize(("error", "names", "change"), BAD)
def test_bad_input_names_the_argument(error, names, change):
    with pytest.raises(error, match=names):
        nk.hard_concrete(**{"scores": torch.randn(4), "rows": 2, "seed": 0, "step": 0, "layer": 0} | change)


def test_compiled_training_steps_do_not_recompile():
    """Neither with a step that is an int nor with one that is a tensor."""
    scores = torch.randn(40)
    torch._dynamo.reset()
    compiled = torch.compile(lambda s, step: nk.hard_concrete(s, 2, 1, step, 3) + 0, fullgraph=True)
    for step in range(20):
        expected = nk.hard_concrete(scores, 2, 1, step, 3)
        assert torch.equal(compiled(scores, torch.tensor(step)), expected)
        assert torch.equal(compiled(scores, step), expected)


def test_triton_gets_its_scalars_in_float64():
    """Which it else rounds to float32, and float64 gates with them: only a GPU would show that."""
    tl = pytest.importorskip("triton.language")
    from neumuter_kernels.triton import hard_concrete as kernels

    scalars = kernels._scalars(torch.zeros(1, dtype=torch.float64), 0, 0, 1 / 3, -0.1, 1.1) | {"scale": 0.1}
    floats = {name for name, value in scalars.items() if isinstance(value, float)}
    for kernel in (kernels.hard_concrete_kernel, kernels.hard_concrete_backward_kernel):
        parameters = inspect.signature(kernel.fn).parameters
        assert all(parameters[name].annotation is tl.float64 for name in floats & parameters.keys())
        assert len(floats & parameters.keys()) >= 3
