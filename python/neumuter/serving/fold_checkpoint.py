"""Mute sets folded into checkpoints on disk: neither the model nor a whole shard is ever loaded.

Folding changes neither shapes nor dtypes. So a shard is copied with its header as it is, and only the bytes
of the touched down projections change. A model without weights says where these are.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from neumuter.files import PathLike, new_folder, refuse_taken
from neumuter.models.families import find_ffns
from neumuter.models.ffn import FFN
from neumuter.models.loading import raising_one_line
from neumuter.mutes.fingerprint import sketch_any
from neumuter.mutes.matching import (
    adapted_projections,
    bare_base_differs,
    refuse_adapter,
    refuse_other,
    structure_differs,
    weights_differ,
)
from neumuter.mutes.mute_set import MutedLayer, MuteSet, MuteSource, load_mutes
from neumuter.serving.companions import copy_companions, list_companions, write_card
from neumuter.serving.edits import Edit, copy_edited, count_bytes
from neumuter.serving.fold import fold_columns, folded_once
from neumuter.serving.fold_quantised import quantised_edits
from neumuter.serving.shards import DTYPES, Place, find_places, find_shards

ROWS_PER_COMPARISON = 1024


class NotOnDiskError(ValueError):
    """The checkpoint stores a down projection in a form that only loading converts."""


@dataclass(frozen=True)
class _Down:
    """The down projection of one FFN, on disk. ``ffn`` belongs to a model on the meta device."""

    ffn: FFN
    place: Place
    layer: MutedLayer | None

    @contextmanager
    def holding(self, data: bytearray) -> Iterator[Tensor]:
        """Context in which the weight is the bytes ``data``; yields a view of them, [d, E, F]."""
        parent, _, name = self.ffn.down_name.rpartition(".")
        holder = self.ffn.module.get_submodule(parent)
        empty = getattr(holder, name)
        tensor = torch.frombuffer(data, dtype=DTYPES[self.place.dtype]).view(self.place.shape)
        setattr(holder, name, nn.Parameter(tensor, requires_grad=False))
        try:
            yield cast(Tensor, self.ffn.down_weight)
        finally:
            setattr(holder, name, empty)

    @property
    def edit(self) -> Edit:
        """What folding makes of the weight's bytes."""
        return Edit(self.place.begin, self.place.end, self._fold, self._is_folded)

    def _fold(self, data: bytearray) -> None:
        with self.holding(data) as weight:
            fold_columns(weight, cast(MutedLayer, self.layer))

    def _is_folded(self, before: bytearray, after: bytearray) -> bool:
        """Check that the weight is the original times the gains, rounded once."""
        with self.holding(before) as source, self.holding(after) as result:
            gains = torch.ones(source.shape[1:])
            layer = cast(MutedLayer, self.layer)
            gains.view(-1)[layer.indices.long()] = layer.gains
            # The product is float32, or float64.
            return all(
                torch.equal(rows, (original * gains).to(rows.dtype))
                for original, rows in zip(
                    source.split(ROWS_PER_COMPARISON), result.split(ROWS_PER_COMPARISON), strict=True
                )
            )


def fold_checkpoint(
    folder: PathLike,
    mutes: MuteSource,
    out: PathLike,
    callback: Callable[[int, int], object] | None = None,
) -> None:
    """Fold a mute set into a copy of a Hugging Face checkpoint.

    The copy holds the weights as ``neumuter.fold`` would have made them, the other files of ``folder`` as
    they are, but no weights in other formats, and a model card. It appears whole or not at all: the shards
    are written to a hidden folder next to ``out``, read back and compared, and the folder is renamed at the
    end. A fold that was killed starts anew, and removes what the killed one left. Memory: two of the down
    projections, whatever the size of the model.

    In checkpoints of GPTQ, AWQ (gemm), compressed-tensors and FP8, the gains of dense gated FFNs are
    multiplied into the scales of their up projections, one projection in float32 at a time, and nothing is
    quantised again. Where outputs of an up projection in FP8 share scales, gains of 0 and −1 are taken
    alone. A set that was folded in so before is not noticed.

    Args:
        folder: the checkpoint: config.json with model.safetensors, or with model.safetensors.index.json and
            its shards.
        mutes: a ``MuteSet``, or the path of a mute file.
        out: the new folder; it must not exist, or be empty.
        callback: called as ``callback(done, total)`` as bytes of the new shards are written.

    Raises:
        FileExistsError: ``out`` exists and is not an empty folder, at the start or by the end.
        BlockingIOError: another process is writing the same ``out``.
        MuteMismatchError: the set was made for another model, or is folded in already.
        MuteFileError: the mute file is bad.
        NotOnDiskError: the checkpoint stores a down projection under another name than the model does.
        ValueError: the checkpoint is damaged; it is quantised in a form that is not known, or in one that
            cannot hold the gains; FFNs that share weights are not muted alike; a file is a link out of
            ``folder``; or ``out`` cannot be renamed to.
        OSError: a shard that was read back is not what was written, or ``out`` cannot be written.
    """
    folder, out = Path(folder), Path(os.path.abspath(out))
    mutes = load_mutes(mutes)
    refuse_taken(out)
    shards = find_shards(folder)
    index = None if shards == [folder / SAFE_WEIGHTS_NAME] else folder / SAFE_WEIGHTS_INDEX_NAME
    edits = _find_edits(folder, shards, mutes)
    companions = list_companions(folder, index)
    advance = count_bytes(sum(shard.stat().st_size for shard in shards), callback)
    with new_folder(out) as temporary:
        for shard in shards:
            copy_edited(shard, temporary / shard.name, edits.get(shard, []), advance)
        copy_companions(companions, folder, temporary)
        write_card(mutes, temporary)


# --- What is there, and whether it fits ------------------------------------------------------


def _find_edits(folder: Path, shards: Sequence[Path], mutes: MuteSet) -> dict[Path, list[Edit]]:
    """Find what folding changes, {shard: edits}.

    Raises:
        MuteMismatchError: the set was made for another model.
        ValueError: weights that cannot be folded where they are, or that are shared and not muted alike.
    """
    if (folder / ADAPTER_CONFIG_NAME).exists():
        raise ValueError(
            f"{folder} has {ADAPTER_CONFIG_NAME}: it is loaded as an adapter on another model, whatever "
            "weights lie beside it. Use `neumuter fold`, which merges the adapter first"
        )
    with raising_one_line(str(folder)), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    ffns = {ffn.path: ffn for ffn in find_ffns(model)}
    refuse_other(structure_differs(model, ffns, mutes))
    folded_once(model, mutes)
    places = find_places(shards)
    if options := getattr(config, "quantization_config", None):
        refuse_adapter(mutes, folder)
        return quantised_edits(ffns, places, options, mutes)
    prefix = model.base_model_prefix
    downs = [_Down(ffns[p], _locate(ffns[p], places, prefix), mutes.layers.get(p)) for p in mutes.widths]
    adapted = {
        path: _Down(one, _locate(one, places, prefix), None)
        for path, one in adapted_projections(model, mutes).items()
    }
    _check_fingerprint(downs, adapted, mutes)
    return {
        shard: [down.edit for down in downs if down.layer and down.place.shard == shard] for shard in shards
    }


def _locate(ffn: FFN, places: dict[str, Place], prefix: str) -> Place:
    name = f"{ffn.path}.{ffn.down_name}"
    # A model that was saved without its head has no prefix.
    place = places.get(name) or places.get(name.removeprefix(f"{prefix}."))
    if place is None:
        raise NotOnDiskError(
            f"the checkpoint has no tensor {name}: it is quantised, or stores this weight in another form, "
            "which transformers converts on loading; load the model, and use neumuter.fold"
        )
    shape = tuple(ffn.down_parameter.shape)
    if place.shape != shape:
        raise ValueError(f"{name} has shape {list(place.shape)}, config.json says {list(shape)}")
    if place.dtype not in DTYPES:
        raise ValueError(f"{name} is stored as {place.dtype}: quantised weights cannot be folded into")
    return place


def _check_fingerprint(downs: Iterable[_Down], adapted: Mapping[str, _Down], mutes: MuteSet) -> None:
    """Raise MuteMismatchError unless the weights are those that ``mutes`` was made for."""
    sketches, differences = {}, []
    for path, down in adapted.items():
        with down.holding(down.place.read()):
            sketches[path] = sketch_any(down.ffn)
    refuse_other(bare_base_differs(mutes, sketches))
    for down in downs:
        with down.holding(down.place.read()):
            differences += weights_differ(down.ffn, mutes)
    refuse_other(differences)
