"""Whether a mute set belongs to a model: its architecture, FFN paths, widths and weights."""

import math
from collections.abc import Mapping, Sequence

from torch import nn

from neumuter.models.devices import is_sharded
from neumuter.models.families import find_ffns, unwrapped
from neumuter.models.ffn import FFN
from neumuter.models.installed import refuse_wrapped
from neumuter.mutes.fingerprint import TOLERANCE, distance, find_projection, sketch_any, sketches
from neumuter.mutes.mute_set import SKETCHES, MuteSet


class MuteMismatchError(ValueError):
    """A mute set that was made for another model; the message lists what differs."""


def architecture(model: nn.Module) -> dict[str, str]:
    """Describe a model: {"class": its class name, "model_type": that of its config, "none" without one}."""
    model = unwrapped(model)
    # FSDP makes a class of its own.
    own = next(c for c in type(model).__mro__ if not c.__module__.startswith("torch.distributed"))
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return {"class": own.__name__, "model_type": model_type or "none"}


def matching_ffns(model: nn.Module, mutes: MuteSet) -> dict[str, FFN]:
    """Find the FFNs of ``model`` that ``mutes`` was made on, {path: FFN}.

    Raises:
        MuteMismatchError: the architecture, a module path, an intermediate size or the weights differ (see
            ``neumuter.mutes.fingerprint``).
        RuntimeError: the model is attached or muted.
    """
    refuse_wrapped(model)
    return fitting_ffns(model, mutes)


def alike_ffns(model: nn.Module, mutes: MuteSet) -> dict[str, FFN]:
    """Do as ``matching_ffns``, whatever the weights are: for a model that was trained further."""
    refuse_wrapped(model)
    ffns = {ffn.path: ffn for ffn in find_ffns(model)}
    refuse_other(structure_differs(model, ffns, mutes))
    return {path: ffns[path] for path in mutes.widths}


def fitting_ffns(model: nn.Module, mutes: MuteSet) -> dict[str, FFN]:
    """Do as ``matching_ffns`` for a model that may have gates, as long as none of them is in force."""
    ffns = {ffn.path: ffn for ffn in find_ffns(model)}
    refuse_other(structure_differs(model, ffns, mutes))
    # The clearer reason first: an adapter may have changed the weights, too.
    whole = {path: p for path, p in adapted_projections(model, mutes).items() if not is_sharded(p.down)}
    refuse_other(bare_base_differs(mutes, {path: sketch_any(p) for path, p in whole.items()}))
    refuse_other([text for path in mutes.widths for text in weights_differ(ffns[path], mutes)])
    return {path: ffns[path] for path in mutes.widths}


def structure_differs(model: nn.Module, ffns: Mapping[str, FFN], mutes: MuteSet) -> list[str]:
    """List what differs: the architecture of ``model``, and the paths and widths of ``ffns``."""
    differences = [
        f"{key}: mute set {mutes.architecture[key]}, model {value}"
        for key, value in architecture(model).items()
        if mutes.architecture[key] != value
    ]
    for path, width in mutes.widths.items():
        if path not in ffns:
            differences.append(f"{path}: mute set {width} neurons, model has no FFN there")
        elif ffns[path].width != width:
            differences.append(f"{path}: mute set {width} neurons, model {ffns[path].width}")
    return differences


def weights_differ(ffn: FFN, mutes: MuteSet) -> list[str]:
    """List how the weights of an FFN differ from those that ``mutes`` was made for."""
    return sketches_differ(ffn.path, sketches(ffn, mutes.layers.get(ffn.path)), mutes)


def sketches_differ(
    path: str, found: Mapping[str, list[float]], mutes: MuteSet, quantised: float | None = None
) -> list[str]:
    """List how ``found``, the sketches of the FFN at ``path``, differ from those in ``mutes``.

    Args:
        quantised: the distance that quantising may make, as a share of the weights' length. It moves all
            columns alike, so the muted ones are compared with the length of average ones if theirs is less.
    """
    differences, tolerance = [], TOLERANCE if quantised is None else quantised
    for number, (what, actual) in enumerate(found.items()):
        expected = mutes.fingerprint[path][number * SKETCHES : (number + 1) * SKETCHES]
        apart = distance(expected, actual)
        if quantised is not None and number:
            share = len(mutes.layers[path].indices) / mutes.widths[path]
            average = math.hypot(*mutes.fingerprint[path][:SKETCHES]) * math.sqrt(share)
            apart *= min(1.0, math.hypot(*expected) / average)
        if not apart <= tolerance:
            differences.append(
                f"{path}: {what} differ by {apart:.1%} (up to {tolerance:.0%} is rounding). Is this "
                "another checkpoint, or are the mutes folded in already?"
            )
    return differences


def adapted_projections(model: nn.Module, mutes: MuteSet) -> dict[str, FFN]:
    """Find the projections, {path: projection}, that the adapter changed which ``mutes`` was made with.

    Raises:
        MuteMismatchError: ``model`` has none there.
    """
    found = {path: find_projection(model, path) for path in mutes.adapter}
    refuse_other([f"{path}: model has no projection there" for path, one in found.items() if one is None])
    return {path: one for path, one in found.items() if one is not None}


def bare_base_differs(mutes: MuteSet, actual: Mapping[str, Sequence[float]]) -> list[str]:
    """Say so if projections, {path: sketch}, are nearer to the bare base than to that with its adapter."""
    alone = adapted = 0.0
    for path, values in actual.items():
        expected = mutes.adapter[path]
        alone += math.dist(expected[:SKETCHES], values) ** 2
        adapted += math.dist(expected[SKETCHES:], values) ** 2
    if adapted <= alone:
        return []
    return [
        "adapter: the mute set is for a base with an adapter on it, and this model is the base without that "
        "adapter. Give the adapter's folder as the model, or put the adapter on the model or merge it"
    ]


def refuse_adapter(mutes: MuteSet, model: object) -> None:
    """Raise ValueError if ``mutes`` was made with an adapter, of which quantised weights would not tell."""
    if mutes.adapter:
        raise ValueError(
            f"the mute set is for a base with an adapter on it, and nothing tells whether {model}, which is "
            "quantised, has the adapter merged: fold with the adapter's folder as MODEL, then quantise"
        )


def refuse_other(differences: list[str]) -> None:
    """Raise MuteMismatchError if there are any."""
    if differences:
        listed = "\n  ".join(differences[:8] + ["..."] * (len(differences) > 8))
        raise MuteMismatchError(f"this mute set was made for another model:\n  {listed}")
