"""``neumuter evaluate --server``: which texts a running server says."""

from collections.abc import Collection, Sequence
from pathlib import Path

import typer
from rich.markup import escape
from rich.table import Table

from neumuter.cli.common import console, print_log
from neumuter.files import write_json

# The exit code if a text comes out, or could not be asked for.
COMES_OUT = 3
# The parameters of ``neumuter evaluate`` that go with --server.
OPTIONS = {
    "forget",
    "server",
    "served",
    "column",
    "prompt_column",
    "completion_column",
    "limit",
    "out",
    "mute_set",
}


def check_options(command: typer.Context, known: Collection[str], server: str) -> None:
    """Raise BadParameter if an option was given that does nothing with a server: none of ``known``."""
    for option in command.command.params:
        name = str(option.name)
        source = command.get_parameter_source(name)
        if name not in known and source is not None and source.name == "COMMANDLINE":
            what = "MODEL" if name == "model" else option.opts[0]
            raise typer.BadParameter(f"{server} cannot be combined with {what}")


def evaluate_server(
    url: str,
    model: str | None,
    forget: Path,
    column: str | tuple[str, str] | None,
    limit: int | None,
    out: Path | None,
    mute_set: str | None,
) -> None:
    """Print which of the texts to forget come out, and write a report without any text."""
    if model is None:
        raise typer.BadParameter("--server needs --model, the name that the server gives to the model")
    from neumuter.evaluation.server import Said, ask_server
    from neumuter.texts import read_texts

    texts = read_texts(forget, column, limit)
    with print_log(), console.status(f"Asking {url}"):
        found: Sequence[Said] = ask_server(url, model, texts, mute_set)
    table = Table("text", "comes out", "said before the first difference")
    rows: list[dict[str, int | float | None]] = []
    for number, said in enumerate(found, 1):
        if said.refused:
            table.add_row(str(number), "refused", "")
            rows.append({"number": number, "comes_out": None, "share": None})
        else:
            table.add_row(str(number), "yes" if said.comes_out else "no", f"{said.share:.0%}")
            rows.append({"number": number, "comes_out": said.comes_out, "share": said.share})
    console.print(table)
    if out:
        write_json(out, {"server": url, "model": model, "texts": rows})
    numbers = [str(row["number"]) for row in rows if row["comes_out"]]
    console.print(
        f"{len(numbers)} of {len(rows)} texts come out{': ' if numbers else '.'}{', '.join(numbers)}"
    )
    if refused := [said.refused for said in found if said.refused]:
        console.print(f"{len(refused)} of {len(rows)} texts could not be asked for: {escape(refused[0])}")
    if numbers or refused:
        raise typer.Exit(COMES_OUT)
