"""Silenced neurons removed from the weights: a smaller model that computes the same."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from neumuter.models.families import find_ffns, unwrapped
from neumuter.models.ffn import FFN, Layout
from neumuter.models.sharing import Sharing
from neumuter.mutes.matching import matching_ffns
from neumuter.mutes.mute_set import MuteSource, load_mutes
from neumuter.serving.fold import FOLDABLE, fold


@dataclass(frozen=True)
class Shrunk:
    """What ``shrink`` did.

    Attributes:
        widths: {FFN path: (neurons before, neurons after)}.
        bytes_before: size of all parameters before.
        bytes_after: size of all parameters after.
    """

    widths: dict[str, tuple[int, int]]
    bytes_before: int
    bytes_after: int


@torch.no_grad()
def shrink(model: nn.Module, mutes: MuteSource, multiple: int = 64) -> Shrunk:
    """Remove the neurons with gain 0 and fold the others, in place.

    The configs of transformers have one width for all FFNs. So that ``save_pretrained`` works, all FFNs get
    the same width: that of the FFN that keeps most neurons, rounded up to ``multiple``; silenced neurons fill
    up the others. In a model without a config, each FFN has a width of its own, rounded likewise. The logits
    are those of the muted model, up to rounding. Nothing is changed on an error.

    Args:
        model: a model with dense FFNs and plain weights.
        mutes: a ``MuteSet`` that was made for it, or the path of a mute file.
        multiple: widths are rounded up to a multiple of this.

    Raises:
        ValueError: ``multiple`` is not a positive integer; the model has experts, FFNs with quantised or
            shared weights, or a config without an attribute for the width; nothing can be removed, which is
            always so with one width for all and an FFN that the mute set leaves out; or what
            ``neumuter.fold`` raises.
    """
    if type(multiple) is not int or multiple < 1:
        raise ValueError(f"multiple must be an integer of at least 1, got {multiple!r}")
    mutes = load_mutes(mutes)
    matching_ffns(model, mutes)
    ffns = find_ffns(model)
    sharing = Sharing(model)
    for ffn in ffns:
        _check_plain(ffn)
        for name, _ in ffn.module.named_parameters(remove_duplicate=False):
            if others := sharing.others(ffn.module, name):
                raise ValueError(f"cannot shrink {ffn.path}: its {name} shares its weights with {others[0]}")
    silent = {path: layer.indices[layer.gains == 0].tolist() for path, layer in mutes.layers.items()}
    before = {ffn.path: ffn.width for ffn in ffns}
    kept = {path: width - len(silent.get(path, [])) for path, width in before.items()}
    config: Any = getattr(unwrapped(model), "config", None)
    shared = isinstance(config, PreTrainedConfig)
    needed = dict.fromkeys(kept, max(kept.values())) if shared else kept
    after = {path: max(1, -(-count // multiple)) * multiple for path, count in needed.items()}
    after = {path: min(width, before[path]) for path, width in after.items()}
    if after == before:
        path = (max if shared else min)(kept, key=kept.__getitem__)
        raise ValueError(
            f"nothing can be removed: {path} keeps {kept[path]} of its {before[path]} neurons, and widths "
            f"are multiples of {multiple}{', the same for all FFNs' if shared else ''}"
        )
    if shared:
        attribute, reference = _find_width_attribute(
            cast(PreTrainedModel, unwrapped(model)), ffns, after[ffns[0].path]
        )
    bytes_before = _count_bytes(model)
    fold(model, mutes)
    for ffn in ffns:
        removed = silent.get(ffn.path, [])[: before[ffn.path] - after[ffn.path]]
        keep = torch.ones(ffn.width, dtype=torch.bool)
        keep[removed] = False
        _keep_neurons(ffn, keep.nonzero()[:, 0])
    if shared:
        setattr(config.get_text_config(), attribute, after[ffns[0].path])
        for ffn, resized in zip(ffns, reference, strict=True):
            sizes = {name: value for name, value in vars(resized.module).items() if type(value) is int}
            vars(ffn.module).update(sizes)
    return Shrunk({path: (before[path], after[path]) for path in before}, bytes_before, _count_bytes(model))


def _projections(ffn: FFN) -> list[nn.Module]:
    assert isinstance(ffn.layout, Layout)
    names = (ffn.layout.gate, ffn.layout.up, ffn.layout.gate_up, ffn.layout.down)
    return [getattr(ffn.module, name) for name in names if name]


def _check_plain(ffn: FFN) -> None:
    if not ffn.is_dense:
        raise ValueError(f"{ffn.path} has experts; only dense FFNs can be shrunk")
    for module in (projections := _projections(ffn)):
        weight: Any = getattr(module, "weight", None)
        plain = type(module) in (nn.Linear, Conv1D) and type(weight) is nn.Parameter and not weight.is_meta
        if not plain or weight.dtype not in FOLDABLE:
            raise ValueError(
                f"cannot shrink {ffn.path}: a {type(module).__name__} in it is quantised, adapted, sharded "
                "or offloaded; dequantise the model or merge its adapters first, gather it on one device"
            )
    known = {id(p) for module in projections for p in module.parameters()}
    for name, parameter in ffn.module.named_parameters():
        if id(parameter) not in known and ffn.width in parameter.shape:
            raise ValueError(f"cannot shrink {ffn.path}: its {name} depends on all of the neurons")


def _find_width_attribute(model: PreTrainedModel, ffns: Sequence[FFN], width: int) -> tuple[str, list[FFN]]:
    """Find the config's attribute that makes all FFNs ``width`` wide and changes nothing else, by trying.

    Returns:
        Its name, and the FFNs of such a model, without weights.

    Raises:
        ValueError: there is none.
    """
    old = ffns[0].width
    for name, value in model.config.get_text_config().to_dict().items():
        unset = value is None and any(word in name for word in ("intermediate", "inner", "ffn"))
        if value != old and not unset:
            continue
        config = copy.deepcopy(model.config)
        try:
            setattr(config.get_text_config(), name, width)
            with torch.device("meta"):
                other = type(model)(config)
            resized = find_ffns(other)
        except Exception:
            # It is the size of something else, which does not take every value.
            continue
        same = _shapes_outside(other, resized) == _shapes_outside(model, ffns)
        if same and all(ffn.width == width for ffn in resized):
            return name, resized
    raise ValueError(
        f"no attribute of {type(model.config).__name__} makes all FFNs {width} instead of {old} neurons wide "
        "and leaves the rest of the model as it is, so the result could not be saved"
    )


def _shapes_outside(model: nn.Module, ffns: Sequence[FFN]) -> dict[str, torch.Size]:
    inside = {id(p) for ffn in ffns for module in _projections(ffn) for p in module.parameters()}
    return {name: p.shape for name, p in model.named_parameters() if id(p) not in inside}


def _keep_neurons(ffn: FFN, neurons: Tensor) -> None:
    """Keep the neurons at ``neurons``, int64 [n], ascending."""
    assert isinstance(ffn.layout, Layout)
    width = ffn.width
    for module in _projections(ffn):
        if module is ffn.down:
            _keep_features(module, neurons, outputs=False)
        else:
            both = torch.cat([neurons, neurons + width]) if ffn.layout.gate_up else neurons
            _keep_features(module, both, outputs=True)


def _keep_features(module: nn.Module, indices: Tensor, outputs: bool) -> None:
    """Reduce the outputs, or else the inputs, of an nn.Linear or Conv1D to those at ``indices``."""
    transposed = isinstance(module, Conv1D)
    # The weight of an nn.Linear is [outputs, inputs].
    dim = int(outputs == transposed)
    for name, along in [("weight", dim), ("bias", 0)][: 1 + outputs]:
        if (old := getattr(module, name)) is not None:
            new = old.index_select(along, indices.to(old.device))
            setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
    size = ("nx", "nf") if transposed else ("in_features", "out_features")
    setattr(module, size[outputs], len(indices))


def _count_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
