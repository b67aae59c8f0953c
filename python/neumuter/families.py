"""Where the FFNs of a model are, found by structure: no code per model."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import activations
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Layout:
    """Names of the children that make a module an FFN. Without ``gate`` the FFN is a plain one."""

    up: str
    down: str
    activation: str
    gate: str | None = None
    dropout: str | None = None

    @property
    def required(self):
        return [name for name in (self.gate, self.up, self.down, self.activation, self.dropout) if name]


GATED = Layout(gate="gate_proj", up="up_proj", down="down_proj", activation="act_fn")
PLAIN = Layout(up="c_fc", down="c_proj", activation="act", dropout="dropout")
LAYOUTS = (GATED, PLAIN)

# By exact type: a subclass may compute something else.
ACTIVATION_NAMES = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.AccurateGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
    activations.ReLUSquaredActivation: "relu2",
}


def activation_name(module, path):
    """The kernels' name of an activation module: silu, gelu, gelu_tanh, relu or relu2.

    Raises ValueError, naming ``path`` and the class, if the kernels do not have it.
    """
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    try:
        return ACTIVATION_NAMES[type(module)]
    except KeyError:
        raise ValueError(
            f"{path} has the activation {type(module).__name__}; supported are "
            + ", ".join(sorted({c.__name__ for c in ACTIVATION_NAMES} | {"GELU"}))
        ) from None


@dataclass(frozen=True)
class FFN:
    """One FFN of a model. ``layer`` is its position among all FFNs of the model, from 0."""

    path: str
    layer: int
    module: nn.Module
    layout: Layout
    activation: str

    @property
    def down(self):
        """The down projection, a module."""
        return getattr(self.module, self.layout.down)

    @property
    def down_weight(self):
        """A view of the down projection's weight as [d, F], d the hidden and F the intermediate size.

        Raises ValueError if the weight is not a plain floating-point matrix in memory.
        """
        weight = self.down.weight
        if weight.dim() != 2 or not weight.is_floating_point() or weight.is_meta:
            raise ValueError(
                f"{self.path}.{self.layout.down} has a {weight.dtype} weight of shape {tuple(weight.shape)} "
                f"on {weight.device}, not a floating-point matrix in memory; load the model unquantised "
                "(or call model.dequantize()) and without offloading"
            )
        return weight.detach().T if isinstance(self.down, Conv1D) else weight.detach()

    @property
    def width(self):
        """The number of neurons F, read from the weight."""
        return self.down_weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.down.weight.device


def find_ffns(model):
    """All FFNs of ``model`` in model order, a list of ``FFN``.

    Raises ValueError if there is none, or if one has an activation that the kernels do not have.
    """
    found = []
    for path, module in model.named_modules():
        children = dict(module.named_children())
        for layout in LAYOUTS:
            if all(name in children for name in layout.required):
                name = activation_name(children[layout.activation], f"{path}.{layout.activation}")
                found.append(FFN(path, len(found), module, layout, name))
    if not found:
        layouts = " or ".join("{" + ", ".join(layout.required) + "}" for layout in LAYOUTS)
        raise ValueError(f"no FFN found in {type(model).__name__}: no module has the children {layouts}")
    return found
