"""Mute sets folded into checkpoints on disk: neither the model nor a whole shard is ever loaded.

Folding changes neither shapes nor dtypes. So a shard is copied with its header as it is, and only the bytes
of the touched down projections change. A model without weights says where these are.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from neumuter.files import PathLike, new_folder, refuse_taken
from neumuter.models.families import find_ffns
from neumuter.models.ffn import FFN
from neumuter.mutes.matching import refuse_other, structure_differs, weights_differ
from neumuter.mutes.mute_set import MutedLayer, MuteSet, MuteSource, load_mutes
from neumuter.serving.fold import fold_columns, folded_once

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BYTES_PER_COPY = 1 << 22
ROWS_PER_COMPARISON = 1024
CARD = "README.md"
# No other files are copied: weights in other formats still know what is to be forgotten.
COPIED_SUFFIXES = (".json", ".jsonl", ".txt", ".md", ".model", ".jinja", ".tiktoken", ".py", ".yaml")
COPIED_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")


class NotOnDiskError(ValueError):
    """The checkpoint stores a down projection in a form that only loading converts."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: bytes ``begin`` to ``end`` of the file ``shard``.

    ``dtype`` is the name that safetensors has for it.
    """

    shard: Path
    begin: int
    end: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Down:
    """The down projection of one FFN, on disk. ``ffn`` belongs to a model on the meta device."""

    ffn: FFN
    place: _Place
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

    def read(self, shard: Path) -> bytearray:
        """Read the weight's bytes from the file ``shard``, the original or a copy of it."""
        with open(shard, "rb") as file:
            file.seek(self.place.begin)
            return _read(file, self.place.end - self.place.begin)


def fold_checkpoint(
    folder: PathLike,
    mutes: MuteSource,
    out: PathLike,
    callback: Callable[[int, int], object] | None = None,
) -> None:
    """Fold a mute set into a copy of a Hugging Face checkpoint.

    The copy holds what ``neumuter.fold`` and ``save_pretrained`` would have written, the other files of
    ``folder`` but no weights in other formats, and a model card. It appears whole or not at all: the shards
    are written to a hidden folder next to ``out``, read back and compared, and the folder is renamed at the
    end. A fold that was killed starts anew, and removes what the killed one left. Memory: two of the down
    projections, whatever the size of the model.

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
        ValueError: the checkpoint is damaged or quantised, FFNs that share weights are not muted alike, or
            ``out`` cannot be renamed to.
        OSError: a shard that was read back is not what was written, or ``out`` cannot be written.
    """
    folder, out = Path(folder), Path(os.path.abspath(out))
    mutes = load_mutes(mutes)
    if out.is_symlink() or os.path.ismount(out) or out == Path.cwd():
        raise ValueError(f"out must be a new folder, or an empty one that can be replaced, got {out}")
    refuse_taken(out)
    shards = _find_shards(folder)
    downs = _find_downs(folder, shards, mutes)
    _check_fingerprint(downs, mutes)
    total, done = sum(shard.stat().st_size for shard in shards), 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if callback:
            callback(done, total)

    with new_folder(out) as temporary:
        for shard in shards:
            target, touched = temporary / shard.name, [d for d in downs if d.layer and d.place.shard == shard]
            written = _write(_fold_pieces(shard, touched), target, advance)
            if _hash(target) != written or not all(_is_folded(down, target) for down in touched):
                raise OSError(f"{target} reads back other than it was written; is the disk in order?")
        _copy_others(folder, temporary, shards)
        card = (folder / CARD).read_bytes() + b"\n\n" if (folder / CARD).exists() else b""
        (temporary / CARD).write_bytes(card + model_card(mutes).encode())


# --- What is there, and whether it fits ------------------------------------------------------


def _find_shards(folder: Path) -> list[Path]:
    """Find the safetensors files that transformers would load from ``folder``.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the index names files outside of the folder.
    """
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise FileNotFoundError(f"{folder} has neither {SAFE_WEIGHTS_NAME} nor {index.name}")
    names = sorted(set(json.loads(index.read_text()).get("weight_map", {}).values()))
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{index} must name shards in its own folder, it names {names[:4]}")
    return [folder / name for name in names]


def _read_header(shard: Path) -> dict[str, _Place]:
    """Read where the tensors of a safetensors file are, {name: _Place}.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(shard, framework="pt"):
            # Opening it checks every name, dtype, shape and offset.
            pass
    except SafetensorError as error:
        raise ValueError(f"{shard} is not a valid safetensors file: {error}") from error
    with open(shard, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: _Place(shard, 8 + size + begin, 8 + size + end, x["dtype"], tuple(x["shape"]))
        for name, x in header.items()
        for begin, end in [x["data_offsets"]]
    }


def _find_downs(folder: Path, shards: Sequence[Path], mutes: MuteSet) -> list[_Down]:
    """Find the down projection of every FFN that ``mutes`` was made on.

    Raises:
        MuteMismatchError: the architecture, a module path or an intermediate size differs.
        ValueError: weights that cannot be folded where they are, or that are shared and not muted alike.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{folder} is quantised; fold into the checkpoint it was made from")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    ffns = {ffn.path: ffn for ffn in find_ffns(model)}
    refuse_other(structure_differs(model, ffns, mutes))
    folded_once(model, mutes)
    places: dict[str, _Place] = {}
    for shard in shards:
        found = _read_header(shard)
        if twice := places.keys() & found.keys():
            raise ValueError(f"{shard} holds {min(twice)}, which another shard of {folder} holds too")
        places.update(found)
    return [
        _Down(ffns[path], _locate(ffns[path], places, model.base_model_prefix), mutes.layers.get(path))
        for path in mutes.widths
    ]


def _locate(ffn: FFN, places: dict[str, _Place], prefix: str) -> _Place:
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


def _check_fingerprint(downs: Iterable[_Down], mutes: MuteSet) -> None:
    """Raise MuteMismatchError unless the weights are those that ``mutes`` was made for."""
    differences = []
    for down in downs:
        with down.holding(down.read(down.place.shard)):
            differences += weights_differ(down.ffn, mutes)
    refuse_other(differences)


# --- Bytes -----------------------------------------------------------------------------------


def _fold_pieces(shard: Path, touched: Iterable[_Down]) -> Iterator[bytearray]:
    """Yield the bytes of ``shard`` with the mutes of the ``touched`` down projections folded in."""
    with open(shard, "rb") as file:
        for down in sorted(touched, key=lambda down: down.place.begin):
            yield from _read_pieces(file, down.place.begin - file.tell())
            data = _read(file, down.place.end - down.place.begin)
            with down.holding(data) as weight:
                fold_columns(weight, cast(MutedLayer, down.layer))
            yield data
        yield from _read_pieces(file, os.fstat(file.fileno()).st_size - file.tell())


def _is_folded(down: _Down, target: Path) -> bool:
    """Check that in the file ``target`` the weight is the original times the gains, rounded once."""
    before, after = down.read(down.place.shard), down.read(target)
    with down.holding(before) as source, down.holding(after) as result:
        gains = torch.ones(source.shape[1:])
        layer = cast(MutedLayer, down.layer)
        gains.view(-1)[layer.indices.long()] = layer.gains
        # The product is float32, or float64.
        return all(
            torch.equal(rows, (original * gains).to(rows.dtype))
            for original, rows in zip(
                source.split(ROWS_PER_COMPARISON), result.split(ROWS_PER_COMPARISON), strict=True
            )
        )


def _read(file: BufferedReader, size: int) -> bytearray:
    data = bytearray(size)
    if file.readinto(data) != size:
        raise OSError(f"{file.name} ends before its header says")
    return data


def _read_pieces(file: BufferedReader, size: int) -> Iterator[bytearray]:
    while size:
        piece = _read(file, min(size, BYTES_PER_COPY))
        size -= len(piece)
        yield piece


def _write(pieces: Iterable[bytearray], target: Path, advance: Callable[[int], None]) -> str:
    """Write ``pieces`` to the file ``target`` and to the disk; returns their SHA-256."""
    digest = hashlib.sha256()
    with open(target, "wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            advance(len(piece))
        file.flush()
        os.fsync(file.fileno())
        # What is read back must come from the disk, not from memory.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in _read_pieces(file, os.fstat(file.fileno()).st_size):
            digest.update(piece)
    return digest.hexdigest()


def _copy_others(folder: Path, target: Path, shards: Sequence[Path]) -> None:
    """Copy configurations, tokenizers, texts and the index of ``shards``, but no links to elsewhere."""
    others = [*folder.iterdir(), *(folder / CHAT_TEMPLATE_DIR).glob("*")]
    index = shards != [folder / SAFE_WEIGHTS_NAME] and folder / SAFE_WEIGHTS_INDEX_NAME
    # In the Hub's cache, files are links to blobs.
    homes = folder.resolve(), folder.resolve().parent.parent / "blobs"
    for file in others:
        known = file.suffix in COPIED_SUFFIXES or file.name.split(".")[0] in COPIED_NAMES
        if file.name.endswith(".index.json") and file != index:
            known = False
        if known and file.is_file() and any(file.resolve().is_relative_to(home) for home in homes):
            copy = target / file.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def model_card(mutes: MuteSet) -> str:
    """Write what was done to a checkpoint that ``mutes`` is folded into, a section in Markdown."""
    counts = {path: len(layer.indices) for path, layer in mutes.layers.items()}
    layers = [
        (f"`{path}`", counts.get(path, 0), width, f"{counts.get(path, 0) / width:.2%}")
        for path, width in mutes.widths.items()
    ]
    before, after = (mutes.metrics.get(when) or {} for when in ("before", "after"))
    metrics = [(_code(key), _code(before.get(key)), _code(after.get(key))) for key in {**before, **after}]
    low, high = mutes.gain_range
    return "\n".join(
        [
            "# Made to forget with NeuMuter",
            "",
            "FFN neurons of this model are multiplied by gains, folded into its down projections, so that it",
            "no longer says given texts. This suppresses the texts; it does not prove that they are deleted",
            "from the weights.",
            "",
            f"- Mode: {mutes.mode}, gains from {low:g} to {high:g}",
            f"- Neurons: {mutes.count} of {sum(mutes.widths.values())} ({mutes.share:.2%})",
            f"- Seed: {mutes.seed}",
            "",
            *_table(("FFN", "neurons", "of", "share"), layers),
            *(_table(("metric", "before", "after"), metrics) if metrics else []),
            "Method:",
            "",
            "```json",
            json.dumps(mutes.method, indent=2),
            "```",
            "",
        ]
    )


def _table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    rows = (names, ["---"] * len(names), *rows)
    return [*(f"| {' | '.join(map(str, row))} |" for row in rows), ""]


def _code(value: object) -> str:
    """Write JSON that stays one cell of a table and means nothing else in Markdown, whoever wrote it."""
    return "`" + json.dumps(value).replace("`", "'").replace("|", "\\|") + "`"
