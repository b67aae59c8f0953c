"""Can one tell that texts were trained on? Attacks that rank texts by how likely they are."""

import math

import torch
from torch import Tensor, nn

from neumuter.evaluation.language import losses_by_sample
from neumuter.types import Batch

LOWEST = 0.4  # share of a text's tokens that Min-k% looks at


def min_k_scores(model: nn.Module, batch: Batch, k: float = LOWEST) -> Tensor:
    """Each sample's mean log-probability over its ⌈k·N⌉ least likely counted tokens: float64 [B].

    Members have higher scores (Shi et al. 2024, *Detecting Pretraining Data*). k = 1 is the LOSS attack of
    Yeom et al. 2018.
    """
    if not 0 < k <= 1:
        raise ValueError(f"k must lie in (0, 1], got {k}")
    scores = []
    for losses in losses_by_sample(model, batch):
        count = max(1, math.ceil(k * len(losses)))
        scores.append(-losses.topk(count).values.mean())
    return torch.stack(scores)


def auc(members: Tensor, others: Tensor) -> float:
    """The probability that a member's score is above another's, ties counted half: in [0, 1].

    ``members``: [N], ``others``: [M], any floats. 0.5 means that the attack sees nothing.
    """
    if not len(members) or not len(others):
        raise ValueError("auc needs at least one score of each kind")
    difference = members[:, None] - others[None]
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean().item()


def privacy_leakage(forget_auc: float, retrained_auc: float = 0.5) -> float:
    """PrivLeak in % (Shi et al. 2024, *MUSE*): (s − r)/r·100, s = 1 − AUC of the model, r of a retrained one.

    Both AUCs are between forget and held-out texts. 0 is right; below 0 the texts still look like members,
    above they look less like members than texts that were never seen. Without a retrained model, 0.5 is
    what an attack on it would get.
    """
    s, r = 1 - forget_auc, 1 - retrained_auc
    return math.inf if r == 0 else (s - r) / r * 100
