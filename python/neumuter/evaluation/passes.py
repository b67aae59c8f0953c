"""Teacher-forced forward passes, a few samples at a time."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from neumuter.types import IGNORED, Batch

ROWS = 16  # samples a forward pass


def parts(model: nn.Module, batch: Batch, rows: int = ROWS) -> Iterator[Batch]:
    """The batch in parts of ``rows`` samples, on the model's device."""
    device = cast(torch.device, model.device)
    for start in range(0, len(batch["input_ids"]), rows):
        yield {key: value[start : start + rows].to(device) for key, value in batch.items()}


@torch.no_grad()
def predictions(model: nn.Module, part: Batch) -> Tensor:
    """Logits [B, T, V] of a part."""
    output = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"], use_cache=False)
    logits: Tensor = output.logits
    return logits


def hits(model: nn.Module, batch: Batch, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Two bool tensors [B, T − 1] on the CPU: which tokens count, and which of them are the most likely."""
    found = []
    for part in parts(model, batch, rows):
        counted = part["labels"][:, 1:] != IGNORED
        best = predictions(model, part)[:, :-1].argmax(-1)
        found.append((counted.cpu(), (counted & (best == part["labels"][:, 1:])).cpu()))
    every, right = zip(*found, strict=True)
    return torch.cat(every), torch.cat(right)
