"""The reference hidden states of the retain tokens: kept where there is room, or computed in each step."""

import itertools
import logging
from array import array
from collections.abc import Iterable

import torch
from torch import Tensor

# References of at most this size are kept on the model's device,
DEVICE_BYTES = 1 << 30
# and larger ones up to this size in the host's memory, once in each process.
HOST_BYTES = 1 << 32

logger = logging.getLogger("neumuter")


class References:
    """The last hidden states of all retain tokens, one sample after the other, of the model without masks.

    Up to ``DEVICE_BYTES`` of them are kept on the model's device, if there is room. Up to ``HOST_BYTES`` are
    kept in the host's memory instead: the processor gathers those of the next step while the device runs the
    last one, and copies them with its other inputs. If there are more, none are kept, and each step computes
    its own. On the CPU both places are one memory, so there the larger limit counts.

    Args:
        lengths: the number of tokens of each retain sample.
        state_bytes: of one token's state.
        states: the states of all tokens in pieces [N, d], which are computed only if they are kept.
    """

    def __init__(self, lengths: Iterable[int], state_bytes: int, states: Iterable[Tensor]) -> None:
        self.starts = array("q", itertools.accumulate(lengths, initial=0))
        size = self.starts[-1] * state_bytes
        self.on_device = size <= DEVICE_BYTES
        self._states: Tensor | None = None
        if size > max(DEVICE_BYTES, HOST_BYTES):
            logger.info("Each step computes its references: %.1f GiB are too many to keep.", size / (1 << 30))
            return
        done = 0
        for piece in states:
            if self._states is None:
                self._pinned = piece.is_cuda
                self._states = self._make_room(piece)
            self._states[done : done + len(piece)] = piece
            done += len(piece)

    def _make_room(self, piece: Tensor) -> Tensor:
        """A tensor [tokens, d] for all states, of which ``piece`` is the first, where they are kept."""
        if self.on_device:
            try:
                return torch.empty(self.starts[-1], piece.shape[1], dtype=piece.dtype, device=piece.device)
            except torch.OutOfMemoryError:
                self.on_device = False
                logger.warning("The references do not fit on the device: they are kept in the host's memory.")
        return torch.empty(self.starts[-1], piece.shape[1], dtype=piece.dtype)

    def rows(self, number: int) -> Tensor:
        """The rows of a retain sample, which are counted from 0: int64 [N] on the CPU."""
        return torch.arange(self.starts[number], self.starts[number + 1])

    def lay_out(self, rows: Tensor) -> Tensor:
        """What a step needs on the device to ``read`` the states at ``rows``, int64 [M] on the CPU.

        Returns:
            The states, [M, d] on the CPU, where they are kept there; else ``rows``.
        """
        if self.on_device or self._states is None:
            return rows
        # Memory of its own for each step: torch gives it to nobody else before its copy has run.
        found = torch.empty(
            len(rows), self._states.shape[1], dtype=self._states.dtype, pin_memory=self._pinned
        )
        return torch.index_select(self._states, 0, rows, out=found)

    def read(self, laid_out: Tensor) -> Tensor | None:
        """The states [M, d], given what ``lay_out`` returned, on the device; None if none are kept."""
        if self._states is None:
            return None
        return self._states.index_select(0, laid_out) if self.on_device else laid_out
