"""The autograd of the ops: one backward op each, and nothing saved but the inputs.

Registered for the Autograd key directly. torch.library.register_autograd does the same with more
Python around it, and at a few hundred tokens the call itself weighs as much as the work.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ops = torch.ops.neumuter
_library = torch.library.Library("neumuter", "IMPL", "Autograd")
_below_autograd = torch._C._AutoDispatchBelowAutograd

# What _register wants from its ``gradients``.
Gradients = Callable[
    [Tensor, Sequence[Tensor], tuple[Any, ...], Sequence[bool], bool], tuple[Tensor | None, ...]
]

# {op name: function of the op's arguments}: the op, whose backward pass may write the gradients of
# the activations into their memory where nobody else holds it.
reusing: dict[str, Callable[..., Tensor]] = {}


def _register(name: str, tensors: int, gradients: Gradients) -> None:
    """Make the op ``name`` differentiable.

    ``tensors``: how many of its arguments, the first ones, are tensors (or None). ``gradients``:
    called with the gradient of the output, the saved tensors, the other arguments, a bool per tensor
    (is its gradient needed?) and whether it may reuse the memory of the activations; returns a
    gradient or None per tensor.
    """
    op: Callable[..., Tensor] = getattr(_ops, name).default

    @once_differentiable
    def once(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[1 : 1 + tensors]
        wanted = gradients(grad, ctx.saved_tensors, ctx.options, needed, ctx.reuse)
        return None, *wanted, *[None] * len(ctx.options)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, reuse: bool, *arguments: Any) -> Tensor:
            ctx.reuse = reuse
            ctx.save_for_backward(*arguments[:tensors])
            ctx.options = arguments[tensors:]
            with _below_autograd():
                return op(*arguments)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            if torch.is_grad_enabled():  # create_graph=True
                # once_differentiable only looks at the gradients that come in; the saved tensors
                # would be taken for constants, silently.
                grad = grad.detach().requires_grad_()
            return once(ctx, grad)

    def kernel(*arguments: Any, reuse: bool = False) -> Tensor:
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:tensors]):
            output: Tensor = Differentiable.apply(reuse, *arguments)
            return output
        with _below_autograd():
            return op(*arguments)

    _library.impl(name, kernel)
    reusing[name] = functools.partial(kernel, reuse=True)


def _holders(tensors: Sequence[Tensor], i: int) -> tuple[int, int, int]:
    """Numbers that grow with whatever holds tensor i: the graph and C++, other tensors, Python."""
    storage = torch._C._storage_Use_Count(tensors[i].untyped_storage()._cdata)
    uses: int = tensors[i]._use_count()  # type: ignore[attr-defined]  # not in torch's stubs
    return uses, storage, sys.getrefcount(tensors[i])


@functools.cache
def _holders_of_an_unshared_tensor() -> tuple[int, int, int]:
    """What ``_holders`` gives in a backward pass for a tensor that only the pass itself holds.

    Measured, since the ways of counting are Python's and PyTorch's own affair.
    """
    count = (0, 0, 0)

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            nonlocal count
            count = _holders(ctx.saved_tensors, 0)
            return grad

    with torch.enable_grad():
        Probe.apply(torch.zeros(1, requires_grad=True) * 1).backward()
    return count


def _unshared(tensors: Sequence[Tensor], indices: Iterable[int]) -> bool:
    """Whether nothing but the backward pass that is under way can see the memory of these tensors."""
    if not hasattr(torch.Tensor, "_use_count"):  # an old torch, in which there is no telling
        return False
    alone = _holders_of_an_unshared_tensor()
    return all(tensors[i].is_contiguous() and _holders(tensors, i) == alone for i in indices)


def _ffn(name: str, inputs: int) -> Gradients:
    """The gradients of a masked FFN whose first ``inputs`` tensors are its activations."""
    backward, backward_in_place = getattr(_ops, f"{name}_backward"), getattr(_ops, f"{name}_backward_")

    def gradients(
        grad: Tensor, tensors: Sequence[Tensor], options: tuple[Any, ...], needed: Sequence[bool], reuse: bool
    ) -> tuple[Tensor | None, ...]:
        *inputs_needed, mask, _ = needed
        if reuse and all(inputs_needed) and _unshared(tensors, range(inputs)):
            grad_mask = backward_in_place(grad, *tensors, *options, mask)
            # A second backward pass through here must not take gradients for activations.
            torch.autograd.graph.increment_version(tensors[:inputs])
            found = (*tensors[:inputs], grad_mask)
        else:
            found = backward(grad, *tensors, *options, any(inputs_needed), mask)
        return *(g if need else None for g, need in zip(found, needed[:-1], strict=True)), None

    return gradients


def _hard_concrete(
    grad: Tensor, tensors: Sequence[Tensor], options: tuple[Any, ...], needed: Sequence[bool], reuse: bool
) -> tuple[Tensor | None, ...]:
    return _ops.hard_concrete_backward(grad, *tensors, *options), None, None


_register("masked_glu", 4, _ffn("masked_glu", 2))
_register("masked_glu_packed", 3, _ffn("masked_glu_packed", 1))
_register("masked_act", 3, _ffn("masked_act", 1))
_register("hard_concrete", 3, _hard_concrete)
