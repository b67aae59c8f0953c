"""Batches of token ids from texts."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from neumuter.types import IGNORED, Batch, Chat, Text

# What fills a shorter row of each tensor of a batch.
PADDING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}


def encode(texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Batch:
    """Encode texts as one batch, padded on the right to the longest.

    Special tokens at the start are the tokenizer's own; a prompt and its completion are tokenised apart, as
    in generation.

    Args:
        texts: as ``read_texts`` returns them.
        max_length: tokens that a text is cut to.

    Returns:
        {"input_ids", "attention_mask", "labels"}, int64 [B, T] each. Labels are the ids, −100 on padding and
        on prompts.

    Raises:
        ValueError: a text has no token that can be predicted, because it has only one token or its prompt
            fills ``max_length``. The message names the text by its number from 1.
    """
    rows = []
    for number, text in enumerate(texts, 1):
        start, ids = 0, []
        if isinstance(text, str):
            ids = tokenizer(text)["input_ids"]
        else:
            chat = isinstance(text, Chat)
            ids = _ids_of(text[0], tokenizer) if chat else _open_ended(text[0], tokenizer)
            start = len(ids)
            ids = ids + _ids_of(text[1], tokenizer)
        ids = ids[:max_length]
        if len(ids) <= max(start, 1):
            raise ValueError(
                f"text {number} has no token to predict within max_length={max_length}: {text!r:.60}"
            )
        rows.append((ids, [IGNORED] * start + ids[start:]))
    longest = max(len(ids) for ids, _ in rows)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def padded(sequences: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in sequences])

    return {
        "input_ids": padded([ids for ids, _ in rows], padding),
        "attention_mask": padded([[1] * len(ids) for ids, _ in rows], 0),
        "labels": padded([labels for _, labels in rows], IGNORED),
    }


def join_batches(*batches: Batch) -> Batch:
    """Join batches, one below the other, padded on the right to the widest."""
    width = max(batch["labels"].shape[1] for batch in batches)
    return {
        name: torch.cat(
            [F.pad(batch[name].cpu(), (0, width - batch[name].shape[1]), value=value) for batch in batches]
        )
        for name, value in PADDING.items()
    }


def _ids_of(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _open_ended(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of ``prompt`` without the end token that some tokenizers append."""
    ids: list[int] = tokenizer(prompt)["input_ids"]
    added = len(ids) - len(_ids_of(prompt, tokenizer))
    while added and ids[-1] in tokenizer.all_special_ids:
        ids, added = ids[:-1], added - 1
    return ids
