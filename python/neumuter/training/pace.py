"""How long a step takes in each layout, by the data sheets of a GPU and of what joins GPUs.

Arithmetic, memory and links run at full speed, and caches do not count. The times are there to compare
layouts: nobody has measured them.
"""

from dataclasses import dataclass
from typing import NamedTuple

from neumuter.training.tracing import Trace


class Card(NamedTuple):
    """Dense 16-bit FLOP/s, and bytes/s: of memory, and to the other GPUs of the same machine."""

    flops: float
    memory: float
    link: float


CARDS = {
    "A100": Card(312e12, 2.04e12, 300e9),
    "H100": Card(989e12, 3.35e12, 450e9),
    "H200": Card(989e12, 4.8e12, 450e9),
    "B200": Card(2250e12, 8.0e12, 900e9),
    "MI300X": Card(1307e12, 5.3e12, 448e9),
}
# The card that times are for, unless it is said which.
CARD = "H100"
# Bytes/s of a GPU to other machines: a port of 400 Gbit/s each.
PORT = 50e9


class Group(NamedTuple):
    """Devices that communicate: ``size`` of them, of which a machine has ``local``."""

    size: int
    local: int

    def seconds(self, transferred: float, card: Card) -> float:
        """How long a device takes to get the parts of the others of so many bytes."""
        joined = card.link if self.local == self.size else min(card.link, self.local * PORT)
        return transferred * (self.size - 1) / self.size / joined


ALONE = Group(1, 1)


@dataclass(frozen=True)
class Work:
    """What a device does in a step, as a trace has it.

    samples: of each kind that were traced. passes: how often the weights are read.
    """

    flops: float
    moved: float
    reduced: float
    weights: float
    samples: int
    passes: int

    @classmethod
    def of(cls, found: Trace, samples: int, recompute: bool) -> "Work":
        passes = 3 if recompute else 2
        return cls(found.flops, found.moved, found.reduced, found.weights, samples, passes)

    def seconds(self, card: Card, samples: int, gathered: Group = ALONE, reduced: Group = ALONE) -> float:
        """The time of a step with so many samples of each kind.

        Args:
            gathered: the devices from which weights are gathered, while others are computed with.
            reduced: the devices that sum activations, for which all wait.
        """
        part, read = samples / self.samples, self.passes * self.weights
        moved = read + max(self.moved - read, 0.0) * part
        own = max(self.flops * part / card.flops, moved / card.memory)
        # A sum goes around twice, and weights are gathered forward and backward.
        waiting = reduced.seconds(2 * self.reduced * part, card)
        return max(own + waiting, gathered.seconds(2 * self.weights, card))
