"""Mute sets folded into quantised checkpoints: scales change, and nothing is quantised again.

A gated FFN is h_f = φ(gate_f·x)·(up_f·x): a gain on neuron f is a gain on output f of the up projection. If
outputs have scales of their own, these are multiplied.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neumuter.models.ffn import FFN, Layout
from neumuter.mutes.fingerprint import SKETCHED, sketch
from neumuter.mutes.matching import refuse_other, sketches_differ
from neumuter.mutes.mute_set import MutedLayer, MuteSet
from neumuter.serving.edits import Edit
from neumuter.serving.factors import COARSE, rounding, scaled
from neumuter.serving.formats import Stored, as_tensor, find_stored
from neumuter.serving.shards import Place

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Up:
    """The up projection of an FFN with muted neurons: ``outputs`` int64 [n], and their ``gains``."""

    stored: Stored
    outputs: Tensor
    gains: Tensor

    @property
    def part(self) -> str:
        """The part that changes."""
        return self.stored.factors or "weight"

    @property
    def place(self) -> Place:
        return self.stored.parts[self.part]

    @property
    def edit(self) -> Edit:
        return Edit(self.place.begin, self.place.end, self._fold, self._is_folded)

    def of_outputs(self, data: bytearray) -> Tensor:
        """View the part in its bytes, the outputs first."""
        tensor = as_tensor(data, self.place)
        return tensor.T if self.part == "scales" else tensor

    def rounding(self) -> float:
        if self.stored.factors is None:
            return 0.0
        factors = self.of_outputs(self.place.read())[self.outputs]
        return max(map(rounding, factors, self.gains))

    def _fold(self, data: bytearray) -> None:
        tensor = self.of_outputs(data)
        if self.stored.factors is not None:
            tensor[self.outputs] = scaled(tensor[self.outputs], self.gains[:, None])
            return
        # Numbers of FP8 whose scale is others', too: gains are 0, 1 and −1, and these change the sign bit.
        numbers = tensor.view(torch.uint8)
        numbers[self.outputs[self.gains == 0]] = 0
        numbers[self.outputs[self.gains == -1]] ^= 0x80

    def _is_folded(self, before: bytearray, after: bytearray) -> bool:
        """Check that the dequantised outputs are what they were, the muted ones times their gains."""
        source, result = (
            self.stored.weights(**{self.part: as_tensor(data, self.place)}) for data in (before, after)
        )
        gains = torch.ones(len(source), 1)
        gains[self.outputs, 0] = self.gains
        same = torch.ones(len(source), dtype=torch.bool)
        same[self.outputs] = False
        # Float32 rounds the dequantised outputs once more. Groups count by their weights, not alike.
        tolerance = 4 * (torch.finfo(torch.float32).eps + self.rounding())
        exact = source * gains
        moved, length = (result - exact).norm(dim=1), exact.norm(dim=1)
        return torch.equal(result[same], source[same]) and bool((moved <= tolerance * length).all())


def quantised_edits(
    ffns: Mapping[str, FFN], places: Mapping[str, Place], options: Mapping[str, Any], mutes: MuteSet
) -> dict[Path, list[Edit]]:
    """Find what folding ``mutes`` changes in the shards of a quantised checkpoint, {shard: edits}.

    Args:
        ffns: {path: FFN} of a model without weights.
        places: {name: where it is} of all tensors of the checkpoint.
        options: its quantization_config.

    Raises:
        MuteMismatchError: the set was made for other weights.
        ValueError: a projection is stored in a form that is not known, or scaling outputs of it is not
            muting neurons.
    """
    differences: list[str] = []
    edits: dict[Path, list[Edit]] = {}
    for path in mutes.widths:
        ffn, layer = ffns[path], mutes.layers.get(path)
        if not isinstance(ffn.layout, Layout):
            raise ValueError(f"{path} holds experts; fold into the checkpoint that it was made from")
        down = find_stored(f"{path}.{ffn.layout.down}", places, options)
        differences += _weights_differ(path, down, layer, mutes)
        if layer is not None:
            name = f"{path}.{ffn.layout.up or ffn.layout.gate_up}"
            up = _Up(find_stored(name, places, options), *_outputs(ffn, layer))
            _check(ffn, up, down)
            edits.setdefault(up.place.shard, []).append(up.edit)
    refuse_other(differences)
    return edits


def _outputs(ffn: FFN, layer: MutedLayer) -> tuple[Tensor, Tensor]:
    """The outputs of the up projection that make the muted neurons, and their gains."""
    assert isinstance(ffn.layout, Layout)
    # The gate is in the first half of a packed projection.
    return layer.indices.long() + (ffn.width if ffn.layout.gate_up else 0), layer.gains


def _weights_differ(path: str, down: Stored, layer: MutedLayer | None, mutes: MuteSet) -> list[str]:
    weight = down.weights()[:, None]
    if weight.shape[2] != mutes.widths[path]:
        raise ValueError(f"{down.name} has {weight.shape[2]} inputs, not {mutes.widths[path]}")
    selections: Sequence[Tensor | None] = [None] if layer is None else [None, layer.indices]
    found = [sketch(weight, columns) for columns in selections]
    return sketches_differ(path, dict(zip(SKETCHED, found, strict=False)), mutes, down.tolerance)


def _check(ffn: FFN, up: _Up, down: Stored) -> None:
    """Raise ValueError unless scaling the outputs of ``up`` is muting their neurons."""
    assert isinstance(ffn.layout, Layout)
    name, gains = up.stored.name, up.gains
    # As the norm of BitNet does, one between the two projections would take the scale of a neuron out again.
    # A layer that has its projections itself, as OPT's, has more around them.
    others = [
        child
        for child, module in ffn.module.named_children()
        if child not in ffn.layout.names and not isinstance(module, nn.Dropout | nn.Identity)
    ]
    if others and not hasattr(ffn.module, "self_attn"):
        raise ValueError(
            f"{ffn.path} has {', '.join(others)} beside its projections, so to scale the outputs of {name} "
            "may not be muting: fold into the checkpoint that this one was made from"
        )
    count = len(up.of_outputs(up.place.read()))
    if count != ffn.width * (2 if ffn.layout.gate_up else 1):
        raise ValueError(f"{name} has {count} outputs, which does not fit {ffn.width} neurons")
    if "bias" in up.stored.parts and up.stored.read("bias").any():
        raise ValueError(f"{name} has a bias, which its scales leave")
    if not (ffn.layout.gate or ffn.layout.gate_up) and (gains.any() or ffn.activation is None):
        raise ValueError(
            f"{ffn.path} is not gated, so {name} can take gains of 0 alone, and the set has others"
        )
    if "input_scale" in down.parts and (gains.abs() > 1).any():
        raise ValueError(
            f"{down.name} has a static input_scale, which clips what is larger than before: gains must be "
            f"from -1 to 1, and {ffn.path} has {gains[gains.abs().argmax()]:g}"
        )
    if up.stored.factors is None:
        exact = (gains == 0) | (gains.abs() == 1)
        if up.place.dtype != "F8_E4M3" or not exact.all():
            raise ValueError(
                f"{name} has scales that several outputs share, so it takes gains of 0 and -1 alone, and in "
                f"FP8 alone; {ffn.path} has {gains[~exact][:1].tolist() or gains[:1].tolist()}"
            )
    loss = up.rounding()
    if not loss < 1:
        raise ValueError(f"{name}: its scales times the gains are out of range of {up.place.dtype}")
    if loss > COARSE:
        logger.warning(
            "%s: %s holds scales times their gains to %.0f %% only", name, up.place.dtype, 100 * loss
        )
