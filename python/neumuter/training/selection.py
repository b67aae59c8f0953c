"""Which neurons are selected by their scores, and how many."""

from neumuter_kernels import neuron_budget


class NothingSelectedError(ValueError):
    """No neuron is selected, or only neurons whose gates are open."""


def neuron_count(budget: int | float, total: int) -> int:
    """Count the neurons of ``budget`` out of ``total``.

    A float in (0, 1] is a share, rounded down but at least one neuron; an int is the count.

    Raises:
        TypeError, ValueError: anything else.
    """
    count = neuron_budget(budget, total)
    if isinstance(budget, float):
        count = max(1, count)
    if not 1 <= count <= total:
        raise ValueError(f"budget as a count must be from 1 to {total} neurons, got {budget!r}")
    return count
