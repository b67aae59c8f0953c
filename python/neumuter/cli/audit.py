"""``neumuter audit``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from neumuter.cli.arguments import (
    Attention,
    Device,
    DeviceMap,
    Quantized,
    check_sources,
    choose_place,
)
from neumuter.cli.common import (
    FILE_HELP,
    Chat,
    Column,
    CompletionColumn,
    GgufFile,
    Limit,
    Model,
    PromptColumn,
    choose_columns,
    console,
    open_model,
    print_log,
)

if TYPE_CHECKING:
    from neumuter.evaluation import Known

SHOWN = 10


def audit(
    model: Model,
    texts: Annotated[Path, typer.Option(help=f"The corpus: {FILE_HELP}")],
    out: Annotated[
        Path,
        typer.Option(help="A .jsonl file for the texts that MODEL knows; unlearn --forget reads it."),
    ],
    controls: Annotated[
        Path | None,
        typer.Option(
            help="Texts of the same kind that MODEL never saw, to compare with. Default: made from the first "
            "texts, with other names and values."
        ),
    ] = None,
    column: Column = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    chat: Chat = None,
    max_length: Annotated[
        int, typer.Option(min=2, help="Tokens of a window; a longer text becomes several.")
    ] = 256,
    limit: Limit = None,
    device: Device = None,
    device_map: DeviceMap = None,
    quantize: Quantized = None,
    attention: Attention = None,
    gguf_file: GgufFile = None,
) -> None:
    """Find the texts of a corpus that MODEL knows by heart, or better than texts that it never saw.

    The file --out quotes these texts, so only its owner may read it.
    """
    if out.suffix.lower() != ".jsonl":
        raise typer.BadParameter(f"--out must be a file that ends with .jsonl, got {out}")
    columns = choose_columns(column, prompt_column, completion_column)
    place = choose_place(device, device_map, quantize, attention, gguf_file)
    check_sources(model, texts, controls)
    from neumuter.evaluation import audit as audit_texts
    from neumuter.files import check_writable, made_folder, write_atomically
    from neumuter.report.progress import show_progress
    from neumuter.texts import read_texts

    check_writable(out.parent)
    corpus = read_texts(texts, columns, limit)
    unseen = read_texts(controls, columns, limit) if controls else None
    network, tokenizer = open_model(model, **place)
    with print_log(), show_progress("Measuring texts") as tell:
        found = audit_texts(
            network,
            tokenizer,
            corpus,
            unseen,
            max_length=max_length,
            chat=chat,
            callback=lambda done: tell(done, len(corpus)),
        )
    lines = [json.dumps(_row(text), ensure_ascii=False) + "\n" for text in found.known]
    with made_folder(out.parent):
        write_atomically(out, "".join(lines).encode(), private=True)
    table = Table("text", "comes out", "chance in 100 samples", "loss", "Min-40%")
    for text in found.known[:SHOWN]:
        figures = f"{text.sampled:.2g}", f"{text.loss:.3g}", f"{text.min_k:.3g}"
        table.add_row(str(text.number), "yes" if text.extracted else "no", *figures)
    if found.known:
        console.print(table)
    by_heart = sum(text.kind == "by heart" for text in found.known)
    console.print(
        f"{by_heart} of {found.texts} texts come out word for word. {len(found.known) - by_heart} more are "
        f"likelier than 95 % of {found.controls} controls; so is one in 20 texts that the model never saw. "
        f"All of them are in {escape(str(out))}.",
        highlight=False,
        soft_wrap=True,
    )


def _row(known: Known) -> dict[str, Any]:
    """A line of the file: the text in the columns that ``read_texts`` takes first, and what was found."""
    if isinstance(known.text, str):
        text: dict[str, Any] = {"text": known.text}
    elif isinstance(known.text, tuple):
        text = dict(zip(("prompt", "completion"), known.text, strict=True))
    else:
        text = {"messages": known.text}
    figures = {name: getattr(known, name) for name in ("number", "kind", "sampled", "loss", "min_k")}
    return text | figures
