"""Mute sets from mute sets: the union of several, and the difference of two."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from neumuter.models.families import find_ffns
from neumuter.mutes.fingerprint import fingerprint
from neumuter.mutes.matching import architecture, matching_ffns
from neumuter.mutes.mute_set import MutedLayer, MuteSet, MuteSource, load_mutes
from neumuter.types import check_model


def combine(model: nn.Module, sets: Iterable[MuteSource]) -> MuteSet:
    """Make the union of mute sets, or of mute files, as a new ``MuteSet`` of ``model``.

    A neuron that several of them mute gets the lowest of their gains. The mode is "modulate" if one of them
    has it. ``method`` lists theirs.

    Raises:
        ValueError: there is no set; what ``neumuter.mute`` raises.
    """
    check_model(model)
    found = [load_mutes(mutes) for mutes in sets]
    if not found:
        raise ValueError("sets must hold at least one mute set")
    gains: dict[str, dict[int, float]] = {}
    for mutes in found:
        matching_ffns(model, mutes)
        for path, layer in mutes.layers.items():
            known = gains.setdefault(path, {})
            for neuron, gain in zip(layer.indices.tolist(), layer.gains.tolist(), strict=True):
                known[neuron] = min(gain, known.get(neuron, gain))
    return _remake(model, found, gains, {"combined": [mutes.method for mutes in found]})


def subtract(model: nn.Module, mutes: MuteSource, others: MuteSource) -> MuteSet:
    """Take the neurons that ``others`` mutes out of ``mutes``, as a new ``MuteSet`` of ``model``.

    Both are mute sets or paths of mute files.

    Raises:
        ValueError: nothing is left; what ``neumuter.mute`` raises.
    """
    mutes, others = load_mutes(mutes), load_mutes(others)
    for one in (mutes, others):
        matching_ffns(model, one)
    gains = {}
    for path, layer in mutes.layers.items():
        known = dict(zip(layer.indices.tolist(), layer.gains.tolist(), strict=True))
        removed = set(others.layers[path].indices.tolist()) if path in others.layers else set()
        gains[path] = {neuron: gain for neuron, gain in known.items() if neuron not in removed}
    return _remake(model, [mutes], gains, {"subtracted": others.method, "from": mutes.method})


def _remake(
    model: nn.Module,
    sets: Sequence[MuteSet],
    gains: Mapping[str, Mapping[int, float]],
    method: dict[str, Any],
) -> MuteSet:
    """A MuteSet of {path: {neuron: gain}} over all FFNs that ``sets`` masked."""
    ffns = [ffn for ffn in find_ffns(model) if any(ffn.path in mutes.widths for mutes in sets)]
    layers = {}
    for ffn in ffns:
        if known := gains.get(ffn.path):
            neurons = sorted(known)
            layers[ffn.path] = MutedLayer(
                torch.tensor(neurons, dtype=torch.int32), torch.tensor([known[n] for n in neurons])
            )
    low, high = zip(*(mutes.gain_range for mutes in sets), strict=True)
    return MuteSet(
        layers=layers,
        widths={ffn.path: ffn.width for ffn in ffns},
        architecture=architecture(model),
        fingerprint=fingerprint(ffns, layers),
        mode="modulate" if any(mutes.mode == "modulate" for mutes in sets) else "mute",
        gain_range=(min(low), max(high)),
        method=method,
        adapter={path: values for mutes in sets for path, values in mutes.adapter.items()},
    )
