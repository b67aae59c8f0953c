"""Which samples a step has: all in turn, or first those that are the hardest to forget."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

# The weight of a sample that is forgotten, where that of one known by heart is 1.
LEAST_WEIGHT = 0.03
# Of more samples than these, some are proposed at a time and accepted by their weights: to weigh all of them
# takes longer the more there are, and torch draws from 2**24 at most.
WEIGHED, PROPOSED = 4096, 256


@runtime_checkable
class Watching(Protocol):
    """A source of samples that is told now and then how well the forget samples are still known."""

    def see(self, log_odds: Tensor) -> object:
        """``log_odds``: see ``Step.log_odds``, on the CPU."""


class Shuffled:
    """Yields first … first + count − 1 without end, in a new random order each time round.

    ``left``: what is still to come of this round, the last one first: int32 [n], four bytes of each.
    """

    def __init__(self, first: int, count: int, generator: torch.Generator) -> None:
        self.first, self.count, self.generator = first, count, generator
        self.left = torch.empty(0, dtype=torch.int32)

    def __iter__(self) -> "Shuffled":
        return self

    def __next__(self) -> int:
        if not len(self.left):
            order = torch.randperm(self.count, generator=self.generator)
            self.left = (self.first + order).flip(0).int()
        number, self.left = int(self.left[-1]), self.left[:-1]
        return number


class InTurn:
    """Yields the sample ids of each step without end, forget samples first.

    Each kind goes round in a new random order each time.

    Args:
        forget_count, retain_count: the number of samples of each kind.
        batch_size: samples of each kind in a step; None takes all.
        seed: the same seed gives the same steps.

    Raises:
        ValueError: batch_size is below 1.
    """

    def __init__(self, forget_count: int, retain_count: int, batch_size: int | None, seed: int) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, or None for all samples, got {batch_size}")
        self.forget_count, self.retain_count, self.batch_size = forget_count, retain_count, batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._forget = Shuffled(0, forget_count, self._generator)
        self._retain = Shuffled(forget_count, retain_count, self._generator)

    def __iter__(self) -> "InTurn":
        return self

    def __next__(self) -> list[int]:
        size = self.batch_size
        if size is None:
            return list(range(self.forget_count + self.retain_count))
        forget = self._draw(min(size, self.forget_count))
        return forget + [next(self._retain) for _ in range(min(size, self.retain_count))]

    def _draw(self, count: int) -> list[int]:
        """Draw the forget samples of a step."""
        return [next(self._forget) for _ in range(count)]

    def state(self) -> dict[str, Any]:
        """What a source with the same arguments needs to go on from here: tensors and numbers."""
        left = [queue.left.clone() for queue in (self._forget, self._retain)]
        return {"generator": self._generator.get_state(), "left": left}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` returned."""
        self._generator.set_state(state["generator"])
        self._forget.left, self._retain.left = (left.clone() for left in state["left"])


class HardFirst(InTurn):
    """Yields like ``InTurn``, but forget samples that are still known come more often than others.

    After one round of all forget samples, a step draws its own without replacement, with a probability
    proportional to σ(1 + log-odds), at least ``LEAST_WEIGHT``. The log-odds (see ``Step.log_odds``) are those
    of when a sample was last in a step that ``Step.take`` has read: on a GPU, which is read every 16
    steps, they are up to 16 steps old, in addition to the steps in which the sample was not drawn. A sample
    that was not read yet counts as known by heart. What a draw takes does not grow with the samples.

    Args:
        forget_count, retain_count, batch_size, seed: see ``InTurn``.
    """

    def __init__(self, forget_count: int, retain_count: int, batch_size: int | None, seed: int) -> None:
        super().__init__(forget_count, retain_count, batch_size, seed)
        self._fresh = forget_count
        self._log_odds = torch.full([forget_count], torch.inf)

    def see(self, log_odds: Tensor) -> None:
        """Take over log-odds, float32 [forget_count] on the CPU; NaN where a sample was not seen."""
        self._log_odds = torch.where(log_odds.isnan(), self._log_odds, log_odds)

    def _draw(self, count: int) -> list[int]:
        drawn = super()._draw(min(count, self._fresh))
        self._fresh -= len(drawn)
        if len(drawn) == count:
            return drawn
        if self.forget_count > WEIGHED:
            return self._accept(drawn, count)
        weights = _weigh(self._log_odds)
        weights[drawn] = 0
        return drawn + torch.multinomial(weights, count - len(drawn), generator=self._generator).tolist()

    def _accept(self, drawn: list[int], count: int) -> list[int]:
        """Go on from ``drawn`` to ``count`` samples by rejection, with the chances of ``multinomial``."""
        found = dict.fromkeys(drawn)
        while len(found) < count:
            proposed = torch.randint(self.forget_count, [PROPOSED], generator=self._generator)
            chances = torch.rand(PROPOSED, generator=self._generator)
            # What was drawn before stays where it is.
            found |= dict.fromkeys(proposed[chances < _weigh(self._log_odds[proposed])].tolist())
        return list(found)[:count]

    def state(self) -> dict[str, Any]:
        return super().state() | {"fresh": self._fresh, "log_odds": self._log_odds.clone()}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._fresh = state["fresh"]
        self._log_odds = state["log_odds"].clone()


def _weigh(log_odds: Tensor) -> Tensor:
    """How likely samples of these log-odds are drawn, compared with one known by heart."""
    return (1 + log_odds).sigmoid().clamp(min=LEAST_WEIGHT)
