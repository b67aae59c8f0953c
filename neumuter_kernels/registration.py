"""The autograd of the ops: one backward op each, and nothing saved but the inputs.

Registered for the Autograd key directly. torch.library.register_autograd does the same with more
Python around it, and at a few hundred tokens the call itself weighs as much as the work.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ops = torch.ops.neumuter
_library = torch.library.Library("neumuter", "IMPL", "Autograd")
_below_autograd = torch._C._AutoDispatchBelowAutograd

# What _register wants from its ``gradients``.
Gradients = Callable[[Tensor, Sequence[Tensor], tuple[Any, ...], Sequence[bool]], tuple[Tensor | None, ...]]


def _register(name: str, tensors: int, gradients: Gradients) -> None:
    """Make the op ``name`` differentiable.

    ``tensors``: how many of its arguments, the first ones, are tensors (or None). ``gradients``:
    called with the gradient of the output, the saved tensors, the other arguments and a bool per tensor
    (is its gradient needed?); returns a gradient or None per tensor.
    """
    op: Callable[..., Tensor] = getattr(_ops, name).default

    @once_differentiable
    def once(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[:tensors]
        wanted = gradients(grad, ctx.saved_tensors, ctx.options, needed)
        return *wanted, *[None] * len(ctx.options)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Tensor:
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

    def kernel(*arguments: Any) -> Tensor:
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:tensors]):
            output: Tensor = Differentiable.apply(*arguments)
            return output
        with _below_autograd():
            return op(*arguments)

    _library.impl(name, kernel)


def _masked_ffn(
    grad: Tensor, tensors: Sequence[Tensor], options: tuple[Any, ...], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    gate, up, mask, _ = needed
    found = _ops.masked_ffn_backward(grad, *tensors, *options, gate or up, mask)
    return *(g if need else None for g, need in zip(found, needed[:-1], strict=True)), None


def _hard_concrete(
    grad: Tensor, tensors: Sequence[Tensor], options: tuple[Any, ...], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    return _ops.hard_concrete_backward(grad, *tensors, *options), None, None


_register("masked_ffn", 4, _masked_ffn)
_register("hard_concrete", 3, _hard_concrete)
