"""The losses that mask training is made of. Padding never enters any of them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from neumuter.types import IGNORED

# Tokens in a row that are forgotten as a whole: they must not all come out.
LONGEST_RUN = 8
# The log-odds below which no run has to fall: it then comes out in one of a thousand answers.
LEAST_ODDS = -7.0
# The log-odds of a run's least likely token at which greedy decoding hardly says it.
GREEDY_ODDS = -1.0
# What each nat of a divergence adds to its weight. With 1 instead, what all neurons change in their first
# steps outweighs what is to be forgotten.
PER_NAT = 0.3


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

    The gradient of ln p vanishes as p goes to 1, so a text that is known by heart would hardly be seen; that
    of the log-odds with respect to the token's logit is 1 whatever p is. Where p is above 0.999, which
    rounding blurs, the tangent goes on.
    """
    certain = 1e-3
    inside = losses.clamp(min=certain)
    odds = -inside - torch.log(-torch.expm1(-inside))
    # Zero, and without a gradient, where nothing was clamped.
    beyond = (losses - inside) / -math.expm1(-certain)
    return odds - beyond


def odds_hinge(losses: Tensor, margin: float) -> Tensor:
    """Compute relu(margin + log-odds) of each token, given its loss: [N], of ``losses`` [N].

    Zero once the token's log-odds are at most −``margin``.
    """
    return F.relu(margin + log_odds(losses))


def hinge_runs(losses: Tensor, ceilings: Tensor, runs: Tensor, margin: float) -> Tensor:
    """Compute what is left to forget of each run, and what wording lacks: float [N].

    It stands at the first token of a run; 0 stands at the others.

    A run comes out with the product of the probabilities of its tokens. The hinge on its log-odds ends at
    those of the product that its ceilings allow, but no lower than ``LEAST_ODDS``; or at −``margin`` where
    nothing is known. Its gradient goes to the tokens in proportion to what they lack of certainty, so the
    run is forgotten where that is easiest.

    A run of likely tokens, of which none is certain, can have a small product, and greedy decoding says it
    all the same. So the log-odds of its least likely token have to fall to the lowest of its ceilings, but no
    lower than ``GREEDY_ODDS``. The larger of the two excesses counts. It is multiplied by the number of the
    run's tokens, so that a mean over tokens weighs each alike.

    A token with a ceiling above 0 must stay likelier than not. It costs what its log-odds lack of 0. Without
    that a fit may wreck the wording of a text to be rid of its secret.

    Args:
        losses: of the forget tokens, in nats [N].
        ceilings: the log-odds that each may keep, [N]; −∞ where nothing is known.
        runs: what ``find_runs`` gave, int64 [N].
        margin: nats.
    """
    ends = find_ends(ceilings, runs)
    odds, least = log_odds(sum_runs(losses, runs)), log_odds(largest_in_runs(losses, runs))
    over = odds - ends.masked_fill(ends.isneginf(), -margin)
    over = torch.maximum(over, least - (-largest_in_runs(-ceilings, runs)).clamp(min=GREEDY_ODDS))
    left = sum_runs(torch.ones_like(losses), runs) * F.relu(over)
    lost = F.relu(-odds).masked_fill(ceilings <= 0, 0)
    return (left + lost).masked_fill(~begin_runs(runs), 0)


def find_ends(ceilings: Tensor, runs: Tensor) -> Tensor:
    """Find the log-odds that each run may keep: [N], at its first token; −∞ where nothing is known.

    They are those of the product that its ceilings allow, but no lower than ``LEAST_ODDS``.
    """
    unknown = ceilings.isneginf()
    allowed = log_odds(sum_runs(-F.logsigmoid(ceilings.masked_fill(unknown, 0)), runs))
    return allowed.clamp(min=LEAST_ODDS).masked_fill(unknown, -torch.inf)


def weigh_harm(divergences: Tensor) -> Tensor:
    """Compute d·(1 + ``PER_NAT``·d) of each divergence d, in nats: [M], of ``divergences`` [M].

    One token that comes out differently ruins a text, and many that hardly changed do not. A mean over tokens
    tells them apart only if large divergences weigh more.
    """
    return divergences * (1 + PER_NAT * divergences)


def begin_runs(runs: Tensor) -> Tensor:
    """Mark the first token of each run: bool [N], of what ``find_runs`` gave."""
    return torch.cat([torch.ones_like(runs[:1]), runs.diff()]).bool()


def sum_runs(values: Tensor, runs: Tensor) -> Tensor:
    """Sum ``values`` [N] from each token to the end of its run: [N].

    Args:
        runs: what ``find_runs`` gave, int64 [N].
    """
    # It adds in the same order on every device.
    return _windows(values, runs, 0).sum(1)


def largest_in_runs(values: Tensor, runs: Tensor) -> Tensor:
    """Find the largest of ``values`` [N] from each token to the end of its run: [N].

    Args:
        runs: what ``find_runs`` gave, int64 [N].
    """
    return _windows(values, runs, -torch.inf).amax(1)


def _windows(values: Tensor, runs: Tensor, outside: float) -> Tensor:
    """Of each token its value and those behind it, [N, LONGEST_RUN]; ``outside`` where its run has ended."""
    windows, numbers = (
        F.pad(part, (0, LONGEST_RUN), value=-1).unfold(0, LONGEST_RUN, 1)[:-1] for part in (values, runs)
    )
    return windows.masked_fill(numbers != runs[:, None], outside)


def find_runs(places: Tensor, ceilings: Tensor) -> Tensor:
    """Number the runs of tokens, int64 [N].

    A run is a stretch of up to ``LONGEST_RUN`` neighbouring tokens that are known to identify a text, which
    are those that may keep log-odds below 0 alone; or of which nothing is known. Every other token is
    numbered for itself.

    Args:
        places: where the tokens are predicted, int64 [N]: neighbours differ by 1, texts by more.
        ceilings: the log-odds that each may keep, [N]; −∞ where nothing is known.
    """
    forgotten, unknown = ceilings < 0, ceilings.isneginf()
    starts = torch.ones_like(forgotten)
    alike = forgotten[1:] & forgotten[:-1] & (unknown[1:] == unknown[:-1])
    starts[1:] = ~(alike & (places.diff() == 1))
    numbers = torch.arange(len(starts), device=starts.device)
    starts |= (numbers - (numbers * starts).cummax(0).values) % LONGEST_RUN == 0
    return starts.cumsum(0) - 1
