"""Mute sets on models: applied to a live model, or folded into its weights."""

import torch
from transformers.pytorch_utils import Conv1D

from neumuter.families import find_ffns
from neumuter.ffn import FFNSwap, FFNWrapper, refuse_wrapped
from neumuter.fingerprint import SKETCHES, TOLERANCE, distance, sketches
from neumuter.mutes import MuteSet

FOLDABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class MuteMismatchError(ValueError):
    """A mute set that was made for another model; the message lists what differs."""


def architecture(model):
    """{"class": the model's class name, "model_type": that of its config, "none" without one}."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return {"class": type(model).__name__, "model_type": model_type or "none"}


def matching_ffns(model, mutes):
    """The FFNs of ``model`` that ``mutes`` was made on, {path: FFN}.

    Raises MuteMismatchError if the architecture, a module path, an intermediate size or the weights differ
    (see ``neumuter.fingerprint``), and RuntimeError if the model is attached or muted.
    """
    refuse_wrapped(model)
    ffns = {ffn.path: ffn for ffn in find_ffns(model)}
    differences = []
    for key, value in architecture(model).items():
        if mutes.architecture[key] != value:
            differences.append(f"{key}: mute set {mutes.architecture[key]}, model {value}")
    for path, width in mutes.widths.items():
        if path not in ffns:
            differences.append(f"{path}: mute set {width} neurons, model has no FFN there")
        elif ffns[path].width != width:
            differences.append(f"{path}: mute set {width} neurons, model {ffns[path].width}")
    if not differences:
        for path, expected in mutes.fingerprint.items():
            parts = sketches(ffns[path].down_weight, mutes.layers.get(path))
            for number, (what, actual) in enumerate(parts.items()):
                apart = distance(expected[number * SKETCHES : (number + 1) * SKETCHES], actual)
                if not apart <= TOLERANCE:
                    differences.append(
                        f"{path}: {what} differ by {apart:.1%} (up to {TOLERANCE:.0%} is rounding); another "
                        "checkpoint, or mutes folded already?"
                    )
    if differences:
        listed = "\n  ".join(differences[:8] + ["..."] * (len(differences) > 8))
        raise MuteMismatchError(f"this mute set was made for another model:\n  {listed}")
    return {path: ffns[path] for path in mutes.widths}


class MutedFFN(FFNWrapper):
    """An FFN whose neurons are multiplied by constants."""

    def __init__(self, ffn, layer):
        super().__init__(ffn)
        gains = torch.ones(1, self.width)
        gains[0, layer.indices.long()] = layer.gains
        self.register_buffer("gains", gains.to(ffn.device), persistent=False)

    def mask(self, hidden_states):
        return self.gains


class Muted:
    """A mute set on a live model, made by ``mute``. As a context manager it undoes itself at the end."""

    def __init__(self, model, mutes):
        self.model, self.mutes = model, mutes
        ffns = matching_ffns(model, mutes)
        self._swap = FFNSwap(model, [MutedFFN(ffns[path], layer) for path, layer in mutes.layers.items()])

    def undo(self):
        """Put the very original modules back. Harmless when called again."""
        self._swap.restore()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.undo()


def _loaded(mutes):
    return mutes if isinstance(mutes, MuteSet) else MuteSet.load(mutes)


def mute(model, mutes):
    """Apply a ``MuteSet``, or the mute file at that path, to a live model; returns a ``Muted`` handle.

    Only FFNs with muted neurons are touched, in this model instance only. The weights and the state_dict
    stay the same, so ``save_pretrained`` saves the model without mutes: use ``fold`` for that.

    Raises MuteMismatchError if it was made for another model, MuteFileError for a bad file, and
    RuntimeError if the model is attached or muted already.
    """
    return Muted(model, _loaded(mutes))


@torch.no_grad()
def fold(model, mutes):
    """Multiply the gains of a ``MuteSet``, or of the mute file at that path, into the weights, in place.

    Neuron f's column of the down projection is multiplied by its gain, in float32, and rounded to the
    weight's dtype. The result is an ordinary model; gains of 0 cannot be taken back. Nothing is changed on
    an error: those of ``mute``, and ValueError for weights that are quantised or hidden in an adapter.
    """
    mutes = _loaded(mutes)
    ffns = matching_ffns(model, mutes)
    for path in mutes.layers:
        down = ffns[path].down
        if not isinstance(down, torch.nn.Linear | Conv1D) or down.weight.dtype not in FOLDABLE:
            raise ValueError(
                f"cannot fold into {path}.{ffns[path].layout.down}, a {type(down).__name__} with a "
                f"{down.weight.dtype} weight; merge adapters and dequantise first, or use neumuter.mute on "
                "the live model"
            )
    for path, layer in mutes.layers.items():
        weight = ffns[path].down_weight  # a view, [d, F]
        columns = layer.indices.long().to(weight.device)
        gains = layer.gains.to(weight.device)
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight[:, columns] = (weight[:, columns].to(wide) * gains).to(weight.dtype)
