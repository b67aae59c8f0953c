"""Masked MLPs as layers of Hugging Face's ``kernels`` package, in a local layer repository.

``kernels.kernelize(model)`` gives a module the forward of a layer from a repository if the module's class
carries a layer name and that name is mapped to a repository. This module
has the layers, a function that writes the repository, the mapping, and a context in which the classes of one
model carry the names. It needs the package ``kernels``; see docs/hub-kernels.md.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from neumuter.files import PathLike, new_folder
from neumuter.models.families import find_ffns
from neumuter.models.ffn import FFN, Layout, activation_name
from neumuter.models.installed import refuse_wrapped
from neumuter.models.mask import Mask, masked_act_of, masked_glu_of
from neumuter.models.seams import choose_seams

BACKENDS = ("cpu", "cuda", "rocm")


def _find_mask(mlp: nn.Module, hidden: Tensor) -> Mask:
    values = getattr(mlp, "neuron_mask", None)
    if values is None:
        values = torch.ones(hidden.shape[-1], device=hidden.device)
    return Mask(values if values.dim() == 2 else values[None])


class MaskedGatedMLP(nn.Module):
    """The forward of a gated MLP whose children are named as those of transformers' ``LlamaMLP``.

    If the module has a buffer ``neuron_mask``, float [F] or [G, F], its neurons are multiplied by it; G rows
    are as in ``neumuter.MaskedGatedMLP``. Without one they are multiplied by ones: the original forward.
    """

    has_backward = True
    can_torch_compile = True
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map [..., d] to [..., d], in the same dtype."""
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        activation = cast(str, activation_name(self.act_fn))
        output: Tensor = self.down_proj(masked_glu_of(gate, up, activation, _find_mask(self, gate)))
        return output


class MaskedMLP(nn.Module):
    """The forward of a plain MLP, such as transformers' ``GPTNeoMLP`` and ``GPT2MLP``.

    The mask is that of :class:`MaskedGatedMLP`.
    """

    has_backward = True
    can_torch_compile = True
    c_fc: nn.Module
    c_proj: nn.Module
    act: nn.Module
    dropout: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map [..., d] to [..., d], in the same dtype."""
        hidden = self.c_fc(hidden_states)
        hidden = masked_act_of(hidden, cast(str, activation_name(self.act)), _find_mask(self, hidden))
        output: Tensor = self.dropout(self.c_proj(hidden))
        return output


# What a layer needs of an MLP: its layout, its seam (see ``neumuter.models.hooks``), and its other children.
_LAYERS = {
    MaskedGatedMLP.__name__: (
        Layout("down_proj", up="up_proj", gate="gate_proj", activation="act_fn"), "ffn", set(),
    ),
    MaskedMLP.__name__: (Layout("c_proj", up="c_fc", activation="act"), "activation", {"dropout"}),
}  # fmt: skip


def write_layer_repository(folder: PathLike) -> None:
    """Write a layer repository of ``kernels`` with the layers above, whole or not at all.

    It has a build variant for each of ``BACKENDS``. These refer to the installed ``neumuter``, so the folder
    is good for this environment only, not for the Hub.

    Args:
        folder: a folder that does not exist or is empty.

    Raises:
        FileExistsError: something is in ``folder``.
        OSError: ``folder`` cannot be written.
    """
    with new_folder(folder) as repository:
        for backend in BACKENDS:
            variant = repository / "build" / f"torch-{backend}"
            variant.mkdir(parents=True)
            metadata = {
                "name": "neumuter-layers",
                "id": f"neumuter_layers_{backend}",
                "version": 1,
                "license": "Apache-2.0",
                "python-depends": [],
                "backend": {"type": backend},
            }
            (variant / "metadata.json").write_text(json.dumps(metadata, indent=2))
            (variant / "__init__.py").write_text("from neumuter.integrations import hub_kernels as layers\n")


def kernel_mapping(folder: PathLike) -> dict[str, dict[str, Any]]:
    """Build what ``kernels.use_kernel_mapping`` takes: {layer name: {device type: the repository}}."""
    from kernels import LocalLayerRepository

    return {
        name: {backend: LocalLayerRepository(Path(folder), layer_name=name) for backend in BACKENDS}
        for name in _LAYERS
    }


@contextmanager
def annotate(model: nn.Module) -> Iterator[nn.Module]:
    """Context in which ``kernels.kernelize(model, ...)`` finds the MLPs of ``model`` that have a layer here.

    ``kernels`` looks for layer names on classes, which other models share. So the names are there in this
    context only, with a condition that is true for this model's modules alone, and the classes are as before
    at the end. What ``kernelize`` did to the model stays. Which MLPs fit is found by running the model once
    on two tokens, as ``neumuter.attach`` does.

    Raises:
        ValueError: no MLP fits.
        RuntimeError: the model is attached or muted; a new forward would bypass its masks. Kernelise first.
    """
    from kernels import replace_kernel_forward_from_hub

    refuse_wrapped(model)
    ffns = find_ffns(model)
    seams = choose_seams(model, ffns)
    chosen = {ffn.module: name for ffn in ffns if (name := _find_layer(ffn, seams[ffn.path]))}
    if not chosen:
        kinds = sorted({type(ffn.module).__name__ for ffn in ffns})
        raise ValueError(f"{type(model).__name__} has no MLP that a layer fits: {', '.join(kinds)}")
    classes = {type(module): name for module, name in chosen.items()}
    names = ("kernel_layer_name", "kernel_condition")
    former = {cls: {name: vars(cls)[name] for name in names if name in vars(cls)} for cls in classes}
    try:
        for cls, name in classes.items():
            replace_kernel_forward_from_hub(cls, name, condition=lambda module: module in chosen)
        yield model
    finally:
        for cls, attributes in former.items():
            for name in names:
                if name in attributes:
                    setattr(cls, name, attributes[name])
                elif name in vars(cls):
                    delattr(cls, name)


def _find_layer(ffn: FFN, seam: str) -> str | None:
    if not isinstance(ffn.layout, Layout):
        return None
    others = {name for name, _ in ffn.module.named_children()} - set(ffn.layout.names)
    return next((name for name, wanted in _LAYERS.items() if wanted == (ffn.layout, seam, others)), None)
