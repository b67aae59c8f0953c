"""Samples that go through a model in pieces that fit into memory."""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn

from neumuter.models.devices import is_sharded

Item = TypeVar("Item")
Found = TypeVar("Found")
logger = logging.getLogger("neumuter")


class Pieces:
    """Samples go through ``model`` ``size`` at a time; where memory runs out, half of them from then on.

    Not so a model that several processes share: they have to run the same passes.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        self.model, self.size = model, size

    def run(self, work: Callable[[Sequence[Item]], Found], items: Sequence[Item]) -> Iterator[Found]:
        """Yield what ``work`` returns for the pieces of ``items``, in their order.

        Args:
            work: is called again for fewer items where it raises ``torch.OutOfMemoryError``, and must have
                changed nothing by then.

        Raises:
            torch.OutOfMemoryError: one item alone does not fit.
        """
        start = 0
        while start < len(items):
            piece = items[start : start + self.size]
            found: list[Found] = []
            try:
                found.append(work(piece))
            except torch.OutOfMemoryError:
                if not self.may_halve(len(piece)):
                    raise
            # Here, because the handler holds the frames of what failed, and these hold their tensors.
            if found:
                start += len(piece)
                yield found.pop()
            else:
                self.halve(len(piece))

    def may_halve(self, size: int) -> bool:
        """Whether fewer samples than ``size`` can go through the model at a time."""
        return size > 1 and not is_sharded(self.model)

    def halve(self, size: int) -> None:
        """From now on take half of ``size`` samples, which did not fit; say so, and free what can be."""
        self.size = -(-size // 2)
        logger.warning(
            "%d samples at a time do not fit into memory: from now on there are %d, which gives the same "
            "result.",
            size, self.size,
        )  # fmt: skip
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
