"""The ops on GPU tensors: Triton kernels, imported at the first call.

Importing Triton takes longer than importing this package. ``select_muted`` on the GPU is CUDA C++.
"""

import torch

from neumuter_kernels import _C

_ops = torch.ops.neumuter


def _masked_ffn():
    from neumuter_kernels.triton import masked_ffn

    return masked_ffn


def _hard_concrete():
    from neumuter_kernels.triton import hard_concrete

    return hard_concrete


_cuda = torch.library.Library("neumuter", "IMPL", "CUDA")


def _on_cuda(name):
    """Registers a function for CUDA tensors; Triton launches on the current device, so make it theirs."""

    def register(function):
        def on_device(x, *rest):
            with torch.cuda.device(x.device):
                return function(x, *rest)

        _cuda.impl(name, on_device)
        return function

    return register


@_on_cuda("masked_glu")
def _(gate, up, mask, row_ids, activation):
    return _masked_ffn().forward(gate, up, mask, row_ids, activation)


@_on_cuda("masked_glu_backward")
def _(grad, gate, up, mask, row_ids, activation, input_grad, mask_grad):
    return _masked_ffn().backward(grad, gate, up, mask, row_ids, activation, input_grad, mask_grad)


@_on_cuda("masked_glu_packed")
def _(gate_up, mask, row_ids, activation, interleaved):
    return _masked_ffn().forward(gate_up, None, mask, row_ids, activation, True, interleaved)


@_on_cuda("masked_glu_packed_backward")
def _(grad, gate_up, mask, row_ids, activation, interleaved, input_grad, mask_grad):
    grad_gate_up, _, grad_mask = _masked_ffn().backward(
        grad, gate_up, None, mask, row_ids, activation, input_grad, mask_grad, True, interleaved
    )
    return grad_gate_up, grad_mask


@_on_cuda("masked_act")
def _(hidden, mask, row_ids, activation):
    return _masked_ffn().forward(hidden, None, mask, row_ids, activation)


@_on_cuda("masked_act_backward")
def _(grad, hidden, mask, row_ids, activation, input_grad, mask_grad):
    grad_hidden, _, grad_mask = _masked_ffn().backward(
        grad, hidden, None, mask, row_ids, activation, input_grad, mask_grad
    )
    return grad_hidden, grad_mask


@_on_cuda("hard_concrete")
def _(scores, sample_ids, step, seed, layer, temperature, gamma, zeta, training):
    return _hard_concrete().forward(scores, sample_ids, seed, step, layer, temperature, gamma, zeta, training)


@_on_cuda("hard_concrete_backward")
def _(grad, scores, sample_ids, step, seed, layer, temperature, gamma, zeta, training):
    return _hard_concrete().backward(
        grad, scores, sample_ids, step, seed, layer, temperature, gamma, zeta, training
    )


if not _C.build_info()["cuda"]:

    @_on_cuda("select_muted")
    def _(scores, widths, budget, threshold, gamma, zeta):
        """Built without nvcc: select on the CPU. Waits for the device, which the CUDA kernel does not."""
        selected = _ops.select_muted(scores.cpu(), widths, budget, threshold, gamma, zeta)
        return tuple(x.to(scores.device) for x in selected)
