"""Batches of ours from samples of open-unlearning."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from neumuter.texts.encoding import PADDING
from neumuter.types import Batch


def batch_of(samples: Sequence[dict[str, Tensor]]) -> Batch:
    """The samples as a batch, {"input_ids", "attention_mask", "labels"}, int64 [B, T] each, padded right.

    Their collators are left alone: some pad on the left, and they call every pad token padding, even where it
    is the end token of the text itself.

    ``samples``: dicts with ``input_ids`` and ``labels``, int64 [T], −100 where a token does not count.
    """
    rows = [sample | {"attention_mask": torch.ones_like(sample["input_ids"])} for sample in samples]
    return {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in PADDING.items()
    }
