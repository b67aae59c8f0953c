"""Teacher-forced forward passes, a few samples at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from neumuter.models.modes import without_dropout
from neumuter.models.pieces import Pieces
from neumuter.types import IGNORED, Batch, check_batch, check_model

Found = TypeVar("Found")

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


def in_parts(
    model: nn.Module, batch: Batch, work: Callable[[Batch], Found], rows: int = SAMPLES_PER_PASS
) -> Iterator[Found]:
    """Yield what ``work`` returns for parts of the batch, on the model's device.

    A part has ``rows`` samples, or fewer where these do not fit into memory.
    """
    check_model(model)
    check_batch("batch", batch)
    device = cast(torch.device, model.device)

    def run(numbers: Sequence[int]) -> Found:
        part = slice(numbers[0], numbers[-1] + 1)
        return work({key: value[part].to(device) for key, value in batch.items()})

    yield from Pieces(model, rows).run(run, range(len(batch["input_ids"])))


@torch.no_grad()
def predict(model: nn.Module, part: Batch) -> Tensor:
    """Run the model, without dropout, on a part of a batch; returns the logits [B, T, V]."""
    with without_dropout(model):
        output = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"], use_cache=False)
    logits: Tensor = output.logits
    return logits


def find_hits(model: nn.Module, batch: Batch, rows: int = SAMPLES_PER_PASS) -> tuple[Tensor, Tensor]:
    """Find which of the counted tokens are the most likely one given the true tokens before them.

    Returns:
        Two tensors, bool [B, T − 1], on the CPU: the tokens that count, and those of them that are the arg
        max.
    """

    def find(part: Batch) -> tuple[Tensor, Tensor]:
        counted = part["labels"][:, 1:] != IGNORED
        best = predict(model, part)[:, :-1].argmax(-1)
        return counted.cpu(), (counted & (best == part["labels"][:, 1:])).cpu()

    every, right = zip(*in_parts(model, batch, find, rows), strict=True)
    return torch.cat(every), torch.cat(right)
