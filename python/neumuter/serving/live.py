"""A mute set on a live model: neurons are multiplied by their gains while the model runs."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neumuter.models.ffn import FFN
from neumuter.models.hooks import Gates, forward_with_gates
from neumuter.models.installed import Installed
from neumuter.models.mask import Mask, masked_act_of
from neumuter.models.seams import choose_seams
from neumuter.mutes.matching import matching_ffns
from neumuter.mutes.mute_set import MutedLayer, MuteSet, MuteSource, load_mutes

# Up to this number of activations a product of PyTorch takes less time than calling a kernel.
FEW = 1 << 18


class ConstantGates(Gates):
    """Neurons multiplied by constants."""

    gains: Tensor

    def __init__(self, ffn: FFN, seam: str, layer: MutedLayer) -> None:
        super().__init__(ffn, seam)
        gains = torch.ones(self.width)
        gains[layer.indices.long()] = layer.gains
        self.register_buffer("gains", gains.to(ffn.device), persistent=False)
        self.on = True

    def install(self, module: nn.Module) -> None:
        super().install(module)
        if self.seam == "down" and self.mesh is None:
            module.forward = functools.partial(_muted, module, self)

    def mask(self, hidden_states: Tensor) -> Mask | None:
        return Mask(self.gains[None]) if self.on else None


def _muted(down: nn.Module, gates: ConstantGates, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
    """Run a muted down projection, with little Python: between layers the caches are cold."""
    if gates.probe is not None:
        return forward_with_gates(down, hidden, *arguments, **options)
    gates.count_call()
    if gates.on:
        gains = gates._buffers["gains"]
        assert gains is not None
        plain = not hidden.requires_grad and hidden.get_device() == gains.get_device()
        if plain and hidden.numel() <= FEW and not torch.compiler.is_compiling():
            hidden = scale_neurons(hidden, gains)
        else:
            hidden = masked_act_of(hidden, "identity", Mask(gains[None]))
    return gates.unmasked(down, hidden, *arguments, **options)


def scale_neurons(hidden: Tensor, gains: Tensor) -> Tensor:
    """Multiply few activations [..., F] by gains, float32, out of place; rounded once."""
    if hidden.dtype == torch.float32:
        return hidden * gains
    return torch.mul(hidden, gains, out=torch.empty_like(hidden))


class Muted:
    """A mute set on a live model, made by ``mute``. As a context manager it undoes itself at the end."""

    def __init__(self, model: nn.Module, mutes: MuteSet) -> None:
        self.model, self.mutes = model, mutes
        matching = matching_ffns(model, mutes)
        ffns = [matching[path] for path in mutes.layers]
        seams = choose_seams(model, ffns, constant=True)
        gates = [ConstantGates(ffn, seams[ffn.path], mutes.layers[ffn.path]) for ffn in ffns]
        self._installed = Installed(model, gates, ffns)

    def __repr__(self) -> str:
        return f"Muted({type(self.model).__name__}, {self.mutes!r})"

    @contextmanager
    def off(self) -> Iterator["Muted"]:
        """Context: the untouched model, bit for bit."""
        for gates in self._installed.gates:
            gates.on = False
        try:
            yield self
        finally:
            for gates in self._installed.gates:
                gates.on = True

    def undo(self) -> None:
        """Put the very original modules back. Harmless when called again."""
        self._installed.remove()

    def __enter__(self) -> "Muted":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def mute(model: nn.Module, mutes: MuteSource) -> Muted:
    """Apply a mute set, or a mute file, to a live model.

    Only FFNs with muted neurons are touched, in this model instance only, at the input of their down
    projection. The weights and the state_dict stay the same, so ``save_pretrained`` saves the model without
    mutes: use ``fold`` for that.

    Returns:
        A ``Muted`` handle; its ``undo()`` takes the mutes off.

    Raises:
        MuteMismatchError: the set was made for another model.
        MuteFileError: a bad file.
        RuntimeError: the model is attached or muted already.
    """
    return Muted(model, load_mutes(mutes))
