"""Texts from files, and batches of token ids from texts."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor

from neumuter.files import PathLike
from neumuter.training.losses import IGNORED
from neumuter.types import Batch, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_texts(path: PathLike, column: str | None = None, limit: int | None = None) -> list[Text]:
    """The texts in a file, in order: each a str, or a (prompt, completion) pair of str.

    By the file's suffix: ``.jsonl`` has one JSON object a line, ``.csv`` a header line; anything else is
    plain text whose paragraphs, separated by blank lines, are the texts. A text is the value of
    ``column``, by default "text"; a row without that column but with "prompt" and "completion" is a pair,
    of which only the completion counts in losses. ``limit``: read only the first texts.

    Raises ValueError, naming the line, for anything else, also if there is no text; OSError if the file
    cannot be read.
    """
    path = Path(path)
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"limit must be an int of at least 1, got {limit!r}")
    with open(path, encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as file:
        rows: Iterator[str | tuple[int, dict[str, Any]]]
        if path.suffix == ".jsonl":
            rows = _json_rows(file)
        elif path.suffix == ".csv":
            rows = _csv_rows(file)
        elif column is not None:
            raise ValueError(f"{path} is read as plain text, which has no column {column!r}")
        else:
            rows = _paragraphs(file)
        texts = []
        try:
            for row in rows:
                texts.append(row if isinstance(row, str) else _text_of(row, column))
                if len(texts) == limit:
                    break
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from None
        except _BadLine as error:
            raise ValueError(f"{path}, line {error.line}: {error}") from None
    if not texts:
        raise ValueError(f"{path} holds no text")
    return texts


class _BadLine(Exception):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def _json_rows(file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _BadLine(line, f"not JSON: {error}") from None
        if not isinstance(row, dict):
            raise _BadLine(line, f"a JSON object is needed, got {type(row).__name__}")
        yield line, row


def _csv_rows(file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(file, strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise _BadLine(reader.line_num, f"not CSV: {error}") from None


def _paragraphs(file: TextIO) -> Iterator[str]:
    lines = []
    for line in [*file, ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines).rstrip("\n")
            lines = []


def _text_of(numbered_row: tuple[int, dict[str, Any]], column: str | None) -> Text:
    line, row = numbered_row
    wanted = column or "text"
    if wanted in row:
        names = [wanted]
    elif column is None and "prompt" in row and "completion" in row:
        names = ["prompt", "completion"]
    else:
        raise _BadLine(line, f"no column {wanted!r}; there are {', '.join(map(repr, row))}")
    for name in names:
        if not isinstance(row[name], str) or not row[name]:
            raise _BadLine(line, f"column {name!r} must hold a text, got {row[name]!r:.80}")
    return row[names[0]] if len(names) == 1 else (row["prompt"], row["completion"])


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
