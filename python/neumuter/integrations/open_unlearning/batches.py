"""Batches of ours from samples and collators of open-unlearning."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from neumuter.types import Batch


def batch_of(
    samples: Sequence[dict[str, Tensor]], collator: Callable[[Sequence[dict[str, Tensor]]], Batch]
) -> Batch:
    """The samples as a batch, {"input_ids", "attention_mask", "labels"}, int64 [B, T] each, padded right.

    ``samples``: dicts with ``input_ids`` and ``labels``, int64 [T], −100 where a token does not count.
    ``collator``: makes a batch of them, padded on the right.
    """
    batch = collator(samples)
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    # Their collators call every pad token padding, even where it is the end token of the text itself.
    shown = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
    return {"input_ids": batch["input_ids"], "attention_mask": shown.long(), "labels": batch["labels"]}
