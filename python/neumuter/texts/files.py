"""Texts from files, and from the rows that files hold."""

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from neumuter.files import PathLike
from neumuter.texts.encoding import check_characters
from neumuter.types import Text


def read_texts(path: PathLike, column: str | None = None, limit: int | None = None) -> list[Text]:
    """Read the texts in a file, in order: each a str, or a (prompt, completion) pair of str.

    By the file's suffix: ``.jsonl`` has one JSON object a line, ``.csv`` a header line; anything else is
    plain text whose paragraphs, separated by blank lines, are the texts. A text is the value of
    ``column``, by default "text". A row without that column but with "prompt" and "completion" is a pair,
    of which only the completion counts in losses.

    Args:
        limit: read only the first texts.

    Raises:
        ValueError: the file holds anything else, or no text; the message names the line.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"limit must be an int of at least 1, got {limit!r}")
    with open(path, encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as file:
        rows: Iterator[str | tuple[int, Mapping[str, Any]]]
        if path.suffix == ".jsonl":
            rows = _json_rows(file)
        elif path.suffix == ".csv":
            rows = _csv_rows(file)
        elif column is not None:
            raise ValueError(f"{path} is read as plain text, which has no column {column!r}")
        else:
            rows = _paragraphs(file)
        texts: list[Text] = []
        try:
            for row in rows:
                texts.append(row if isinstance(row, str) else _numbered_text(row, column))
                if len(texts) == limit:
                    break
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from None
        except _BadLine as error:
            raise ValueError(f"{path}, line {error.line}: {error}") from None
    if not texts:
        raise ValueError(f"{path} holds no text")
    return texts


def text_of_row(row: Mapping[str, Any], column: str | None = None) -> str | tuple[str, str]:
    """Take the text, or the (prompt, completion) pair, out of a row; see ``read_texts``.

    Raises:
        ValueError: the row has no such column, or something else in it.
    """
    wanted = column or "text"
    if wanted in row:
        names = [wanted]
    elif column is None and "prompt" in row and "completion" in row:
        names = ["prompt", "completion"]
    else:
        raise ValueError(f"no column {wanted!r}; there are {', '.join(map(repr, row))}")
    for name in names:
        if not isinstance(row[name], str) or not row[name]:
            raise ValueError(f"column {name!r} must hold a text, got {row[name]!r:.80}")
        check_characters(row[name])
    return row[names[0]] if len(names) == 1 else (row["prompt"], row["completion"])


class _BadLine(Exception):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def _numbered_text(numbered_row: tuple[int, Mapping[str, Any]], column: str | None) -> Text:
    line, row = numbered_row
    try:
        return text_of_row(row, column)
    except ValueError as error:
        raise _BadLine(line, str(error)) from None


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
    # The limit, 131,072 characters, is a variable of the whole process.
    former = csv.field_size_limit(sys.maxsize)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise _BadLine(reader.line_num, f"not CSV: {error}") from None
    finally:
        csv.field_size_limit(former)


def _paragraphs(file: TextIO) -> Iterator[str]:
    lines = []
    for line in [*file, ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines).rstrip("\n")
            lines = []
