"""Which mute set each token of a step uses, in tensors that stay where they are.

A captured CUDA graph reads the same addresses at each replay, and runs no Python. So there is a slot for each
set that a step can have, and one number for each token that a step can have.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from neumuter.models.devices import overwrite
from neumuter.mutes.mute_set import MutedLayer
from neumuter_kernels import mute_

MAX_SLOTS = 2**31 - 1
# What a token of no set has for a row.
UNMUTED = -1


class Rows:
    """The sets of the requests that run, and those that ran last.

    Args:
        layers: the number of FFNs.
        sets: how many sets a step can have: as many as requests.
        neurons: how many neurons a set may mute.
        tokens: how many tokens a step can have.
        device: of the activations.

    Raises:
        ValueError: there are more neurons than the kernels can count.
    """

    def __init__(self, layers: int, sets: int, neurons: int, tokens: int, device: torch.device) -> None:
        if sets * neurons > MAX_SLOTS:
            raise ValueError(
                f"{sets} mute sets of up to {neurons} neurons are more than {MAX_SLOTS} in all: lower vLLM's "
                "--max-num-seqs or NEUMUTER_VLLM_SHARE"
            )
        self.neurons = neurons
        self.indptr = torch.zeros(sets, layers + 1, dtype=torch.int32, device=device)
        self.indices = torch.zeros(sets * neurons, dtype=torch.int32, device=device)
        self.gains = torch.zeros(sets * neurons, device=device)
        self.ids = torch.full((tokens,), UNMUTED, device=device)
        self._slots: OrderedDict[str, int] = OrderedDict()

    def mute(self, hidden: Tensor, layer: int) -> None:
        """Multiply the muted neurons of activations [T, F] by their gains, in place."""
        tokens = hidden.numel() // hidden.shape[-1]
        mute_(hidden, self.indptr, self.indices, self.gains, self.ids[:tokens], layer)

    def choose(
        self, sets: Sequence[tuple[str, Sequence[MutedLayer | None]] | None], counts: Sequence[int]
    ) -> None:
        """Write the sets of a step: of each request, in the order of the tokens, its set and its tokens.

        Args:
            sets: (digest, neurons of each FFN) or None for each request.
            counts: the number of tokens of each request.
        """
        wanted = {one[0] for one in sets if one is not None}
        rows = []
        for one in sets:
            if one is None:
                rows.append(UNMUTED)
                continue
            digest, layers = one
            if digest not in self._slots:
                self._write(digest, layers, wanted)
            self._slots.move_to_end(digest)
            rows.append(self._slots[digest])
        ids = torch.from_numpy(np.repeat(np.array(rows, np.int64), np.asarray(counts, np.int64)))
        overwrite(self.ids[: len(ids)], ids)
        self.ids[len(ids) :].fill_(UNMUTED)

    def _write(self, digest: str, layers: Sequence[MutedLayer | None], wanted: set[str]) -> None:
        """Write a set into a slot that has none, or else over the one that was not used for longest."""
        counts = [0, *(0 if layer is None else len(layer.indices) for layer in layers)]
        total = sum(counts)
        if len(counts) != self.indptr.shape[1] or total > self.neurons:
            raise ValueError(f"a mute set of {total} neurons in {len(layers)} FFNs does not fit a slot")
        slot = len(self._slots)
        if slot == len(self.indptr):
            slot = self._slots.pop(next(digest for digest in self._slots if digest not in wanted))
        first = slot * self.neurons
        muted = [layer for layer in layers if layer is not None]
        overwrite(self.indptr[slot], first + torch.tensor(counts).cumsum(0).int())
        if muted:
            overwrite(self.indices[first : first + total], torch.cat([x.indices for x in muted]))
            overwrite(self.gains[first : first + total], torch.cat([x.gains for x in muted]))
        self._slots[digest] = slot
