"""How many steps a search takes, and which samples they have: so many that every text is visited."""

from math import ceil

from neumuter.training.batches import PairedBatches
from neumuter.training.sources import InTurn

# The steps of a phase, where nothing else is asked for: enough to visit each forget sample this many times,
# within these bounds.
VISITS = 40
LEAST_STEPS, MOST_STEPS = 160, 1280
# Where the most steps do not visit every sample: visits, as a multiple of the forget samples.
ROUNDS = 1.25


def count_steps(forget_count: int, steps: int | None, batch_size: int | None) -> int:
    """Count the steps of a phase: ``steps`` if they are given, else enough for so many forget samples."""
    if steps is not None:
        return steps
    if batch_size is None:
        return LEAST_STEPS
    once = forget_count / batch_size
    return ceil(max(LEAST_STEPS, min(VISITS * once, MOST_STEPS), ROUNDS * once))


def count_unvisited(forget_count: int, steps: int | None, batch_size: int | None) -> int:
    """Count the forget samples that no step of a phase has."""
    if batch_size is None:
        return 0
    return max(0, forget_count - count_steps(forget_count, steps, batch_size) * batch_size)


def choose_samples(pair: PairedBatches, batch_size: int | None, seed: int) -> InTurn:
    """Choose which samples each step has; of many, those that are still known come more often."""
    many = count_steps(pair.forget_count, None, batch_size) > LEAST_STEPS
    return pair.hard_first(batch_size, seed) if many else pair.steps(batch_size, seed)
