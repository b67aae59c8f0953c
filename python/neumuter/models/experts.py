"""Seams of mixtures of experts: tokens are grouped by expert and reach the same kernels."""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import _grouped_linear

from neumuter.models.mask import Mask, masked_act_of, masked_packed_of


def masked_experts(
    experts: Any,
    gates: Any,
    mask: Mask,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """As transformers' grouped_mm_experts_forward: hidden_states and output [T, d], the others [T, k]."""
    tokens, k = top_k_index.shape
    number = experts.num_experts
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    token = order // k
    ends = torch.searchsorted(expert, torch.arange(number, device=expert.device), right=True, out_int32=True)
    mask = Mask(*_by_expert(mask, token, expert, tokens, number))

    def project(x: Tensor, name: str) -> Tensor:
        bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
        return _project(x, getattr(experts, name), ends, bias, experts.is_transposed)

    hidden = project(hidden_states[token], "gate_up_proj" if experts.has_gate else "up_proj")
    if gates.activation and experts.has_gate:
        hidden = masked_packed_of(hidden, gates.activation, mask)
    elif gates.activation:
        hidden = masked_act_of(hidden, gates.activation, mask)
    else:
        hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
        hidden = masked_act_of(hidden, "identity", mask)
    output = project(hidden, "down_proj")
    # Older versions of transformers do not have it.
    if getattr(experts, "has_post_expert_norm", False):
        output = experts.post_expert_norm(output)
    output = output * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    restored = torch.empty_like(output).index_copy(0, order, output)
    return restored.view(tokens, k, -1).sum(1).to(hidden_states.dtype)


def _project(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
    """The rows of x up to ends[e], from ends[e − 1] on, through the weight and bias of expert e."""
    if x.dtype != torch.float64:
        return _grouped_linear(x, weight, offs=ends, bias=bias, is_transposed=is_transposed)
    weight = weight if is_transposed else weight.transpose(-2, -1)
    product: Tensor = torch.ops.transformers.grouped_mm_fallback(
        x, weight, offs=ends
    )  # torch's has no float64
    return product if bias is None else product + bias


def _by_expert(mask: Mask, token: Tensor, expert: Tensor, tokens: int, number: int) -> tuple[Tensor, Tensor]:
    """A mask [G, E·F] as [G·E, F], and the row of each pair of token and expert."""
    values, row_ids, _ = mask
    rows = len(values)
    if row_ids is not None:
        row = row_ids.reshape(-1).to(token.device)[token]
    else:
        row = token // max(tokens // rows, 1)
    return values.reshape(rows * number, -1), torch.where(row < 0, -1, row * number + expert)
