"""What stays of a request so that later ones do not bring its texts back: slopes, and no text.

What is forgotten is single tokens, or runs of tokens that identify a text, which come out with the product of
their probabilities. A slope is the derivative of the log-odds of one of these with respect to the gain of one
neuron. With the log-odds l at the gains g, and the slopes s, its log-odds at other gains m are about
l + Σ s·(m − g).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from neumuter.files import PathLike
from neumuter.mutes.container import read_file, write_file
from neumuter.mutes.mute_set import MuteSet

ENTRY = "neumuter-slopes"
TENSORS = {
    "log_odds": torch.float32,
    "ceilings": torch.float32,
    "weights": torch.float32,
    "scales": torch.float32,
    "steps": torch.int8,
}
MAX_LOG_ODDS = 1e6


@dataclass(frozen=True, eq=False)
class Slopes:
    """The slopes of the N forgotten tokens and runs of one request, for the K neurons that matter most.

    They are made of the texts, and can tell whether a text was among them: keep them like the texts.

    Args:
        at: the K neurons, with the gains that they had when the slopes were measured: 1 where a neuron was
            not muted. It binds the slopes to the model.
        log_odds: of the tokens or runs at these gains, float32 [N] in nats.
        ceilings: the log-odds that each may keep, float32 [N]; −∞ where that is not known.
        weights: the share that each has of the tokens of the request that count, float32 [N] in (0, 1].
        scales: float32 [N], positive. steps: int8 [N, K]. The slope of i by neuron k, in the order of
            ``at.layers``, is ``scales[i] * steps[i, k]``.

    Raises:
        ValueError: anything in it is not as described.
    """

    at: MuteSet
    log_odds: Tensor
    ceilings: Tensor
    weights: Tensor
    scales: Tensor
    steps: Tensor

    def __post_init__(self) -> None:
        tokens = len(self.log_odds) if self.log_odds.dim() else 0
        shapes = dict.fromkeys(TENSORS, (tokens,)) | {"steps": (tokens, self.at.count)}
        for name, dtype in TENSORS.items():
            value = getattr(self, name)
            if value.dtype != dtype or value.shape != shapes[name] or value.device.type != "cpu":
                raise ValueError(
                    f"{name} must be {dtype} {shapes[name]} on the CPU, got {value.dtype} "
                    f"{tuple(value.shape)} on {value.device}"
                )
        if not tokens:
            raise ValueError("there is no token: log_odds is empty")
        if not (self.log_odds.abs() <= MAX_LOG_ODDS).all():
            raise ValueError(f"log_odds must lie within -{MAX_LOG_ODDS:g} to {MAX_LOG_ODDS:g}")
        if (self.ceilings.isnan() | (self.ceilings > MAX_LOG_ODDS)).any():
            raise ValueError(f"ceilings must be at most {MAX_LOG_ODDS:g}, or -inf")
        if not ((self.weights > 0) & (self.weights <= 1)).all():
            raise ValueError("weights must lie within 0 to 1, and be positive")
        if not ((self.scales > 0) & (self.scales <= MAX_LOG_ODDS)).all():
            raise ValueError(f"scales must be positive and at most {MAX_LOG_ODDS:g}")

    def __repr__(self) -> str:
        return f"Slopes({len(self.log_odds)} tokens and runs by {self.at.count} neurons)"

    @property
    def values(self) -> Tensor:
        """The slopes themselves, float32 [N, K]."""
        return self.scales[:, None] * self.steps

    def save(self, path: PathLike) -> None:
        """Write a file that its owner alone may read, whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        tensors, metadata = self.at.contents()
        tensors |= {name: getattr(self, name).contiguous() for name in TENSORS}
        write_file(path, tensors, ENTRY, metadata, private=True)

    @classmethod
    def load(cls, path: PathLike) -> Slopes:
        """Read and fully validate a file of slopes.

        Raises:
            MuteFileError: the file is anything else.
            OSError: the file cannot be read.
        """

        def read(file: Any, metadata: dict[str, Any]) -> Slopes:
            at = MuteSet.from_contents(file, metadata, tuple(TENSORS))
            return cls(at, **{name: file.get_tensor(name).clone() for name in TENSORS})

        return read_file(path, "file of slopes", ENTRY, read)


# Slopes, or the path of a file of them.
SlopesSource = Slopes | PathLike


def check_listed(former: object) -> None:
    """Raise TypeError if ``former`` is a single one, not in a list."""
    if isinstance(former, Slopes | str | os.PathLike):
        raise TypeError(f"former must be a list of slopes or of their files, got {former!r:.80}")


def load_slopes(former: Sequence[SlopesSource]) -> list[Slopes]:
    """Return each of ``former`` as ``Slopes``, given that or the path of a file.

    Raises:
        TypeError: ``former`` is a single one, not in a list.
        ValueError: two are of the same request.
    """
    check_listed(former)
    found = [slopes if isinstance(slopes, Slopes) else Slopes.load(slopes) for slopes in former]
    for (first, one), (second, other) in combinations(enumerate(found, 1), 2):
        if torch.equal(one.log_odds, other.log_odds) and torch.equal(one.steps, other.steps):
            raise ValueError(f"slopes {first} and {second} are the same: give those of each request once")
    return found
