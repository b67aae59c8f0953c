"""Texts from files of several formats."""

import csv
import io
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from neumuter.files import PathLike
from neumuter.texts.rows import Column, text_of
from neumuter.types import Text

# Suffixes, in upper or lower case, and what they stand for.
LINES, JSON, TABLES, PARQUET = (".jsonl", ".ndjson"), ".json", {".csv": ",", ".tsv": "\t"}, ".parquet"
PLAIN = (".txt", ".text", ".md", "")
# Marks at the start of a file; that of UTF-32 starts like that of UTF-16.
MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
# At the start of a file, a zero byte among this number says that it is no UTF-8 text.
PROBE_BYTES = 4096


def read_texts(path: PathLike, column: Column = None, limit: int | None = None) -> list[Text]:
    """Read the texts in a file, in order.

    The suffix says how: ``.jsonl`` and ``.ndjson`` have one JSON value a line; ``.json`` is a list of them,
    or has one a line; ``.csv`` and ``.tsv`` have a header line; ``.parquet`` needs pyarrow. ``.txt``,
    ``.text``, ``.md`` and no suffix mean plain text, whose paragraphs, separated by blank lines, are the
    texts. Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    Args:
        column: the column that holds the texts, or the two that hold prompts and completions. By default
            "text"; or "prompt" and "completion", "question" and "answer", "instruction" (with "input") and
            "output"; or "messages" or "conversations". The first of these that a row has is taken.
        limit: read only the first texts.

    Returns:
        For each text a str; a (prompt, completion) pair, of which only the completion counts in losses; or a
        conversation, a list of {"role", "content"}, of which the last message counts.

    Raises:
        ValueError: the file holds anything else, or no text; the message names the line.
        OSError: the file cannot be read.
    """
    return list(TextFile(path, column, limit).read_once())


class TextFile:
    """The texts of a file, which is read anew, one text after the other, each time they are iterated over.

    Args:
        path, column, limit: see ``read_texts``, as for what is raised. A pipe, which is empty when it is read
            again, is refused with a ValueError.
    """

    def __init__(self, path: PathLike, column: Column = None, limit: int | None = None) -> None:
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ValueError(f"limit must be an int of at least 1, got {limit!r}")
        if column is not None and Path(path).suffix.lower() in PLAIN:
            raise ValueError(f"{path} is read as plain text, which has no column {column!r}")
        self.path, self.column, self.limit = path, column, limit

    def __iter__(self) -> Iterator[Text]:
        if Path(self.path).exists() and not Path(self.path).is_file():
            raise ValueError(
                f"{self.path} is not a regular file: its texts may be read more than once, which a pipe or a "
                "folder does not allow. Write them to a file, and give its name"
            )
        return self.read_once()

    def read_once(self) -> Iterator[Text]:
        """Yield the texts; the file may be a pipe."""
        empty = True
        for place, item in itertools.islice(read_rows(self.path), self.limit):
            try:
                text = text_of(item, self.column)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{self.path}, {place}: {error}") from None
            empty = False
            yield text
        if empty:
            raise ValueError(f"{self.path} holds no text")


def read_rows(path: PathLike) -> Iterator[tuple[str, Any]]:
    """Read what a file holds: (place, JSON value or text) of each row, such as ("line 3", {"text": "a"}).

    Raises:
        ValueError: the file is malformed or of another kind; the message names it and the line.
        OSError: it cannot be read.
    """
    path, kind = Path(path), Path(path).suffix.lower()
    if kind == PARQUET:
        yield from _parquet_rows(path)
        return
    if kind not in (*LINES, JSON, *TABLES, *PLAIN):
        allowed = ", ".join(sorted(filter(None, (*LINES, JSON, *TABLES, PARQUET, *PLAIN))))
        raise ValueError(
            f"{path}: files of kind {path.suffix!r} are not read, only {allowed}; if it is plain text, name "
            "it .txt"
        )
    with open(path, "rb") as source:
        encoding = _find_encoding(path, source.peek(PROBE_BYTES))
        file = io.TextIOWrapper(source, encoding, newline="" if kind in TABLES else None)
        try:
            if kind in TABLES:
                yield from _table_rows(file, TABLES[kind])
            elif kind in LINES:
                yield from _json_lines(file)
            elif kind == JSON:
                yield from _json_rows(file)
            else:
                yield from _paragraphs(file)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not {error.encoding} text: {error}") from None
        except _BadLine as error:
            raise ValueError(f"{path}, line {error.line}: {error}") from None


class _BadLine(Exception):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def _find_encoding(path: Path, start: bytes) -> str:
    found = next((encoding for mark, encoding in MARKS.items() if start.startswith(mark)), None)
    if found is None and b"\0" in start:
        raise ValueError(
            f"{path} holds zero bytes: it is not UTF-8 text, and as UTF-16 it lacks a byte order mark"
        )
    return found or "utf-8-sig"


def _json_lines(file: TextIO) -> Iterator[tuple[str, Any]]:
    for line, text in enumerate(file, 1):
        if text.strip():
            yield f"line {line}", _parse(text, line)


def _json_rows(file: TextIO) -> Iterator[tuple[str, Any]]:
    """A list, or one value a line; one value alone is both."""
    text = file.read()
    try:
        whole = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise _BadLine(error.lineno, f"not JSON: {error}") from None
        yield from _json_lines(io.StringIO(text))
        return
    except RecursionError as error:
        raise _BadLine(1, f"not JSON: {error}") from None
    for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield f"item {number}", row


def _parse(text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _BadLine(line, f"not JSON: {error}") from None


def _table_rows(file: TextIO, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(file, strict=True, delimiter=delimiter)
    # The limit, 131,072 characters, is a variable of the whole process.
    former = csv.field_size_limit(sys.maxsize)
    try:
        names = list(reader.fieldnames or ())
        if twice := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
            raise _BadLine(reader.line_num, f"the header names {', '.join(map(repr, twice))} twice")
        for row in reader:
            if None in row:
                raise _BadLine(reader.line_num, "there are more fields than in the header; quote the text")
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise _BadLine(reader.line_num, f"not CSV: {error}") from None
    finally:
        csv.field_size_limit(former)


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, "rb") as file:
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise ValueError(
                f"{path} needs pyarrow, which is not installed: pip install pyarrow, or write a .jsonl file"
            ) from None
        try:
            number = 0
            for batch in ParquetFile(file).iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
        except ArrowException as error:
            raise ValueError(f"{path} is not a parquet file: {error}") from None


def _paragraphs(file: TextIO) -> Iterator[tuple[str, str]]:
    lines: list[str] = []
    for number, line in enumerate(itertools.chain(file, [""]), 1):
        if line.strip():
            lines.append(line)
        elif lines:
            yield f"line {number - len(lines)}", "".join(lines).rstrip("\n")
            lines = []
