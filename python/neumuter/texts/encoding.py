"""Batches of token ids from texts."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from neumuter.types import IGNORED, Batch, Text


def _open_ended(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of ``prompt`` without the end token that some tokenizers append."""
    ids: list[int] = tokenizer(prompt)["input_ids"]
    added = len(ids) - len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    while added and ids[-1] in tokenizer.all_special_ids:
        ids, added = ids[:-1], added - 1
    return ids


def encode(texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Batch:
    """A batch of token ids: {"input_ids", "attention_mask", "labels"}, int64 [B, T] each.

    ``texts``: as ``read_texts`` returns them. Special tokens at the start are the tokenizer's own; a
    prompt and its completion are tokenised apart, as in generation. Texts are cut to ``max_length`` tokens
    and padded on the right to the longest. ``labels`` are the ids, −100 on padding and on prompts.

    Raises ValueError, naming the text by its number from 1, if it has no token that can be predicted: the
    first token never is, and a prompt may fill ``max_length``.
    """
    rows = []
    for number, text in enumerate(texts, 1):
        if isinstance(text, str):
            start, ids = 0, tokenizer(text)["input_ids"]
        else:
            ids = _open_ended(text[0], tokenizer)
            start = len(ids)
            ids = ids + tokenizer(text[1], add_special_tokens=False)["input_ids"]
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
