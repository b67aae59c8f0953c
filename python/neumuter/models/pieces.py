"""Samples that go through a model in pieces that fit into memory."""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import nn

from neumuter.models.devices import is_sharded
from neumuter.models.recomputation import Recomputation

Item = TypeVar("Item")
Found = TypeVar("Found")
logger = logging.getLogger("neumuter")
# What is said where pieces are smaller from the start.
SMALLER = (
    "1/%d of the samples at a time go through the model, which gives the same result but for rounding. What "
    "is sampled from the model can be other texts."
)
_halvings: ContextVar[int] = ContextVar("halvings", default=0)


class SplitOutOfMemoryError(torch.OutOfMemoryError):
    """Memory ran out in one of the processes that share a model, while the others wait for it."""


@contextmanager
def sparing(halvings: int) -> Iterator[int]:
    """Context: pieces begin with half of their samples, so many times.

    Contexts within each other add up, and each gives the sum.
    """
    token = _halvings.set(_halvings.get() + halvings)
    try:
        yield _halvings.get()
    finally:
        _halvings.reset(token)


class Pieces:
    """Samples go through ``model`` ``size`` at a time; where memory runs out, half of them from then on.

    Where one alone does not fit, ``recomputation`` begins, if there is one. Not so a model that several
    processes share: they have to run the same passes, so all of them begin with fewer (see ``sparing``).
    Where fewer samples at a time change what is found, ``effect`` says how.
    """

    def __init__(
        self,
        model: nn.Module,
        size: int,
        recomputation: Recomputation | None = None,
        effect: str = "gives the same result",
    ) -> None:
        self.model, self.size, self.recomputation, self.effect = model, size, recomputation, effect
        self.halvings = _halvings.get()

    def limit(self, count: int) -> int:
        """How many of ``count`` samples go through the model at a time."""
        return max(1, min(self.size, count) >> self.halvings)

    def run(self, work: Callable[[Sequence[Item]], Found], items: Sequence[Item]) -> Iterator[Found]:
        """Yield what ``work`` returns for the pieces of ``items``, in their order.

        Args:
            work: is called again for fewer items where it raises ``torch.OutOfMemoryError``, and must have
                changed nothing by then.

        Raises:
            torch.OutOfMemoryError: one item alone does not fit, or ``SplitOutOfMemoryError``.
        """
        start = 0
        while start < len(items):
            piece = items[start : start + self.limit(self.size)]
            found: list[Found] = []
            try:
                found.append(work(piece))
            except torch.OutOfMemoryError as error:
                self.check(len(piece), error)
            # Here, because the handler holds the frames of what failed, and these hold their tensors.
            if found:
                start += len(piece)
                yield found.pop()
            else:
                self.shrink(len(piece))

    def check(self, size: int, error: torch.OutOfMemoryError) -> None:
        """Raise unless this process can let ``size`` samples through the model in less memory."""
        if size > 1 and is_sharded(self.model):
            raise SplitOutOfMemoryError(
                f"{error} {size} samples at a time do not fit into the memory of this process. All processes "
                "that share a model have to run the same passes, so the run ends."
            ) from error
        is_left = self.recomputation is not None and not self.recomputation.runs
        if size == 1 and (not is_left or is_sharded(self.model)):
            raise error

    def shrink(self, size: int) -> None:
        """From now on take less memory than ``size`` samples did; say so, and free what can be."""
        if size > 1:
            self.size = -(-size // 2)
            logger.warning(
                "%d samples at a time do not fit into memory: from now on there are %d, which %s.",
                size, self.size, self.effect,
            )  # fmt: skip
        elif self.recomputation:
            self.recomputation.begin()
            logger.warning(
                "One sample alone does not fit into memory: from now on activations are computed again in "
                "the backward pass, which takes longer and gives the same result."
            )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
