"""Which samples a step has."""

from collections.abc import Iterator

import torch


def shuffled(start: int, count: int, generator: torch.Generator) -> Iterator[int]:
    """Yield start … start + count − 1 without end, in a new random order each time round."""
    while True:
        yield from (start + torch.randperm(count, generator=generator)).tolist()
