"""The autograd of the ops: one backward op each, and nothing saved but the inputs.

Registered for the Autograd key directly. torch.library.register_autograd does the same with more
Python around it, and at a few hundred tokens the call itself weighs as much as the work.
"""

import torch
from torch.autograd.function import once_differentiable

_ops = torch.ops.neumuter
_library = torch.library.Library("neumuter", "IMPL", "Autograd")
_below_autograd = torch._C._AutoDispatchBelowAutograd


def _register(name, tensors, gradients):
    """Make the op ``name`` differentiable.

    ``tensors``: how many of its arguments, the first ones, are tensors (or None). ``gradients``:
    called with the gradient of the output, the saved tensors, the other arguments and a bool per
    tensor (is its gradient needed?); returns a gradient or None per tensor.
    """
    op = getattr(_ops, name).default

    @once_differentiable
    def once(ctx, grad):
        wanted = gradients(grad, ctx.saved_tensors, ctx.options, ctx.needs_input_grad[:tensors])
        return *wanted, *[None] * len(ctx.options)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            ctx.save_for_backward(*arguments[:tensors])
            ctx.options = arguments[tensors:]
            with _below_autograd():
                return op(*arguments)

        @staticmethod
        def backward(ctx, grad):
            if torch.is_grad_enabled():  # create_graph=True
                # once_differentiable only looks at the gradients that come in; the saved tensors
                # would be taken for constants, silently.
                grad = grad.detach().requires_grad_()
            return once(ctx, grad)

    def kernel(*arguments):
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:tensors]):
            return Differentiable.apply(*arguments)
        with _below_autograd():
            return op(*arguments)

    _library.impl(name, kernel)


def _if_needed(gradients, needed):
    return [g if need else None for g, need in zip(gradients, needed, strict=True)]


def _masked_glu(grad, tensors, options, needed):
    gate, up, mask, _ = needed
    gradients = _ops.masked_glu_backward(grad, *tensors, *options, gate or up, mask)
    return *_if_needed(gradients, needed[:3]), None


def _masked_glu_packed(grad, tensors, options, needed):
    gate_up, mask, _ = needed
    gradients = _ops.masked_glu_packed_backward(grad, *tensors, *options, gate_up, mask)
    return *_if_needed(gradients, needed[:2]), None


def _masked_act(grad, tensors, options, needed):
    hidden, mask, _ = needed
    gradients = _ops.masked_act_backward(grad, *tensors, *options, hidden, mask)
    return *_if_needed(gradients, needed[:2]), None


def _hard_concrete(grad, tensors, options, needed):
    return _ops.hard_concrete_backward(grad, *tensors, *options), None, None


_register("masked_glu", 4, _masked_glu)
_register("masked_glu_packed", 3, _masked_glu_packed)
_register("masked_act", 3, _masked_act)
_register("hard_concrete", 3, _hard_concrete)
