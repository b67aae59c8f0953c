"""How long a job takes from here on, by the pace of its first passes through the model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from neumuter.evaluation import continue_texts, mean_token_loss
from neumuter.evaluation.examination import count_passes
from neumuter.evaluation.unseen import PASSES as UNSEEN_PASSES
from neumuter.preparing import SHOWN_TEXTS
from neumuter.recipes import Work
from neumuter.texts.encoding import count_tokens
from neumuter.types import Batch

# A backward pass takes about twice as long as the forward pass.
PASSES = 3


@dataclass(frozen=True)
class Look:
    """What a first look at the model found, and how long that took.

    loss: of the texts to keep, in nats. said: what ``continue_texts`` returns for the texts to forget.
    token: seconds that a token took on its way forward. continuation: seconds that a continuation took.
    """

    loss: float
    said: list[dict[str, str]]
    token: float
    continuation: float


def look_at(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, kept: Batch, asked: Batch) -> Look:
    """Take a first look at the model, as it is now: the loss of texts to keep, and a few continuations.

    Args:
        tokenizer: None continues nothing.
    """
    since = time.perf_counter()
    loss = mean_token_loss(model, kept)
    read = time.perf_counter()
    said = continue_texts(model, tokenizer, asked, SHOWN_TEXTS) if tokenizer else []
    continued = time.perf_counter()
    return Look(loss, said, (read - since) / count_tokens(kept), (continued - read) / max(1, len(said)))


def estimate_search(token: float, work: Work, done: int, kept: int) -> float:
    """Estimate the seconds that a search takes.

    Args:
        token: seconds that a token takes on its way forward.
        done: steps that were taken before. kept: tokens of all texts to keep, which go forward once.
    """
    return token * (PASSES * work.count_left(done) + kept)


def estimate_examination(look: Look, forms: Sequence[Batch] | None) -> float:
    """Estimate the seconds that ``examine`` takes, given the texts in all forms; None takes none."""
    if forms is None:
        return 0.0
    forward, continued = count_passes(forms)
    return look.token * forward + look.continuation * continued


def estimate_calibration(look: Look, batch: Batch) -> float:
    """Estimate the seconds that ``estimate_unseen`` takes for the texts to forget."""
    return look.token * UNSEEN_PASSES * count_tokens(batch)
