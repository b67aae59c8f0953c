"""First derivatives in reverse mode are all that the ops have; others are refused, never zeros."""

import functools

import pytest
import torch
from torch import func
from torch.autograd import forward_ad, functional, grad

import neumuter_kernels as nk
from neumuter_kernels import reference

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
UP, MASK, TANGENT = X.flip(0), torch.linspace(0.1, 0.9, 4, dtype=torch.float64), X.flip(1)
GATES = functools.partial(reference.hard_concrete, sample_ids=torch.arange(2), seed=0, step=1, layer=2)

# Each op as a function of one tensor: ours, and the same in plain PyTorch.
OPS = {
    "gate": (
        lambda x: nk.masked_glu(x, UP, MASK, None, "relu2"),
        lambda x: reference.masked_glu(x, UP, MASK[None], None, "relu2"),
    ),
    "up": (lambda x: nk.masked_glu(UP, x, MASK), lambda x: reference.masked_glu(UP, x, MASK[None])),
    "mask": (lambda x: nk.masked_glu(UP, UP, x), lambda x: reference.masked_glu(UP, UP, x)),
    "packed": (
        lambda x: nk.masked_glu(gate_up=x, mask=MASK[:2], activation="relu2"),
        lambda x: reference.masked_glu_packed(x, MASK[None, :2], None, "relu2", False),
    ),
    "plain": (lambda x: nk.masked_act(x, MASK), lambda x: reference.masked_act(x, MASK[None])),
    "scores": (lambda x: nk.hard_concrete(x.flatten(), 2, 0, 1, 2), lambda x: GATES(x.flatten())),
}


def dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, TANGENT))).tangent


def penalty(f, x):
    x = x.clone().requires_grad_()
    total = f(x).sum()
    (slope,) = grad(total, x, create_graph=True)
    return grad(total + slope.square().sum(), x)


def vectorised_penalty(f, x):
    x = x.clone().requires_grad_()
    slopes = functional.jacobian(f, x, create_graph=True, vectorize=True)
    return grad(f(x).sum() + slopes.square().sum(), x)


def forward_over_reverse(f, x):
    """The tangent arrives with the gradient of the op's output."""
    x = x.clone().requires_grad_()
    h = f(x)
    with forward_ad.dual_level():
        outer = forward_ad.make_dual(torch.ones_like(h), torch.ones_like(h))
        return forward_ad.unpack_dual(grad(h, x, outer)[0]).tangent


WAYS = {
    "func.jvp": lambda f, x: func.jvp(f, (x,), (TANGENT,))[1],
    "func.jacfwd": lambda f, x: func.jacfwd(f)(x),
    "func.hessian": lambda f, x: func.hessian(lambda y: f(y).sum())(x),
    "functional.jvp": lambda f, x: functional.jvp(f, x, TANGENT)[1],
    "functional.hvp": lambda f, x: functional.hvp(lambda y: f(y).sum(), x, TANGENT)[1],
    "functional.vhp": lambda f, x: functional.vhp(lambda y: f(y).sum(), x, TANGENT)[1],
    "functional.hessian": lambda f, x: functional.hessian(lambda y: f(y).sum(), x),
    "dual numbers": dual,
    "gradient penalty": penalty,
    "vectorised penalty": vectorised_penalty,
    "forward over reverse": forward_over_reverse,
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_a_first_derivative_in_reverse_mode_is_refused(device, way, op):
    """It is what the same in plain PyTorch has."""
    ours, plain = OPS[op]
    WAYS[way](plain, X)
    with pytest.raises(RuntimeError, match=r"first derivatives only|forward-mode|functorch transforms"):
        WAYS[way](ours, X)


@pytest.mark.parametrize("op", OPS)
def test_a_first_derivative_that_could_be_differentiated_again_has_the_same_values(device, op):
    found = [
        grad(f(x := X.clone().requires_grad_()).square().sum(), x, create_graph=again)[0]
        for f, again in ((OPS[op][0], False), (OPS[op][0], True), (OPS[op][1], False))
    ]
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


@pytest.mark.parametrize("op", OPS)
def test_first_derivatives_of_many_outputs_at_once(device, op):
    ours, plain = OPS[op]
    found = functional.jacobian(ours, X, vectorize=True)
    torch.testing.assert_close(found, functional.jacobian(plain, X))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("transform", [func.grad, func.jacrev, lambda f: func.vmap(func.grad(f))])
def test_functions_of_gradients_are_refused_by_name(device, transform, op):
    x = X[None] if transform not in (func.grad, func.jacrev) else X
    with pytest.raises(NotImplementedError, match="no derivative by functorch transforms"):
        transform(lambda y: OPS[op][0](y).sum())(x)


IN_PLACE = {
    "logits": lambda x: nk.cross_entropy_(x, torch.zeros(3, dtype=torch.int64)),
    "reference": lambda x: nk.kl_divergence_(X.clone(), x),
    "hidden": lambda x: nk.mute_(x, *SETS),
    "gains": lambda x: nk.mute_(X.clone(), *SETS[:2], x.flatten()[:2].float()),
}
SETS = (
    torch.tensor([0, 2], dtype=torch.int32),
    torch.tensor([1, 3], dtype=torch.int32),
    torch.tensor([0.5, 0.25]),
)


@pytest.mark.parametrize("name", IN_PLACE)
def test_ops_in_place_have_no_derivative(device, name):
    with pytest.raises(ValueError, match=f"{name} requires grad"):
        IN_PLACE[name](X.clone().requires_grad_())
    with pytest.raises(NotImplementedError, match=f"{name} has a tangent"):
        dual(IN_PLACE[name], X.clone())
    with pytest.raises(NotImplementedError, match=f"{name} has a tangent"):
        func.jvp(IN_PLACE[name], (X.clone(),), (TANGENT,))
