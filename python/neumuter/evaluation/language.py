"""How likely texts are to a model, and how far its predictions moved."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

import neumuter_kernels as nk
from neumuter.evaluation.passes import ROWS, parts, predictions
from neumuter.training.losses import predicting, token_losses
from neumuter.types import Batch


def mean_token_loss(model: nn.Module, batch: Batch, rows: int = ROWS) -> float:
    """Mean cross-entropy in nats over all counted tokens of the batch."""
    total, count = 0.0, 0
    for part in parts(model, batch, rows):
        losses = token_losses(predictions(model, part), part["labels"])
        total, count = total + losses.double().sum().item(), count + len(losses)
    return total / count


def perplexity(model: nn.Module, batch: Batch, rows: int = ROWS) -> float:
    """exp of the mean token loss, ``rows`` samples at a time."""
    return math.exp(mean_token_loss(model, batch, rows))


def sample_losses(model: nn.Module, batch: Batch, rows: int = ROWS) -> Tensor:
    """Each sample's mean loss in nats over its counted tokens: float64 [B]."""
    return torch.stack([losses.mean() for losses in losses_by_sample(model, batch, rows)])


def losses_by_sample(model: nn.Module, batch: Batch, rows: int = ROWS) -> list[Tensor]:
    """The losses in nats of each sample's counted tokens, a list of float64 [N] on the CPU."""
    found = []
    for part in parts(model, batch, rows):
        counts = predicting(part["labels"]).sum(1).tolist()
        found += token_losses(predictions(model, part), part["labels"]).double().cpu().split(counts)
    return found


def kl_to_original(
    model: nn.Module,
    original: nn.Module | Callable[[], AbstractContextManager[object]],
    batch: Batch,
    rows: int = ROWS,
) -> float:
    """KL(original ‖ model) in nats, the mean over the batch's counted tokens.

    ``original``: a model, or a function that returns a context in which ``model`` is the original one, such
    as ``Muted.off``.
    """
    total, count = 0.0, 0
    for part in parts(model, batch, rows):
        where = predicting(part["labels"])
        q = predictions(model, part)[where].float()
        if isinstance(original, torch.nn.Module):
            p = predictions(original, part)[where].float()
        else:
            with original():
                p = predictions(model, part)[where].float()
        losses = nk.kl_divergence_(q.contiguous(), p)
        total, count = total + losses.double().sum().item(), count + len(losses)
    return total / count
