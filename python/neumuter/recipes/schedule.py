"""How many steps a search takes, and which samples they have: so many that every text is visited."""

from math import ceil

from neumuter.training.batches import PairedBatches
from neumuter.training.sources import InTurn

# The steps of a phase, where nothing else is asked for and these visit every forget sample.
STEPS = 80
# Where they do not: visits, as a multiple of the forget samples. What comes after the first round goes to
# those that are still known.
ROUNDS = 1.25


def count_steps(pair: PairedBatches, steps: int | None, batch_size: int | None) -> int:
    """Count the steps of a phase: ``steps`` if they are given, else as many as it takes."""
    if steps is not None:
        return steps
    if batch_size is None or not _is_large(pair, batch_size):
        return STEPS
    return ceil(ROUNDS * pair.forget_count / batch_size)


def choose_samples(pair: PairedBatches, steps: int | None, batch_size: int | None, seed: int) -> InTurn:
    """Choose which samples each step has; where steps were added, those that are known come more often."""
    large = steps is None and batch_size is not None and _is_large(pair, batch_size)
    return pair.hard_first(batch_size, seed) if large else pair.steps(batch_size, seed)


def _is_large(pair: PairedBatches, batch_size: int) -> bool:
    return pair.forget_count > STEPS * batch_size
