"""Seams of mixtures of experts: tokens are grouped by expert and reach the same kernels.

- "experts": transformers' experts interface; it gets the tokens and the experts chosen for each.
- "repeated_experts": Llama 4's; it gets the tokens once for each expert, times their weights there.
- "routing_experts": JetMoE's; it gets the tokens and routes them itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
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
    mask = _by_expert(mask, token, expert, tokens, number)

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


def masked_repeated_experts(experts: Any, gates: Any, mask: Mask, hidden_states: Tensor) -> Tensor:
    """As Llama4TextExperts: hidden_states and output [E·T, d], expert after expert."""
    number = experts.num_experts
    gate_up = torch.bmm(hidden_states.unflatten(0, (number, -1)), experts.gate_up_proj)
    tokens = gate_up.shape[1]
    expert = torch.arange(number, device=gate_up.device).repeat_interleave(tokens)
    token = torch.arange(tokens, device=gate_up.device).repeat(number)
    mask = _by_expert(mask, token, expert, tokens, number)
    hidden = masked_packed_of(gate_up.flatten(0, 1), gates.activation, mask)
    return torch.bmm(hidden.unflatten(0, (number, -1)), experts.down_proj).flatten(0, 1)


def masked_routing_experts(moe: Any, gates: Any, mask: Mask, hidden_states: Tensor) -> Tensor:
    """As JetMoeMoE: hidden_states and output [B, S, d]."""
    flat = hidden_states.flatten(0, -2)
    _, token, weights, counts, _ = moe.router(flat)
    expert = _experts_of(counts, token.device)
    mask = _by_expert(mask, token, expert, len(flat), len(counts))
    hidden = masked_packed_of(moe.input_linear(flat[token], counts), gates.activation, mask)
    output = moe.output_linear(hidden, counts) * weights[:, None]
    summed = torch.zeros(len(flat), output.shape[1], dtype=output.dtype, device=output.device)
    result: Tensor = summed.index_add(0, token, output).view(hidden_states.shape) + moe.bias
    return result


def run_split(
    experts: Any, mesh: DeviceMesh, run: Callable[..., Tensor], *given: Any, **options: Any
) -> Tensor:
    """What transformers does around experts whose neurons tensor parallelism splits, with ``run`` inside."""
    # Older versions of transformers do not have it.
    from transformers.distributed.tensor_parallel import MoeExpertsParallel

    style: Any = MoeExpertsParallel()
    given, options = style.transform_inputs_pre_forward(experts, given, options, mesh)
    with style.context_around_forward(experts, mesh):
        output = run(*given, **options)
    summed: Tensor = style.transform_output_post_forward(experts, output, mesh)
    return summed


def find_reached(
    seam: str, module: Any, real: Tensor, hidden_states: Tensor, *routing: Tensor, **options: Tensor
) -> Tensor:
    """Find the experts, int64 [n], that the tokens at ``real``, bool [T], go to, by a seam's inputs."""
    real = real.to(hidden_states.device)
    if seam == "repeated_experts":
        by_expert: Tensor = hidden_states.unflatten(0, (int(module.num_experts), -1))
        return by_expert[:, real].flatten(1).any(1).nonzero().flatten()
    if seam == "routing_experts":
        _, token, _, counts, _ = module.router(hidden_states.flatten(0, -2))
        return _experts_of(counts, token.device)[real[token]]
    chosen = (*routing, *options.values())[0]
    return chosen.view(len(real), -1)[real].flatten()


def _experts_of(counts: Any, device: torch.device) -> Tensor:
    """The expert of each token, int64, where the tokens of each expert follow each other."""
    counts = torch.as_tensor(counts, device=device)
    return torch.arange(len(counts), device=device).repeat_interleave(counts)


def _project(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
    """The rows of x up to ends[e], from ends[e − 1] on, through the weight and bias of expert e."""
    if x.dtype != torch.float64:
        return _grouped_linear(x, weight, offs=ends, bias=bias, is_transposed=is_transposed)
    weight = weight if is_transposed else weight.transpose(-2, -1)
    product: Tensor = torch.ops.transformers.grouped_mm_fallback(
        x, weight, offs=ends
    )  # torch's has no float64
    return product if bias is None else product + bias


def _by_expert(mask: Mask, token: Tensor, expert: Tensor, tokens: int, number: int) -> Mask:
    """A mask [G, E·F] as [G·E, F], with the row of each pair of token and expert."""
    values, row_ids, mesh = mask
    rows = len(values)
    if row_ids is not None:
        row = row_ids.reshape(-1).to(token.device)[token]
    else:
        row = token // max(tokens // rows, 1)
    by_expert = values.reshape(rows * number, -1)
    return Mask(by_expert, torch.where(row < 0, -1, row * number + expert), mesh)
