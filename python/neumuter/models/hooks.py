"""How a mask gets into a model's own FFNs.

A mask reaches a model's FFN at one of these places, called seams, whose forward is replaced on that instance:

- "activation": of a plain FFN; the activation module, since the mask may follow φ at once.
- "ffn": of a gated FFN; the whole module, since the kernel computes φ(gate)·up·mask.
- "experts", "repeated_experts", "routing_experts": the experts of a mixture; see ``neumuter.models.experts``.
- "down": the down projection's input, behind whatever an FFN computes that the kernels do not know.

The projections are called as the modules that they are: quantised, adapted, sharded or offloaded ones, too.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from neumuter.models.experts import (
    masked_experts,
    masked_repeated_experts,
    masked_routing_experts,
    run_split,
)
from neumuter.models.ffn import FFN, Layout
from neumuter.models.mask import Mask, masked_act_of, masked_glu_of, masked_packed_of

# The name of the Gates among a seam's children.
CHILD = "neumuter"


# --- The seams: functions of the module that they replace the forward of --------------------


def masked_activation(activation: nn.Module, gates: "FFN | Gates", mask: Mask, hidden: Tensor) -> Tensor:
    assert gates.activation is not None
    return masked_act_of(hidden, gates.activation, mask)


def masked_ffn(ffn: nn.Module, gates: "FFN | Gates", mask: Mask, hidden_states: Tensor) -> Tensor:
    layout = gates.layout
    assert isinstance(layout, Layout)
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


SEAMS: dict[str, Callable[..., Tensor]] = {
    "activation": masked_activation,
    "ffn": masked_ffn,
    "experts": masked_experts,
    "repeated_experts": masked_repeated_experts,
    "routing_experts": masked_routing_experts,
    "down": masked_down,
}


def seam_module(ffn: FFN, seam: str) -> nn.Module:
    """The module whose forward that seam of an ``FFN`` replaces."""
    if seam == "activation":
        assert isinstance(ffn.layout, Layout)
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
        self.former: Callable[..., Any] | None = None
        self.ours: Callable[..., Any] | None = None
        # For Installed: the token that is NaN, the number of eager calls, whether compiled code or any calls.
        self.probe: int | None = None
        # The last dimension of what the seam was given while probing.
        self.probed = self.width
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
        self.probed = hidden_states.shape[-1]
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
        module.forward = self.ours = self.make_forward(module)

    def make_forward(self, module: nn.Module) -> Callable[..., Any]:
        """What takes the place of the forward of ``module``."""
        return functools.partial(forward_with_gates, module)

    def find_cover(self, module: nn.Module) -> str | None:
        """Find what hides our forward of ``module``, so that it cannot be taken off; None if nothing does."""
        current, hook = vars(module).get("forward"), getattr(module, "_hf_hook", None)
        if hook is not None and current is not self.ours:
            return f"Accelerate's {type(hook).__name__}"
        # Where a hook of Accelerate was there before us, its removal put the module's own forward back.
        if current is None or current is self.ours or getattr(current, "__self__", None) is module:
            return None
        return "another forward"

    def remove(self, module: nn.Module) -> None:
        if vars(module).get("forward") is self.ours:
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
    run = functools.partial(SEAMS[seam], module, gates, mask)
    if seam == "experts" and gates.mesh is not None:
        return run_split(module, gates.mesh, run, *arguments, **options)
    # At a down projection, Gates.unmasked runs the hook.
    hook = getattr(module, "_hf_hook", None) if seam != "down" else None
    if hook is None:
        return run(*arguments, **options)
    # The hook places inputs and loads weights.
    arguments, options = hook.pre_forward(module, *arguments, **options)
    return hook.post_forward(module, run(*arguments, **options))


def forward_with_gates(module: nn.Module, *arguments: Any, **options: Any) -> Any:
    """Run the forward of a module that has Gates."""
    gates = cast(Gates, module._modules[CHILD])
    gates.count_call()
    hidden_states = (*arguments, *options.values())[0]
    if gates.seam == "repeated_experts":
        hidden_states = hidden_states[: len(hidden_states) // cast(int, module.num_experts)]
    mask = gates.mask(hidden_states) if gates.probe is None else gates.probing(hidden_states)
    if mask is None:
        return gates.unmasked(module, *arguments, **options)
    return run_seam(gates.seam, module, gates, mask, *arguments, **options)
