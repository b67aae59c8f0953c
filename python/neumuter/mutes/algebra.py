"""Mute sets from mute sets: the union of several, and one without the neurons of another."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from neumuter.models.families import find_ffns
from neumuter.mutes.fingerprint import fingerprint
from neumuter.mutes.matching import architecture, matching_ffns
from neumuter.mutes.mute_set import MutedLayer, MuteSet, MuteSource, loaded


def combine(model: nn.Module, sets: Iterable[MuteSource]) -> MuteSet:
    """The union of ``MuteSet``s, or of the mute files at these paths, as a new ``MuteSet`` of ``model``.

    A neuron that several of them mute gets the lowest of their gains. The mode is "modulate" if one of them
    has it. Its ``method`` lists theirs. Raises ValueError if there is none, and the errors of ``mute``.
    """
    found = [loaded(mutes) for mutes in sets]
    if not found:
        raise ValueError("sets must hold at least one mute set")
    gains: dict[str, dict[int, float]] = {}
    for mutes in found:
        matching_ffns(model, mutes)
        for path, layer in mutes.layers.items():
            known = gains.setdefault(path, {})
            for neuron, gain in zip(layer.indices.tolist(), layer.gains.tolist(), strict=True):
                known[neuron] = min(gain, known.get(neuron, gain))
    return _remade(model, found, gains, {"combined": [mutes.method for mutes in found]})


def without(model: nn.Module, mutes: MuteSource, others: MuteSource) -> MuteSet:
    """``mutes`` without the neurons that ``others`` mutes, as a new ``MuteSet`` of ``model``.

    Both are MuteSets or paths of mute files. Raises ValueError if nothing is left, and what ``mute`` raises.
    """
    mutes, others = loaded(mutes), loaded(others)
    for one in (mutes, others):
        matching_ffns(model, one)
    gains = {}
    for path, layer in mutes.layers.items():
        known = dict(zip(layer.indices.tolist(), layer.gains.tolist(), strict=True))
        removed = set(others.layers[path].indices.tolist()) if path in others.layers else set()
        gains[path] = {neuron: gain for neuron, gain in known.items() if neuron not in removed}
    return _remade(model, [mutes], gains, {"without": others.method, "of": mutes.method})


def _remade(
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
    )
