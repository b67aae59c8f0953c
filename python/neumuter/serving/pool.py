"""The mute sets of a MuteBank, in tensors that the kernels read."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from neumuter.mutes.mute_set import MutedLayer

# Offsets are int32, which limits the muted neurons of all sets, with the room for more.
MAX_SLOTS = 2**31 - 1
# Where the room for sets ends, new room is made for this multiple of what is needed.
ROOM_FACTOR = 1.25
# What a Pool holds on each device.
Tensors = dict[torch.device, tuple[Tensor, Tensor, Tensor]]
# Where a set is in it: its row, its first slot, the slot behind its last.
Place = tuple[int, int, int]


class Pool:
    """Sets one after another, on each device: (indptr int32 [S, L + 1], indices int32 [N], gains [N]).

    What a batch may be reading is never overwritten: new sets are appended. Where the room ends, the sets
    that are left move to new tensors.

    Args:
        own: of each layer the neurons that this process computes, which are counted from there on.
        devices: where sets are held.
    """

    def __init__(self, own: Sequence[slice], devices: Iterable[torch.device]) -> None:
        self.own = own
        self.sets: dict[str, Place] = {}
        self.tensors: Tensors = {device: self._make_room(device, 0, 0) for device in devices}
        # Behind the last set.
        self.row, self.end = 0, 0

    @property
    def widths(self) -> list[int]:
        """The number of neurons of each layer that this process computes."""
        return [own.stop - own.start for own in self.own]

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in next(iter(self.tensors.values())))

    def _make_room(self, device: torch.device, sets: int, neurons: int) -> tuple[Tensor, Tensor, Tensor]:
        # Tensors of inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            indptr = torch.zeros(sets, len(self.own) + 1, dtype=torch.int32, device=device)
            indices = torch.zeros(neurons, dtype=torch.int32, device=device)
            return indptr, indices, torch.zeros(neurons, device=device)

    def add(self, name: str, layers: Sequence[MutedLayer | None]) -> None:
        """Append a set: a ``MutedLayer`` or None for each layer. Nothing is changed on an error."""
        held = [layer and _cut(layer, own) for layer, own in zip(layers, self.own, strict=True)]
        muted = [layer for layer in held if layer is not None]
        counts = torch.tensor([0, *(0 if layer is None else len(layer.indices) for layer in held)])
        indices, gains = torch.cat([x.indices for x in muted]), torch.cat([x.gains for x in muted])
        rows, slots = (len(x) for x in next(iter(self.tensors.values()))[:2])
        found = dict(self.sets), self.tensors, self.row, self.end
        if self.row == rows or self.end + len(indices) > slots:
            found = self._move(len(indices))
        sets, tensors, row, end = found
        sets[name] = _append(tensors, row, end, counts.cumsum(0), indices, gains)
        for device in tensors:
            # Other streams read it from now on.
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        self.sets, self.tensors, self.row, self.end = sets, tensors, row + 1, sets[name][2]

    def _move(self, more: int) -> tuple[dict[str, Place], Tensors, int, int]:
        """Copy the sets that are left to new tensors with room for ``more`` neurons.

        Returns:
            The places of the sets, the tensors, the next row, and the next slot.
        """
        live = sum(stop - start for _, start, stop in self.sets.values())
        if live + more > MAX_SLOTS:
            raise ValueError(
                f"a MuteBank holds at most {MAX_SLOTS} muted neurons: its sets have {live}, and this one has "
                f"{more} more; remove sets that are not in use"
            )
        size = int(ROOM_FACTOR * (len(self.sets) + 1)) + 1, min(int(ROOM_FACTOR * (live + more)), MAX_SLOTS)
        tensors = {device: self._make_room(device, *size) for device in self.tensors}
        indptr, indices, gains = next(iter(self.tensors.values()))
        sets, end = {}, 0
        for row, (name, (old, start, stop)) in enumerate(self.sets.items()):
            sets[name] = _append(
                tensors, row, end, indptr[old] - start, indices[start:stop], gains[start:stop]
            )
            end = sets[name][2]
        return sets, tensors, len(sets), end


def _cut(layer: MutedLayer, own: slice) -> MutedLayer:
    inside = (layer.indices >= own.start) & (layer.indices < own.stop)
    return MutedLayer(layer.indices[inside] - own.start, layer.gains[inside])


def _append(tensors: Tensors, row: int, end: int, indptr: Tensor, indices: Tensor, gains: Tensor) -> Place:
    """Write one set; returns its place."""
    stop = end + len(indices)
    for pointers, neurons, factors in tensors.values():
        pointers[row] = (indptr + end).to(pointers.device)
        neurons[end:stop], factors[end:stop] = indices.to(neurons.device), gains.to(factors.device)
    return row, end, stop
