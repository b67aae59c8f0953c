"""How a mask gets into a model's own FFNs.

A mask reaches a model's FFN at one of four places, called seams, whose forward is replaced on that instance:

- "activation": of a plain FFN; the activation module, since the mask may follow φ at once.
- "ffn": of a gated FFN; the whole module, since the kernel computes φ(gate)·up·mask.
- "experts": the experts module of a mixture; its tokens are grouped by expert and reach the same kernels.
- "down": the down projection's input, behind whatever an FFN computes that the kernels do not know.

The projections are called as the modules that they are: quantised, adapted, sharded or offloaded ones, too.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.integrations.moe import _grouped_linear

from neumuter.models.ffn import FFN
from neumuter_kernels import masked_act, masked_glu

# The name of the Gates among a seam's children.
CHILD = "neumuter"


class Mask(NamedTuple):
    """values: float32 [G, width]. row_ids: integers, one row per token, −1 = unmasked; None: G equal runs.

    mesh: the device mesh over which tensor parallelism splits the neurons, or None.
    """

    values: torch.Tensor
    row_ids: torch.Tensor | None = None
    mesh: DeviceMesh | None = None

    def fitting(self, activations: Tensor, width: int) -> Tensor:
        """The values as the kernels need them for ``activations`` of ``width`` neurons of this process."""
        values = self.values
        if self.mesh is not None and values.shape[1] != width:
            # The gradients reach all processes.
            whole = DTensor.from_local(values, self.mesh, [Replicate()])
            values = whole.redistribute(placements=[Shard(1)]).to_local()
        wide = torch.float64 if activations.dtype == torch.float64 else torch.float32
        return values.to(activations.device, wide)


def masked_act_of(hidden: Tensor, activation: str, mask: Mask) -> Tensor:
    """φ(hidden)·mask, [..., F], for a ``Mask``; see ``neumuter_kernels.masked_act``."""
    values = mask.fitting(hidden, hidden.shape[-1])
    return masked_act(hidden, values, mask.row_ids, activation)


def masked_glu_of(gate: Tensor, up: Tensor, activation: str, mask: Mask) -> Tensor:
    """φ(gate)·up·mask, [..., F], for a ``Mask``; see ``neumuter_kernels.masked_glu``."""
    values = mask.fitting(gate, gate.shape[-1])
    return masked_glu(gate, up, values, mask.row_ids, activation)


def masked_packed_of(gate_up: Tensor, activation: str, mask: Mask) -> Tensor:
    """As ``masked_glu_of`` for gate and up in the halves of one tensor, [..., 2F]."""
    values = mask.fitting(gate_up, gate_up.shape[-1] // 2)
    return masked_glu(mask=values, row_ids=mask.row_ids, activation=activation, gate_up=gate_up)


# --- The seams: functions of the module that they replace the forward of --------------------


def masked_activation(activation: nn.Module, gates: "FFN | Gates", mask: Mask, hidden: Tensor) -> Tensor:
    assert gates.activation is not None
    return masked_act_of(hidden, gates.activation, mask)


def masked_ffn(ffn: nn.Module, gates: "FFN | Gates", mask: Mask, hidden_states: Tensor) -> Tensor:
    layout = gates.layout
    assert layout is not None
    assert gates.activation is not None
    if layout.gate_up:
        gate_up = getattr(ffn, layout.gate_up)(hidden_states)
        hidden = masked_packed_of(gate_up, gates.activation, mask)
    else:
        assert layout.gate is not None
        assert layout.up is not None
        gate, up = getattr(ffn, layout.gate)(hidden_states), getattr(ffn, layout.up)(hidden_states)
        hidden = masked_glu_of(gate, up, gates.activation, mask)
    output: Tensor = getattr(ffn, layout.down)(hidden)
    return output


def masked_down(down: nn.Module, gates: "Gates", mask: Mask, hidden: Tensor) -> Tensor:
    output: Tensor = gates.unmasked(down, masked_act_of(hidden, "identity", mask))
    return output


def masked_experts(
    experts: Any,
    gates: "FFN | Gates",
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


SEAMS: dict[str, Callable[..., Tensor]] = {
    "activation": masked_activation,
    "ffn": masked_ffn,
    "experts": masked_experts,
    "down": masked_down,
}


def seam_module(ffn: FFN, seam: str) -> nn.Module:
    """The module whose forward that seam of an ``FFN`` replaces."""
    if seam == "activation":
        assert ffn.layout is not None
        assert ffn.layout.activation is not None
        activation: nn.Module = getattr(ffn.module, ffn.layout.activation)
        return activation
    return ffn.down if seam == "down" else ffn.module


# --- On a model -----------------------------------------------------------------------------


class Gates(nn.Module):
    """What masks an FFN: a child of its seam, whose forward it replaces from ``install`` to ``remove``.

    Without a mask the seam runs what it ran before: the same bits as the untouched model. Subclasses say
    which mask applies, and keep tensors of their own in float32 whatever dtype the model is moved to.
    """

    def __init__(self, ffn: FFN, seam: str) -> None:
        super().__init__()
        self.path, self.layer, self.width = ffn.path, ffn.layer, ffn.width
        self.layout, self.activation, self.mesh, self.seam = ffn.layout, ffn.activation, ffn.mesh, seam
        self.former = None
        # For Installed: the token that is NaN, the number of eager calls, whether compiled code or any calls.
        self.probe: int | None = None
        self.calls, self.compiled, self.called = 0, False, False

    def count_call(self) -> None:
        self.called = True
        if torch.compiler.is_compiling():
            self.compiled = True
        else:
            self.calls += 1

    def probing(self, hidden_states: Tensor) -> Mask:
        """A mask of ones, but for NaN at the token ``probe``."""
        assert self.probe is not None
        values = torch.ones(2, self.width, device=hidden_states.device)
        values[1] = torch.nan
        tokens = torch.arange(hidden_states.shape[:-1].numel(), device=hidden_states.device)
        return Mask(values, torch.eq(tokens, self.probe).int())

    def mask(self, hidden_states: Tensor) -> Mask | None:
        """The ``Mask`` of this forward, or None. hidden_states: [B, S, d] or [T, d]."""
        raise NotImplementedError

    def install(self, module: nn.Module) -> None:
        # Somebody else, such as Accelerate, may have replaced it already.
        self.former = vars(module).get("forward")
        module.add_module(CHILD, self)
        # A partial copies and pickles with the module.
        module.forward = functools.partial(forward_with_gates, module)

    def remove(self, module: nn.Module) -> None:
        if self.former is None:
            del module.forward
        else:
            module.forward = self.former
        delattr(module, CHILD)

    def unmasked(self, module: nn.Module, *arguments: Any, **options: Any) -> Any:
        """What the seam computes without us."""
        if self.former is None:
            return type(module).forward(module, *arguments, **options)
        return self.former(*arguments, **options)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Gates":
        tensors = (self._parameters | self._buffers).items()
        kept = {name: tensor.detach() for name, tensor in tensors if tensor is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        for name, tensor in kept.items():
            moved = getattr(self, name)
            # model.half() and the like move it, but must not round it.
            if moved.dtype != tensor.dtype:
                moved.data = tensor.to(moved.device)
                if moved.grad is not None:
                    moved.grad = moved.grad.to(tensor.dtype)
        return self


def run_seam(
    seam: str, module: nn.Module, gates: "FFN | Gates", mask: Mask, *arguments: Any, **options: Any
) -> Any:
    """What that seam of ``module`` computes under a mask; with what Accelerate does before and after it."""
    mask = mask if gates.mesh is None else mask._replace(mesh=gates.mesh)
    # At a down projection, Gates.unmasked runs the hook.
    hook = getattr(module, "_hf_hook", None) if seam != "down" else None
    if hook is None:
        return SEAMS[seam](module, gates, mask, *arguments, **options)
    # The hook places inputs and loads weights.
    arguments, options = hook.pre_forward(module, *arguments, **options)
    return hook.post_forward(module, SEAMS[seam](module, gates, mask, *arguments, **options))


def forward_with_gates(module: nn.Module, *arguments: Any, **options: Any) -> Any:
    """Run the forward of a module that has Gates."""
    gates = cast(Gates, module._modules[CHILD])
    gates.count_call()
    hidden_states = (*arguments, *options.values())[0]
    mask = gates.mask(hidden_states) if gates.probe is None else gates.probing(hidden_states)
    if mask is None:
        return gates.unmasked(module, *arguments, **options)
    return run_seam(gates.seam, module, gates, mask, *arguments, **options)
