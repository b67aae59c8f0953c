"""The losses that mask training is made of. Padding never enters any of them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from neumuter.types import IGNORED

# Tokens in a row that give a text away: one of them must not come out.
LONGEST_RUN = 8
# What a token that is forgotten as far as the margin still weighs, on its way to its ceiling.
BEYOND = 0.3


def predicting(labels: Tensor) -> Tensor:
    """Mark where a counted token is predicted: bool [B, T], true at t if ``labels[:, t + 1]`` is not −100.

    Indexing logits [B, T, V] with it gives [N, V], for N counted tokens in row-major order.
    """
    counted = torch.zeros_like(labels, dtype=torch.bool)
    counted[:, :-1] = labels[:, 1:] != IGNORED
    return counted


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross-entropy in nats of each counted token, float32 [N], row by row.

    The first token of a row has no prediction and never counts.

    Args:
        logits: [B, T, V], any float dtype.
        labels: int64 [B, T], −100 on tokens that do not count.
    """
    where = predicting(labels)
    targets = labels[:, 1:][labels[:, 1:] != IGNORED]
    return F.cross_entropy(logits[where].float(), targets, reduction="none")


def hinge(losses: Tensor, margin: float) -> Tensor:
    """Compute relu(margin − loss) of each of ``losses`` [N]: zero once the token costs ``margin`` nats.

    Ascending a cross-entropy has no end and wrecks the model; this stops where the token is no
    longer predicted.
    """
    return F.relu(margin - losses)


def log_odds(losses: Tensor) -> Tensor:
    """Compute ln(p / (1 − p)) of each token, given its loss −ln p: [N], of ``losses`` [N].

    Where p is above 0.999, which rounding blurs, the tangent goes on.
    """
    certain = 1e-3
    inside = losses.clamp(min=certain)
    odds = -inside - torch.log(-torch.expm1(-inside))
    # Zero, and without a gradient, where nothing was clamped.
    beyond = (losses - inside) / -math.expm1(-certain)
    return odds - beyond


def odds_hinge(losses: Tensor, margin: float, ceilings: Tensor | None = None) -> Tensor:
    """Compute relu(margin + log-odds) of each token, given its loss: [N], of ``losses`` [N].

    Zero once the token's log-odds are at most −``margin``. The gradient of ln p vanishes as p goes to 1,
    so a text that is known by heart would hardly be seen; that of the log-odds with respect to the token's
    logit is 1 whatever p is.

    Args:
        ceilings: the log-odds that each token may keep, [N]; −∞ where nothing is known; None: nowhere. Above
            −margin the hinge ends there. Below, it goes on to there with the slope ``BEYOND``.
    """
    odds = log_odds(losses)
    if ceilings is None:
        return F.relu(margin + odds)
    floors = ceilings.clamp(min=-margin)
    further = torch.minimum(odds, floors) - torch.where(ceilings.isfinite(), ceilings, floors)
    return F.relu(odds - floors) + BEYOND * F.relu(further)


def weigh_runs(odds: Tensor, runs: Tensor) -> Tensor:
    """Weigh the tokens of each run so that those nearest to being forgotten count most: float32 [N].

    A run cannot come out once one of its tokens does not, so forgetting all of them alike costs more than it
    has to. The weights are softmax(−log-odds) over the run, times its length: 1 of a token for itself.

    Args:
        odds: the log-odds of the forget tokens, float [N].
        runs: what ``find_runs`` gave, int64 [N].
    """
    # As whole numbers, whose sum does not depend on the order in which a device adds them.
    parts = ((find_nearest(odds, runs) - odds).exp() * 2**32).long()
    sums = torch.zeros_like(parts).scatter_add(0, runs, parts)
    sizes = torch.zeros_like(parts).scatter_add(0, runs, torch.ones_like(parts))
    return (parts.double() / sums[runs] * sizes[runs]).to(odds.dtype)


def find_nearest(odds: Tensor, runs: Tensor) -> Tensor:
    """For each token the lowest log-odds of its run, [N], of ``odds`` [N] and what ``find_runs`` gave."""
    lowest = torch.full_like(odds, torch.inf).scatter_reduce(0, runs, odds, "amin")
    return lowest[runs]


def find_runs(places: Tensor, ceilings: Tensor) -> Tensor:
    """Number the runs of tokens, int64 [N].

    A run is a stretch of up to ``LONGEST_RUN`` neighbouring tokens that are known to identify a text: those
    that may keep log-odds below 0 alone. Every other token is numbered for itself.

    Args:
        places: where the tokens are predicted, int64 [N]: neighbours differ by 1, texts by more.
        ceilings: the log-odds that each may keep, [N]; −∞ where nothing is known.
    """
    identifies = (ceilings < 0) & ceilings.isfinite()
    starts = torch.ones_like(identifies)
    starts[1:] = ~(identifies[1:] & identifies[:-1] & (places.diff() == 1))
    numbers = torch.arange(len(starts), device=starts.device)
    starts |= (numbers - (numbers * starts).cummax(0).values) % LONGEST_RUN == 0
    return starts.cumsum(0) - 1
