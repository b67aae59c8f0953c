"""Texts from whatever a caller has: a path, a list, a dataset, chat messages, or a batch of token ids."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from neumuter.files import PathLike
from neumuter.texts.files import TextFile
from neumuter.texts.rows import text_of
from neumuter.types import KEYS, Batch, Text, check_rows

ALLOWED = (
    "a path, a list of texts, of (prompt, completion) pairs or of chat messages, a datasets.Dataset, or a "
    f"batch of {', '.join(KEYS)}"
)
# What a caller may give: see ALLOWED.
TextSource = PathLike | Iterable[Any] | Mapping[str, Tensor]


def collect_texts(name: str, source: TextSource) -> list[Text] | Batch:
    """Collect the texts of ``source``, called ``name`` in errors.

    Args:
        source: the path of a file (see ``read_texts``); an iterable of str, of (prompt, completion) pairs,
            of conversations (lists of {"role", "content"}, of which the last message counts), or of rows
            with the columns that ``read_texts`` knows, such as a ``datasets.Dataset``; or a batch of token
            ids.

    Returns:
        A list of texts, or the batch as it was given.

    Raises:
        TypeError, ValueError: the source is something else, or a batch whose rows are not as ``Batch`` says;
            the message says what is allowed.
    """
    if isinstance(source, Mapping):
        if missing := [key for key in KEYS if not isinstance(source.get(key), Tensor)]:
            raise TypeError(f"{name} must be {ALLOWED}; this mapping lacks {', '.join(missing)}")
        batch = {key: source[key] for key in KEYS}
        check_rows(name, batch)
        return batch
    return list(stream_texts(name, source))


def stream_texts(name: str, source: PathLike | Iterable[Any]) -> Iterator[Text]:
    """Yield the texts that ``collect_texts`` collects, of a source other than a batch, one after the other.

    Raises:
        TypeError, ValueError: as of ``collect_texts``.
    """
    if isinstance(source, str | os.PathLike):
        source = TextFile(source)
    if isinstance(source, TextFile):
        yield from source
        return
    # A table of pandas or polars goes through its columns' names.
    if not isinstance(source, Iterable) or hasattr(source, "columns"):
        raise TypeError(f"{name} must be {ALLOWED}, got {type(source).__name__}")
    number = -1
    for number, item in enumerate(source):
        try:
            text = text_of(item)
        except TypeError as error:
            raise TypeError(f"{name}[{number}] {error}") from None
        except ValueError as error:
            raise ValueError(f"{name}[{number}]: {error}") from None
        yield text
    if number < 0:
        raise ValueError(f"{name} holds no text")
