"""Mute sets folded into GGUF files: scales of quantised blocks change, and nothing is quantised again.

A gated FFN is h_f = φ(gate_f·x)·(up_f·x): a gain on neuron f is a gain on row f of the up projection. A row
is whole blocks. All weights of a block are multiples of its one or two scales in float16. So these are
multiplied, and all other bytes stay.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from neumuter.files import PathLike, new_file, refuse_existing
from neumuter.mutes.mute_set import MuteSet, MuteSource, load_mutes
from neumuter.serving.edits import Edit, copy_edited, count_bytes, read
from neumuter.serving.factors import COARSE, rounding, scaled
from neumuter.serving.gguf_file import GgufFFN, Projection, read_gguf

# {type: (where the float16 scales are in a block, in bytes, and how many)}, from llama.cpp's ggml-common.h.
SCALES = {
    "Q4_0": (0, 1), "Q5_0": (0, 1), "Q8_0": (0, 1), "IQ4_NL": (0, 1), "IQ4_XS": (0, 1), "IQ2_XXS": (0, 1),
    "IQ2_XS": (0, 1), "IQ2_S": (0, 1), "IQ3_XXS": (0, 1), "IQ3_S": (0, 1), "IQ1_S": (0, 1), "Q4_1": (0, 2),
    "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 2), "Q3_K": (108, 1), "Q6_K": (208, 1),
    "TQ1_0": (52, 1), "TQ2_0": (64, 1),
}  # fmt: skip
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Half a unit in the last place of a float16, as a share of it.
ROUNDING = 2.0**-11


@dataclass(frozen=True)
class FoldedGguf:
    """What ``fold_gguf`` did.

    Attributes:
        neurons: the number of neurons folded.
        coarse: {tensor: how many of its rows float16 holds, times their gains, to more than 1 % only}.
    """

    neurons: int
    coarse: dict[str, int]


@dataclass(frozen=True)
class _Row:
    """A row of an up projection, and the gain on it."""

    up: Projection
    number: int
    gain: float

    @property
    def edit(self) -> Edit:
        begin = self.up.begin(self.number)
        return Edit(begin, begin + self.up.row_bytes, self._fold, self._is_folded)

    def factors(self, data: bytearray) -> Tensor:
        """View what the gain multiplies in the row's bytes: its scales, or all weights of a plain type."""
        if dtype := PLAIN.get(self.up.kind):
            return torch.frombuffer(data, dtype=dtype)
        at, count = SCALES[self.up.kind]
        blocks = torch.frombuffer(data, dtype=torch.uint8).view(-1, self.up.block_bytes)
        return blocks[:, at : at + 2 * count].view(torch.float16)

    def loss(self, data: bytearray) -> float:
        """How far rounding moves the row, as a share of its length; not finite where it is out of range."""
        return rounding(self.factors(data), self.gain)

    def _fold(self, data: bytearray) -> None:
        factors = self.factors(data)
        factors.copy_(scaled(factors, self.gain))

    def _is_folded(self, before: bytearray, after: bytearray) -> bool:
        """Check that the dequantised row is the gain times what it was, and that other bytes stayed."""
        source, result = (self.up.dequantised(data).double() for data in (before, after))
        loss, rest = self.loss(before), (before.copy(), after.copy())
        for data in rest:
            self.factors(data).zero_()
        # The two scales of a block may take away from each other.
        tolerance = 4 * (ROUNDING + loss) * (source * self.gain).norm()
        return rest[0] == rest[1] and bool((result - source * self.gain).norm() <= tolerance)


def fold_gguf(
    file: PathLike,
    mutes: MuteSource,
    out: PathLike,
    callback: Callable[[int, int], object] | None = None,
) -> FoldedGguf:
    """Fold a mute set into a copy of a GGUF file, without quantising anything again.

    In gated FFNs, the gains are multiplied into the float16 scales of the muted neurons' rows of the up
    projection, or into the rows themselves if they are F32, F16 or BF16. A gain of 0 gives zeros. No other
    byte changes. Plain FFNs take gains of 0 alone. The copy appears whole or not at all: it is written to a
    hidden folder next to ``out``, read back, dequantised and compared, and then renamed. Memory: a few pieces
    of the file, whatever its size.

    The weights may be quantised ones of those that the set was made for. A set that was folded in so before
    is noticed only where it silences neurons.

    Args:
        file: a GGUF file of one part.
        mutes: a ``MuteSet``, or the path of a mute file.
        out: the new file; it must not exist.
        callback: called as ``callback(done, total)`` as bytes of the new file are written.

    Raises:
        FileExistsError: ``out`` exists, at the start or by the end.
        BlockingIOError: another process is writing the same ``out``.
        ImportError: the package gguf is not installed.
        MuteMismatchError: the set was made for another model.
        MuteFileError: the mute file is bad.
        ValueError: the file is damaged, or of an architecture that transformers does not know; an up
            projection has a bias, a type without float16 scales, or scales too large for their gains; the
            FFN computes something else than φ(gate)·up; a plain one has gains other than 0.
        OSError: what was read back is not right, or ``out`` cannot be written.
    """
    file, out = Path(file), Path(out)
    refuse_existing(out)
    mutes = load_mutes(mutes)
    rows = _find_rows(read_gguf(file, mutes).ffns, mutes)
    coarse = _check_rows(file, rows)
    advance = count_bytes(file.stat().st_size, callback)
    with new_file(out) as temporary:
        copy_edited(file, temporary, [row.edit for row in rows], advance)
    return FoldedGguf(mutes.count, coarse)


def _find_rows(found: Mapping[str, GgufFFN], mutes: MuteSet) -> list[_Row]:
    """Find the rows to multiply.

    Raises:
        ValueError: multiplying them is not muting the neurons.
    """
    rows = []
    for path, layer in mutes.layers.items():
        one = found[path]
        name, kind = one.up.tensor.name, one.up.kind
        if not one.ffn.is_dense and one.ffn.activation is None:
            raise ValueError(f"{path} computes something else than φ(gate)·up, so {name} cannot be scaled")
        if one.bias:
            raise ValueError(f"{name} has a bias, which scaling its rows leaves; export gguf-lora instead")
        if not one.is_gated and (layer.gains.any() or one.ffn.activation is None):
            raise ValueError(
                f"{path} is not gated, so rows of {name} can take gains of 0 alone, and the set has others; "
                "export gguf-lora instead"
            )
        if kind not in SCALES and kind not in PLAIN:
            raise ValueError(
                f"{name} is of type {kind}, which has no float16 scale to multiply; quantise the model anew "
                "with another type for it, or export gguf-lora instead"
            )
        numbers = one.up_rows(layer.indices)
        rows += [_Row(one.up, *pair) for pair in zip(numbers, layer.gains.tolist(), strict=True)]
    return rows


def _check_rows(file: Path, rows: list[_Row]) -> dict[str, int]:
    """Look at what rounding does to the factors; returns ``FoldedGguf.coarse``.

    Raises:
        ValueError: some overflow, or all that are to be silenced are silent.
    """
    coarse: Counter[str] = Counter()
    silent = []
    for row in rows:
        data = read(file, row.edit.begin, row.edit.end)
        name, loss = row.up.tensor.name, row.loss(data)
        if not loss < 1 / ROUNDING:
            raise ValueError(f"{name}, row {row.number}: its scales times {row.gain:g} are out of range")
        if loss > COARSE:
            coarse[name] += 1
        if row.gain == 0:
            silent.append(not row.factors(data).any())
    if silent and all(silent):
        raise ValueError(f"all neurons to silence are silent in {file}: is the set folded in already?")
    return dict(coarse)
