"""A mute set on a live model, until it is undone."""

import functools
from collections.abc import Callable, Iterator
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
from neumuter.serving.folded import Folded

# Up to this number of activations a product of PyTorch takes less time than calling a kernel.
FEW = 1 << 18


class ConstantGates(Gates):
    """Neurons multiplied by constants."""

    gains: Tensor

    def __init__(self, ffn: FFN, seam: str, layer: MutedLayer) -> None:
        super().__init__(ffn, seam)
        # A tensor of inference mode could not be trained through later.
        with torch.inference_mode(False):
            gains = torch.ones(self.width)
            gains[layer.indices.long()] = layer.gains
            self.register_buffer("gains", gains.to(ffn.device), persistent=False)
        self.on = True

    def make_forward(self, module: nn.Module) -> Callable[..., Any]:
        if self.seam == "down" and self.mesh is None:
            return functools.partial(_muted, module, self)
        return super().make_forward(module)

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


class Live:
    """Gates on the FFNs with muted neurons, until ``remove``."""

    def __init__(self, model: nn.Module, mutes: MuteSet) -> None:
        matching = matching_ffns(model, mutes)
        ffns = [matching[path] for path in mutes.layers]
        seams = choose_seams(model, ffns, constant=True)
        self.gates = [ConstantGates(ffn, seams[ffn.path], mutes.layers[ffn.path]) for ffn in ffns]
        self._installed = Installed(model, self.gates, ffns)

    def turn(self, on: bool) -> None:
        for gates in self.gates:
            gates.on = on

    def remove(self) -> None:
        self._installed.remove()


WAYS: dict[str, type[Live | Folded]] = {"live": Live, "fold": Folded}


class Muted:
    """A mute set in force on a model, made by ``mute``. As a context manager it undoes itself at the end."""

    def __init__(self, model: nn.Module, mutes: MuteSet, how: str = "live") -> None:
        self.model, self.mutes = model, mutes
        self._way, self._on = WAYS[how](model, mutes), True

    def __repr__(self) -> str:
        return f"Muted({type(self.model).__name__}, {self.mutes!r})"

    @contextmanager
    def off(self) -> Iterator["Muted"]:
        """Context: the untouched model, bit for bit.

        Raises:
            RuntimeError: as ``undo``.
        """
        self._way.turn(False)
        was, self._on = self._on, False
        try:
            yield self
        finally:
            self._on = was
            self._way.turn(was)

    def undo(self) -> None:
        """Put the very original modules, or columns of weights, back. Harmless when called again.

        Raises:
            RuntimeError: something was put around a muted FFN since, such as Accelerate's hooks; or the mutes
                were folded in, and their columns were changed since then by training or by merging an
                adapter, or their weights were replaced. The model stays as it is.
        """
        self._way.remove()

    def __enter__(self) -> "Muted":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def mute(model: nn.Module, mutes: MuteSource, how: str = "live") -> Muted:
    """Apply a mute set, or a mute file, to a live model, until it is undone.

    Only FFNs with muted neurons are touched, in this model instance only. A model that runs proves that the
    mutes reach its output.

    - "live" multiplies the input of their down projections, whatever computes these. The weights and the
      state_dict stay the same, so ``save_pretrained`` saves the model without mutes.
    - "fold" multiplies the muted columns of their down projections in place, as ``fold`` does, and keeps the
      original columns. It costs no time per token, and captured graphs and compiled models see it. Whatever
      reads the weights sees it as well: ``state_dict``, ``save_pretrained``, copies and pickles. An adapter
      that is put around a down projection later reads neurons that are not muted. Nothing may run the model
      in the moment when the mutes come or go. Nothing notices weights that are loaded over them.

    Args:
        model: the model that the set was made for, neither attached nor muted.
        mutes: a ``MuteSet``, or the path of a mute file.
        how: "live" or "fold".

    Returns:
        A ``Muted`` handle; its ``undo()`` takes the mutes off, bit for bit.

    Raises:
        MuteMismatchError: the set was made for another model.
        MuteFileError: a bad file.
        RuntimeError: the model is attached or muted already.
        ValueError: ``how`` is something else; the mutes do not reach the output of the model; or with
            "fold", what ``neumuter.fold`` raises.
    """
    if how not in tuple(WAYS):
        raise ValueError(f"how must be 'live' or 'fold', got {how!r:.80}")
    return Muted(model, load_mutes(mutes), how)
