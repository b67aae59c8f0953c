"""Can one tell that texts were trained on? Attacks that rank texts by how likely they are."""

import math

import torch
from torch import Tensor, nn

from neumuter.evaluation.language import losses_by_sample
from neumuter.types import Batch

# Min-k% looks at this share of the tokens of a text.
LOWEST_SHARE = 0.4


def min_k_scores(model: nn.Module, batch: Batch, k: float = LOWEST_SHARE) -> Tensor:
    """Compute each sample's mean log-probability over its ⌈k·N⌉ least likely counted tokens: float64 [B].

    Members have higher scores (Shi et al. 2024, *Detecting Pretraining Data*). k = 1 is the LOSS attack of
    Yeom et al. 2018.

    Raises:
        ValueError: ``k`` lies outside of (0, 1].
    """
    if not 0 < k <= 1:
        raise ValueError(f"k must lie in (0, 1], got {k}")
    scores = [min_k_score(losses, k) for losses in losses_by_sample(model, batch)]
    return torch.tensor(scores, dtype=torch.float64)


def min_k_score(losses: Tensor, k: float = LOWEST_SHARE) -> float:
    """Compute the score of one text from its token losses, [N] in nats; see ``min_k_scores``."""
    count = max(1, math.ceil(k * len(losses)))
    return -losses.topk(count).values.mean().item()


def auc(members: Tensor, others: Tensor) -> float:
    """Compute the probability that a member's score is above another text's; a tie counts half.

    Args:
        members: scores of texts that were trained on, any float dtype, [N].
        others: scores of texts that were not, [M].

    Returns:
        A float in [0, 1]; 0.5 means that the attack sees nothing.

    Raises:
        ValueError: there are no scores of one kind.
    """
    if not len(members) or not len(others):
        raise ValueError("auc needs at least one score of each kind")
    difference = members[:, None] - others[None]
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean().item()


def privacy_leakage(forget_auc: float, retrained_auc: float = 0.5) -> float:
    """Compute PrivLeak in %: (s − r)/r·100, where s is 1 − AUC of the model and r that of a retrained one.

    0 is right. Below 0 the texts still look like members; above 0 they look less like members than texts
    that were never seen. Source: Shi et al. 2024, *MUSE*.

    Args:
        forget_auc: AUC between the forget and held-out texts, in [0, 1].
        retrained_auc: the same of a retrained model. Without one, 0.5 is what an attack on it would get.
    """
    s, r = 1 - forget_auc, 1 - retrained_auc
    return math.inf if r == 0 else (s - r) / r * 100
