"""What several commands share: options, the console, opening a model, writing a report."""

from __future__ import annotations

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
    "jsonl, ndjson, json, csv, tsv or parquet with the column 'text', with 'prompt' and 'completion' (only "
    "the completion counts), 'question' and 'answer', 'instruction' and 'output', or with 'messages'; or "
    "plain text with blank lines between the texts."
)
MODEL_HELP = "Folder or name of a Hugging Face causal language model, or of a PEFT adapter."
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
GgufFile = Annotated[
    str | None, typer.Option(help="Name of the GGUF file in the folder MODEL that has the weights.")
]
Column = Annotated[str | None, typer.Option(help="Column that holds the texts, if its name is another one.")]
PromptColumn = Annotated[
    str | None, typer.Option(help="Column that holds the prompts, which are not forgotten.")
]
CompletionColumn = Annotated[
    str | None, typer.Option(help="Column that holds the completions, with --prompt-column.")
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Put prompts and completions through the chat template. Default: if the tokenizer has one.",
    ),
]
Redact = Annotated[bool, typer.Option("--redact", help="Quote no texts in the report.")]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Read only this number of texts from the start of each file.")
]


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
    """Context: what the library says while it works, at level INFO and above, is printed."""
    handler, logger = _ConsoleHandler(), logging.getLogger("neumuter")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def open_model(
    model: str, dtype: str = "auto", **place: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, and say so meanwhile; ``place``: as of ``load_model``."""
    with console.status("Importing transformers"):
        from neumuter.models.adapted import find_source
        from neumuter.models.loading import load_model
    if (source := find_source(model)).adapter:
        how = "is merged into" if place.get("merge") else "is on"
        console.print(f"The adapter {escape(model)} {how} its base {escape(source.base)}.", soft_wrap=True)
    with console.status(f"Loading {escape(model)}"):
        return load_model(model, dtype, **place)


def choose_columns(
    column: str | None, prompt_column: str | None, completion_column: str | None
) -> str | tuple[str, str] | None:
    """Put the options that name columns into what ``read_texts`` takes."""
    if prompt_column is None and completion_column is None:
        return column
    if prompt_column is None or completion_column is None or column is not None:
        raise typer.BadParameter(
            "--prompt-column and --completion-column need each other, and cannot be combined with --column"
        )
    return (prompt_column, completion_column)


def load_sets(files: Sequence[Path]) -> list[MuteSet]:
    """Load mute files, which takes no model."""
    from neumuter.mutes.mute_set import MuteSet

    return [MuteSet.load(path) for path in files]


def unite(network: PreTrainedModel, sets: Sequence[MuteSet]) -> MuteSet:
    """The mute set, or the union of several."""
    from neumuter.mutes.algebra import combine

    return sets[0] if len(sets) == 1 else combine(network, sets)
