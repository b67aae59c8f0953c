"""How likely texts are to a model, and how far its predictions moved."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

import neumuter_kernels as nk
from neumuter.evaluation.passes import SAMPLES_PER_PASS, in_parts, predict
from neumuter.training.losses import predicting, token_losses
from neumuter.types import Batch


def mean_token_loss(model: nn.Module, batch: Batch, rows: int = SAMPLES_PER_PASS) -> float:
    """Compute the mean cross-entropy in nats over all counted tokens of the batch."""

    def add(part: Batch) -> tuple[float, int]:
        losses = token_losses(predict(model, part), part["labels"])
        return losses.double().sum().item(), len(losses)

    totals, counts = zip(*in_parts(model, batch, add, rows), strict=True)
    return float(sum(totals) / sum(counts))


def perplexity(model: nn.Module, batch: Batch, rows: int = SAMPLES_PER_PASS) -> float:
    """Compute exp of the mean token loss."""
    return math.exp(mean_token_loss(model, batch, rows))


def sample_losses(model: nn.Module, batch: Batch, rows: int = SAMPLES_PER_PASS) -> Tensor:
    """Compute each sample's mean loss in nats over its counted tokens: float64 [B]."""
    return torch.stack([losses.mean() for losses in losses_by_sample(model, batch, rows)])


def losses_by_sample(model: nn.Module, batch: Batch, rows: int = SAMPLES_PER_PASS) -> list[Tensor]:
    """Compute the losses in nats of each sample's counted tokens: a list of float64 [N] on the CPU."""

    def find(part: Batch) -> Sequence[Tensor]:
        losses = token_losses(predict(model, part), part["labels"]).double().cpu()
        parts: Sequence[Tensor] = losses.split(predicting(part["labels"]).sum(1).tolist())
        return parts

    return [losses for part in in_parts(model, batch, find, rows) for losses in part]


def refuse_nan(model: nn.Module, losses: Sequence[Tensor]) -> None:
    """Raise RuntimeError if losses are NaN: such a model says nothing, and so seems to have forgotten all."""
    if broken := sum(bool(of_text.isnan().any()) for of_text in losses):
        dtype = next(model.parameters()).dtype
        raise RuntimeError(
            f"the model predicts NaN on {broken} of {len(losses)} texts, so nothing can be said of what it "
            f"knows: its weights are damaged, or its dtype, {dtype}, is too narrow"
        )


def kl_to_original(
    model: nn.Module,
    original: nn.Module | Callable[[], AbstractContextManager[object]],
    batch: Batch,
    rows: int = SAMPLES_PER_PASS,
) -> float:
    """Compute KL(original ‖ model) in nats, the mean over the batch's counted tokens.

    Args:
        model: the model, as it is now.
        original: a model, or a function that returns a context in which ``model`` is the original one, such
            as ``Muted.off``.
        batch: input_ids, attention_mask and labels, int64 [B, T] each; −100 on tokens that do not count.
        rows: samples in one forward pass.
    """

    def add(part: Batch) -> tuple[float, int]:
        where = predicting(part["labels"])
        q = predict(model, part)[where].float()
        if isinstance(original, torch.nn.Module):
            p = predict(original, part)[where].float()
        else:
            with original():
                p = predict(model, part)[where].float()
        losses = nk.kl_divergence_(q.contiguous(), p)
        return losses.double().sum().item(), len(losses)

    totals, counts = zip(*in_parts(model, batch, add, rows), strict=True)
    return float(sum(totals) / sum(counts))
