"""Batches of token ids from texts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from neumuter.texts.chat import has_two_forms, plain, render, uses_template
from neumuter.texts.rows import text_of
from neumuter.types import IGNORED, Batch, Text

# What fills a shorter row of each tensor of a batch.
PADDING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}


def encode(
    texts: Iterable[Any], tokenizer: PreTrainedTokenizerBase, max_length: int, chat: bool | None = None
) -> Batch:
    """Encode texts as one batch, padded on the right to the longest.

    Special tokens at the start are the tokenizer's own; an end token that it appends is left out. A prompt
    and its completion are tokenised together: these are the tokens that the model says. A token that holds
    characters of both counts.

    Args:
        texts: as ``read_texts`` returns them, or rows with their columns.
        max_length: tokens that a text is cut to.
        chat: whether prompts with completions, and conversations, go through the tokenizer's chat template.
            None: if it has one. False: a conversation becomes its messages, one a line.

    Returns:
        {"input_ids", "attention_mask", "labels"}, int64 [B, T] each. Labels are the ids, −100 on padding and
        on prompts.

    Raises:
        TypeError, ValueError: one of the texts is no text, or has no token that can be predicted, because it
            has only one token or its prompt fills ``max_length``; or it must go through a chat template that
            does not exist or does not take it. The message names the text by its number from 1.
    """
    if isinstance(texts, str | Mapping):
        raise TypeError(f"texts must be a list of texts, got one {type(texts).__name__}: put it into a list")
    rows = []
    for number, text in enumerate(texts, 1):
        try:
            ids, start = _tokenize_parts(text_of(text), tokenizer, chat)
        except (TypeError, ValueError) as error:
            raise type(error)(f"text {number}: {error}") from None
        ids = ids[:max_length]
        if len(ids) <= max(start, 1):
            raise ValueError(
                f"text {number} has no token to predict within max_length={max_length}: {text!r:.60}"
            )
        rows.append((ids, [IGNORED] * start + ids[start:]))
    if not rows:
        raise ValueError("texts holds no text")
    longest = max(len(ids) for ids, _ in rows)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def padded(sequences: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in sequences])

    return {
        "input_ids": padded([ids for ids, _ in rows], padding),
        "attention_mask": padded([[1] * len(ids) for ids, _ in rows], 0),
        "labels": padded([labels for _, labels in rows], IGNORED),
    }


def encode_forms(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, max_length: int, chat: bool | None = None
) -> list[Batch]:
    """Encode texts in each form in which somebody can ask for them: through a chat template and without.

    Args:
        texts, tokenizer, max_length, chat: as in ``encode``.

    Returns:
        The batch that ``encode`` gives; and where a template applies, that of the other form.
    """
    batches = [encode(texts, tokenizer, max_length, chat)]
    if has_two_forms(texts, tokenizer):
        batches.append(encode(texts, tokenizer, max_length, chat=chat is False))
    return batches


def join_batches(*batches: Batch) -> Batch:
    """Join batches, one below the other, padded on the right to the widest."""
    width = max(batch["labels"].shape[1] for batch in batches)
    return {
        name: torch.cat(
            [F.pad(batch[name].cpu(), (0, width - batch[name].shape[1]), value=value) for batch in batches]
        )
        for name, value in PADDING.items()
    }


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, special: bool = True) -> list[int]:
    """Tokenise a text that a model is to continue: without the end token that some tokenizers append.

    Args:
        special: whether the tokenizer's own special tokens go before the text.
    """
    # verbose=False keeps transformers from warning of texts that are too long for the model.
    inner: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not special:
        return inner
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    for start in range(len(ids) - len(inner) + 1):
        if ids[start : start + len(inner)] == inner:
            return ids[: start + len(inner)]
    return ids


def _tokenize_parts(
    text: Text, tokenizer: PreTrainedTokenizerBase, chat: bool | None
) -> tuple[list[int], int]:
    """Tokenise a text; returns its ids and how many of them come before the first that counts."""
    if isinstance(text, str):
        return tokenize(text, tokenizer), 0
    templated = uses_template(text, tokenizer, chat)
    prompt, completion = render(text, tokenizer) if templated else plain(text)
    ids = tokenize(prompt + completion, tokenizer, special=not templated)
    if not tokenizer.is_fast:
        alone = tokenize(prompt, tokenizer, special=not templated)
        return ids, next((i for i, (a, b) in enumerate(zip(ids, alone, strict=False)) if a != b), len(alone))
    encoded = tokenizer(
        prompt + completion, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    offsets = encoded["offset_mapping"]
    first = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(offsets))
    return ids, len(ids) - len(offsets) + first
