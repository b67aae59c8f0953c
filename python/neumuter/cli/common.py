"""What several commands share: options, the console, opening a model, writing a report."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from neumuter.mutes.mute_set import MuteSet

console = Console()
FILE_HELP = (
    "jsonl or csv (column 'text', or 'prompt' and 'completion', of which only the completion is forgotten), "
    "or plain text with paragraphs separated by blank lines."
)
Model = Annotated[str, typer.Argument(help="Folder of a Hugging Face causal language model, or its name.")]
GgufFile = Annotated[str | None, typer.Option(help="Name of a GGUF file in MODEL to read the weights from.")]
Column = Annotated[str | None, typer.Option(help="Column that holds the texts.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Read only the first texts of each file.")]


class Dtype(str, Enum):
    """The dtype a model is loaded in; auto is the checkpoint's own."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        console.print(record.getMessage(), highlight=False, markup=False)


@contextmanager
def print_log() -> Iterator[None]:
    """Context: what the library says while it works is printed."""
    handler, logger = _ConsoleHandler(), logging.getLogger("neumuter")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def open_model(
    model: str, dtype: str = "auto", gguf_file: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, and say so meanwhile."""
    with console.status("Importing transformers"):
        from neumuter.models.loading import load_model
    with console.status(f"Loading {escape(model)}"):
        return load_model(model, dtype, gguf_file)


def load_union(network: PreTrainedModel, files: Sequence[Path]) -> MuteSet:
    """Load the mute set of one file, or the union of several."""
    from neumuter.mutes.algebra import combine
    from neumuter.mutes.mute_set import MuteSet

    sets = [MuteSet.load(path) for path in files]
    return sets[0] if len(sets) == 1 else combine(network, sets)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    from neumuter.files import write_atomically

    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())
