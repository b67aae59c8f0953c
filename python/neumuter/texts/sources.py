"""Texts from whatever a caller has: a path, a list, a dataset, chat messages, or a batch of token ids."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from neumuter.files import PathLike
from neumuter.texts.files import read_texts, text_of_row
from neumuter.types import Batch, Chat, Text

KEYS = ("input_ids", "attention_mask", "labels")
ALLOWED = (
    "a path, a list of texts, of (prompt, completion) pairs or of chat messages, a datasets.Dataset, or a "
    f"batch of {', '.join(KEYS)}"
)
# What a caller may give: see ALLOWED.
TextSource = PathLike | Iterable[Any] | Mapping[str, Tensor]


def collect_texts(
    name: str, source: TextSource, tokenizer: PreTrainedTokenizerBase | None
) -> list[Text] | Batch:
    """Collect the texts of ``source``, called ``name`` in errors.

    Args:
        source: the path of a file (see ``read_texts``); an iterable of str, of (prompt, completion) pairs,
            of conversations (lists of {"role", "content"}, of which the last message counts), or of rows
            with "text", "prompt" and "completion", or "messages", such as a ``datasets.Dataset``; or a batch
            of token ids.
        tokenizer: renders conversations.

    Returns:
        A list of texts, or the batch as it was given.

    Raises:
        TypeError, ValueError: the source is something else; the message says what is allowed.
    """
    if isinstance(source, str | os.PathLike):
        return read_texts(source)
    if isinstance(source, Mapping):
        if missing := [key for key in KEYS if not isinstance(source.get(key), Tensor)]:
            raise TypeError(f"{name} must be {ALLOWED}; this mapping lacks {', '.join(missing)}")
        return {key: source[key] for key in KEYS}
    if not isinstance(source, Iterable):
        raise TypeError(f"{name} must be {ALLOWED}, got {type(source).__name__}")
    texts = [_text_of(f"{name}[{number}]", item, tokenizer) for number, item in enumerate(source)]
    if not texts:
        raise ValueError(f"{name} holds no text")
    return texts


def _text_of(name: str, item: Any, tokenizer: PreTrainedTokenizerBase | None) -> Text:
    if isinstance(item, str | Chat):
        return item
    if isinstance(item, tuple) and len(item) == 2 and all(isinstance(part, str) for part in item):
        return (item[0], item[1])
    if isinstance(item, Mapping) and "messages" in item:
        return _render(name, item["messages"], tokenizer)
    if isinstance(item, Mapping):
        try:
            return text_of_row(item)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if isinstance(item, Sequence) and item and all(isinstance(message, Mapping) for message in item):
        return _render(name, item, tokenizer)
    raise TypeError(
        f"{name} must be a text, a (prompt, completion) pair or chat messages, got {type(item).__name__}"
    )


def _render(name: str, messages: Any, tokenizer: PreTrainedTokenizerBase | None) -> Chat:
    if not isinstance(messages, Sequence) or len(messages) < 2 or not _are_messages(messages):
        raise ValueError(f'{name} must have two messages or more, each with "role" and "content"')
    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError(f"{name} holds chat messages, but the tokenizer has no chat template")
    *prompt, answer = messages
    rendered = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    return Chat(str(rendered), answer["content"])


def _are_messages(messages: Sequence[Any]) -> bool:
    return all(
        isinstance(m, Mapping) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str)
        for m in messages
    )
