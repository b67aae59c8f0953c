"""Fake kernels: the shapes and dtypes that each op returns, for torch.compile and meta tensors."""

import torch

from neumuter_kernels.reference import compute_dtype


def _empty(x, wanted=True):
    return x.new_empty(x.shape if wanted else (0,))


@torch.library.register_fake("neumuter::masked_glu")
def _(gate, up, mask, row_ids, activation):
    return _empty(gate)


@torch.library.register_fake("neumuter::masked_glu_backward")
def _(grad, gate, up, mask, row_ids, activation, input_grad, mask_grad):
    return _empty(gate, input_grad), _empty(gate, input_grad), _empty(mask, mask_grad)


@torch.library.register_fake("neumuter::masked_glu_packed")
def _(gate_up, mask, row_ids, activation, interleaved):
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@torch.library.register_fake("neumuter::masked_glu_packed_backward")
def _(grad, gate_up, mask, row_ids, activation, interleaved, input_grad, mask_grad):
    return _empty(gate_up, input_grad), _empty(mask, mask_grad)


@torch.library.register_fake("neumuter::masked_act")
def _(hidden, mask, row_ids, activation):
    return _empty(hidden)


@torch.library.register_fake("neumuter::masked_act_backward")
def _(grad, hidden, mask, row_ids, activation, input_grad, mask_grad):
    return _empty(hidden, input_grad), _empty(mask, mask_grad)


@torch.library.register_fake("neumuter::masked_glu_backward_")
def _(grad, gate, up, mask, row_ids, activation, mask_grad):
    return _empty(mask, mask_grad)


@torch.library.register_fake("neumuter::masked_glu_packed_backward_")
def _(grad, gate_up, mask, row_ids, activation, interleaved, mask_grad):
    return _empty(mask, mask_grad)


@torch.library.register_fake("neumuter::masked_act_backward_")
def _(grad, hidden, mask, row_ids, activation, mask_grad):
    return _empty(mask, mask_grad)


@torch.library.register_fake("neumuter::hard_concrete")
def _(scores, sample_ids, step, seed, layer, temperature, gamma, zeta, training):
    return scores.new_empty((sample_ids.shape[0], scores.shape[0]))


@torch.library.register_fake("neumuter::hard_concrete_backward")
def _(grad, scores, sample_ids, step, seed, layer, temperature, gamma, zeta, training):
    return _empty(scores)


@torch.library.register_fake("neumuter::select_muted")
def _(scores, widths, budget, threshold, gamma, zeta):
    n = scores.shape[0]
    capacity = n if budget is None else min(budget, n)
    return (
        scores.new_empty((len(widths) + 1,), dtype=torch.int32),
        scores.new_empty((capacity,), dtype=torch.int32),
        scores.new_empty((capacity,)),
    )


@torch.library.register_fake("neumuter::mute_")
def _(hidden, indptr, indices, gains, row_ids, layer):
    pass


@torch.library.register_fake("neumuter::cross_entropy_")
@torch.library.register_fake("neumuter::kl_divergence_")
def _(logits, _):
    return logits.new_empty(logits.shape[:1], dtype=compute_dtype(logits.dtype))
