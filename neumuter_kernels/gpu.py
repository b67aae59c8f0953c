"""The ops on GPU tensors: Triton kernels, imported at the first call.

Importing Triton takes longer than importing this package. ``select_muted`` and ``mute_`` on the GPU are CUDA
C++.
"""

import torch

from neumuter_kernels import _C, reference

_ops = torch.ops.neumuter


def _masked_ffn():
    from neumuter_kernels.triton import masked_ffn

    return masked_ffn


def _hard_concrete():
    from neumuter_kernels.triton import hard_concrete

    return hard_concrete


def _token_losses():
    from neumuter_kernels.triton import token_losses

    return token_losses


def masked_glu(gate, up, mask, row_ids, activation):
    return _masked_ffn().forward(gate, up, mask, row_ids, activation)


def masked_glu_backward(grad, gate, up, mask, row_ids, activation, input_grad, mask_grad):
    return _masked_ffn().backward(grad, gate, up, mask, row_ids, activation, input_grad, mask_grad)


def masked_glu_backward_(grad, gate, up, mask, row_ids, activation, mask_grad):
    return _masked_ffn().backward(grad, gate, up, mask, row_ids, activation, True, mask_grad, in_place=True)[
        2
    ]


def masked_glu_packed(gate_up, mask, row_ids, activation, interleaved):
    return _masked_ffn().forward(gate_up, None, mask, row_ids, activation, True, interleaved)


def masked_glu_packed_backward(grad, gate_up, mask, row_ids, activation, interleaved, input_grad, mask_grad):
    return _masked_ffn().backward(
        grad, gate_up, None, mask, row_ids, activation, input_grad, mask_grad, True, interleaved
    )[::2]


def masked_glu_packed_backward_(grad, gate_up, mask, row_ids, activation, interleaved, mask_grad):
    return _masked_ffn().backward(
        grad, gate_up, None, mask, row_ids, activation, True, mask_grad, True, interleaved, in_place=True
    )[2]


def masked_act(hidden, mask, row_ids, activation):
    return _masked_ffn().forward(hidden, None, mask, row_ids, activation)


def masked_act_backward(grad, hidden, mask, row_ids, activation, input_grad, mask_grad):
    return _masked_ffn().backward(grad, hidden, None, mask, row_ids, activation, input_grad, mask_grad)[::2]


def masked_act_backward_(grad, hidden, mask, row_ids, activation, mask_grad):
    return _masked_ffn().backward(
        grad, hidden, None, mask, row_ids, activation, True, mask_grad, in_place=True
    )[2]


def hard_concrete(scores, sample_ids, step, seed, layer, temperature, gamma, zeta, training):
    return _hard_concrete().forward(scores, sample_ids, step, seed, layer, temperature, gamma, zeta, training)


def hard_concrete_backward(grad, scores, sample_ids, step, seed, layer, temperature, gamma, zeta, training):
    return _hard_concrete().backward(
        grad, scores, sample_ids, step, seed, layer, temperature, gamma, zeta, training
    )


def cross_entropy_(logits, targets):
    return _token_losses().cross_entropy_(logits, targets)


def kl_divergence_(logits, reference):
    return _token_losses().kl_divergence_(logits, reference)


def select_muted(scores, widths, budget, threshold, gamma, zeta):
    """Without nvcc at build time: select on the CPU. Waits for the device; the CUDA kernel does not."""
    selected = _ops.select_muted(scores.cpu(), widths, budget, threshold, gamma, zeta)
    return tuple(x.to(scores.device) for x in selected)


def mute_(hidden, indptr, indices, gains, row_ids, layer):
    """Without nvcc at build time: in plain PyTorch. Waits for the device; the CUDA kernel does not."""
    flat = hidden.view(-1, hidden.shape[-1])
    flat.copy_(reference.mute(flat, indptr, indices, gains, row_ids, layer))


TRITON_OPS = (
    masked_glu, masked_glu_backward, masked_glu_backward_,
    masked_glu_packed, masked_glu_packed_backward, masked_glu_packed_backward_,
    masked_act, masked_act_backward, masked_act_backward_,
    hard_concrete, hard_concrete_backward,
    cross_entropy_, kl_divergence_,
)  # fmt: skip

_library = torch.library.Library("neumuter", "IMPL", "CUDA")


def _register(op):
    def on_device(x, *rest):
        with torch.cuda.device(x.device):  # Triton launches on the current device
            return op(x, *rest)

    _library.impl(op.__name__, on_device)


for _op in TRITON_OPS:
    _register(_op)
if not _C.build_info()["cuda"]:
    _register(select_muted)
    _register(mute_)
