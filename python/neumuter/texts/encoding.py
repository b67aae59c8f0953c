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

    Special tokens at the start are the tokenizer's own; an end token that it appends is left out. A prompt
    and its completion are tokenised together: these are the tokens that the model says. A token that holds
    characters of both counts.

    Args:
        texts: as ``read_texts`` returns them.
        max_length: tokens that a text is cut to.

    Returns:
        {"input_ids", "attention_mask", "labels"}, int64 [B, T] each. Labels are the ids, −100 on padding and
        on prompts.

    Raises:
        ValueError: a text has no token that can be predicted, because it has only one token or its prompt
            fills ``max_length``; or it holds half a surrogate pair, which is no character. The message names
            the text by its number from 1.
    """
    rows = []
    for number, text in enumerate(texts, 1):
        prompt, completion = ("", text) if isinstance(text, str) else (text[0], text[1])
        special = not isinstance(text, Chat)
        try:
            ids = tokenize(prompt + completion, tokenizer, special)
        except ValueError as error:
            raise ValueError(f"text {number}: {error}") from None
        start = _count_prompt_tokens(prompt, completion, ids, tokenizer, special) if prompt else 0
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


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, special: bool = True) -> list[int]:
    """Tokenise a text that a model is to continue: without the end token that some tokenizers append.

    Args:
        special: whether the tokenizer's own special tokens go before the text.

    Raises:
        ValueError: the text holds half a surrogate pair.
    """
    check_characters(text)
    # verbose=False keeps transformers from warning of texts that are too long for the model.
    inner: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not special:
        return inner
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    for start in range(len(ids) - len(inner) + 1):
        if ids[start : start + len(inner)] == inner:
            return ids[: start + len(inner)]
    return ids


def check_characters(text: str) -> None:
    """Raise ValueError if ``text`` holds half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start + 1}, {text[error.start]!a}, is half a surrogate pair, which stands for "
            "nothing: mend or remove it"
        ) from None


def _count_prompt_tokens(
    prompt: str, completion: str, ids: list[int], tokenizer: PreTrainedTokenizerBase, special: bool
) -> int:
    """Count the tokens of ``ids``, those of both together, before the first that holds completion."""
    if tokenizer.is_fast:
        encoded = tokenizer(
            prompt + completion, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        offsets = encoded["offset_mapping"]
        first = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(offsets))
        return len(ids) - len(offsets) + first
    alone = tokenize(prompt, tokenizer, special)
    return next((i for i, (a, b) in enumerate(zip(ids, alone, strict=False)) if a != b), len(alone))
