"""Teacher-forced forward passes, a few samples at a time."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from neumuter.types import IGNORED, Batch, check_batch, check_model

SAMPLES_PER_PASS = 16
# Of a text that counts from its start on, this share is the prompt. So many tokens before those that count
# are start tokens, not a prompt.
PROMPT_SHARE, START_TOKENS = 1 / 3, 2


def find_prompt_ends(batch: Batch) -> list[int]:
    """Find how many tokens of each text are its prompt: those before its first counted token.

    Of a text that counts from its first three tokens on, the first third is the prompt: what is before them
    are start tokens.
    """
    check_batch("batch", batch)
    ends = []
    for labels, shown in zip(batch["labels"], batch["attention_mask"], strict=True):
        counted = (labels != IGNORED).nonzero().flatten()
        start = int(counted[0]) if len(counted) else len(labels)
        third = max(1, int(int(shown.sum()) * PROMPT_SHARE))
        ends.append(start if start > START_TOKENS else max(start, third))
    return ends


def count_after_prompts(batch: Batch) -> Batch:
    """Return the batch with labels behind the prompts of ``find_prompt_ends`` alone."""
    ends = torch.tensor(find_prompt_ends(batch))
    before = torch.arange(batch["labels"].shape[1]) < ends[:, None]
    return batch | {"labels": batch["labels"].masked_fill(before.to(batch["labels"].device), IGNORED)}


def split_batch(model: nn.Module, batch: Batch, rows: int = SAMPLES_PER_PASS) -> Iterator[Batch]:
    """Yield the batch in parts of ``rows`` samples, on the model's device."""
    check_model(model)
    check_batch("batch", batch)
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
