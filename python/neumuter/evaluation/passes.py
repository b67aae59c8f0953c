"""Teacher-forced forward passes, a few samples at a time."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from neumuter.types import IGNORED, Batch

SAMPLES_PER_PASS = 16


def split_batch(model: nn.Module, batch: Batch, rows: int = SAMPLES_PER_PASS) -> Iterator[Batch]:
    """Yield the batch in parts of ``rows`` samples, on the model's device."""
    device = cast(torch.device, model.device)
    for start in range(0, len(batch["input_ids"]), rows):
        yield {key: value[start : start + rows].to(device) for key, value in batch.items()}


@torch.no_grad()
def predict(model: nn.Module, part: Batch) -> Tensor:
    """Run the model on a part of a batch; returns the logits [B, T, V]."""
    output = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"], use_cache=False)
    logits: Tensor = output.logits
    return logits


def find_hits(model: nn.Module, batch: Batch, rows: int = SAMPLES_PER_PASS) -> tuple[Tensor, Tensor]:
    """Find which of the counted tokens are the most likely one given the true tokens before them.

    Returns:
        Two tensors, bool [B, T − 1], on the CPU: the tokens that count, and those of them that are the arg
        max.
    """
    found = []
    for part in split_batch(model, batch, rows):
        counted = part["labels"][:, 1:] != IGNORED
        best = predict(model, part)[:, :-1].argmax(-1)
        found.append((counted.cpu(), (counted & (best == part["labels"][:, 1:])).cpu()))
    every, right = zip(*found, strict=True)
    return torch.cat(every), torch.cat(right)
