"""``neumuter ledger`` and ``neumuter verify``: which requests there were, and whether they still hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

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
    MODEL_HELP,
    Column,
    CompletionColumn,
    Dtype,
    GgufFile,
    PromptColumn,
    choose_columns,
    console,
    open_model,
    print_log,
)
from neumuter.cli.pages import describe_fit, describe_server, describe_weights, write_pages
from neumuter.cli.processes import check_place
from neumuter.cli.server import check_options

if TYPE_CHECKING:
    from neumuter.types import Text

# The exit code where a request does not hold, or nobody could tell.
BROKEN = 3
# The parameters of ``neumuter verify`` that go with a server.
OF_SERVERS = {
    "folder",
    "target",
    "texts",
    "served",
    "mute_set",
    "head",
    "out",
    "column",
    "prompt_column",
    "completion_column",
}
Folder = Annotated[Path, typer.Argument(help="Folder of the ledger.")]
Number = Annotated[int, typer.Argument(min=1, help="Number of the request.")]
Texts = Annotated[
    Path,
    typer.Option(
        help="A file with the texts of the requests, or a folder of such files. All other texts there are "
        "texts to keep."
    ),
]
Controls = Annotated[
    Path | None,
    typer.Option(
        help="Texts of the same kind that the model never saw, to compare with. Default: made from the texts "
        "of each request, with other names and values."
    ),
]
Head = Annotated[
    str | None,
    typer.Option(
        help="A last hash that you kept elsewhere: refuse the ledger if the entries up to that hash are not "
        "what they were."
    ),
]

ledger = typer.Typer(help="Keep a ledger of the requests to forget.", no_args_is_help=True)


@ledger.command()
def add(
    folder: Folder,
    outcome: Annotated[Path, typer.Argument(help="The folder that unlearn wrote.")],
    forget: Annotated[Path, typer.Option(help=f"The texts that were forgotten: {FILE_HELP}")],
    name: Annotated[str, typer.Option(help="What to call the request, such as the number of a ticket.")] = "",
    column: Column = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
) -> None:
    """Add a request: its mute file, its verdict, and hashes of its texts. A new folder becomes a ledger."""
    columns = choose_columns(column, prompt_column, completion_column)
    from neumuter.ledger import Ledger, read_result
    from neumuter.texts import read_texts

    texts = read_texts(forget, columns)
    # Before a new folder becomes a ledger.
    read_result(outcome)
    kept = Ledger(folder, create=True)
    request = kept.add(outcome, texts, name)
    console.print(f"Request {request.number} is in {escape(str(folder))}.", highlight=False)
    _print_head(kept.head)


@ledger.command(name="list")
def show(folder: Folder, head: Head = None) -> None:
    """List the requests, after checking that no entry and no file was changed."""
    from neumuter.ledger import Ledger

    kept = Ledger(folder, head=head)
    table = Table("request", "name", "added", "texts", "neurons", "verdict", "entry")
    for request in kept.requests():
        for fit in request.fits:
            report = fit.entry["report"]
            table.add_row(
                str(request.number),
                escape(request.name),
                # The day; the page of the request has the time.
                fit.entry["time"][:10],
                str(len(request.texts)),
                str(report["muted_neurons"]),
                "undone" if request.undone else report["verdict"],
                str(fit.entry["number"]),
            )
    console.print(table)
    for request in kept.requests():
        for fit in request.fits[1:]:
            console.print(
                f"Request {request.number} was fitted anew: {escape(describe_fit(fit))}.",
                highlight=False,
                soft_wrap=True,
            )
    _print_head(kept.head)


@ledger.command()
def undo(folder: Folder, number: Number) -> None:
    """Note that a request was taken back. Its entry stays, but verify no longer applies its mutes."""
    from neumuter.ledger import Ledger

    kept = Ledger(folder)
    kept.undo(number)
    console.print(
        f"Request {number} is undone. Stop serving its mute file. A mute file that was found with --former "
        "makes the model forget this request, too: fit it anew with neumuter refit, or with neumuter ledger "
        "refit if you have the texts of the requests that stay. These requests stay:"
    )
    for request in kept.requests():
        if not request.undone:
            console.print(f"  {escape(str(request.newest.folder))}", highlight=False, soft_wrap=True)
    _print_head(kept.head)


@ledger.command()
def refit(
    folder: Folder,
    number: Number,
    model: Annotated[str, typer.Argument(help=f"The new version, without mutes. {MODEL_HELP}")],
    texts: Texts,
    retain: Annotated[
        Path | None, typer.Option(help="Texts that must stay. None may be of a request.")
    ] = None,
    controls: Controls = None,
    column: Column = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    seed: Annotated[int, typer.Option(min=0, help="Seeds the order of texts and what is sampled.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the weights.")] = Dtype.auto,
    device: Device = None,
) -> None:
    """Fit the mute set of a request anew for MODEL, a new version of the model, and add it to the ledger.

    The gains start from the request's newest mute set. What comes of it is measured as unlearn does. verify
    then takes the newest mute set of the request that was made for its model. The exit code is 3 if texts
    still come out.
    """
    columns = choose_columns(column, prompt_column, completion_column)
    check_sources(model, texts, retain, controls)
    check_place(device)
    with console.status("Importing transformers"):
        import neumuter
        from neumuter.outcome import MUTE_FILE
        from neumuter.report.console import outcome_table
        from neumuter.texts import read_texts

    kept = neumuter.Ledger(folder)
    kept.request(number)
    staying, unseen = (read_texts(file, columns) if file else None for file in (retain, controls))
    given = list(_read_all(texts, columns, controls))
    network, tokenizer = open_model(model, dtype.value, device=device)
    with print_log():
        outcome = neumuter.refit_request(
            kept, number, network, tokenizer, given, staying or (), controls=unseen, seed=seed
        )
    with TemporaryDirectory() as found:
        outcome.save(found, redact=True, model=model)
        request = kept.add_fit(number, found)
    console.print(outcome_table(outcome.before, outcome.after, outcome.controls))
    console.print(
        f"Request {number} has a new mute file: {escape(str(request.newest.folder / MUTE_FILE))}.",
        highlight=False,
        soft_wrap=True,
    )
    _print_head(kept.head)
    if outcome.verdict.leaks:
        console.print(
            "The neurons may hold other things in this model: find them anew with neumuter unlearn, add what "
            "it wrote as a request, and undo this one.",
            soft_wrap=True,
        )
    console.print(escape(outcome.verdict.sentence), highlight=False, soft_wrap=True)
    if outcome.verdict.leaks:
        raise typer.Exit(BROKEN)


def verify(
    command: typer.Context,
    folder: Folder,
    target: Annotated[
        str,
        typer.Argument(
            help="What is served: folder or name of a Hugging Face causal language model, or the address of "
            "a running server with OpenAI's API, such as http://127.0.0.1:8000."
        ),
    ],
    texts: Texts,
    served: Annotated[
        str | None, typer.Option("--model", help="If TARGET is a server: its name for the model or adapter.")
    ] = None,
    mute_set: Annotated[
        str | None,
        typer.Option(help="If TARGET is a vLLM server with NeuMuter's plug-in: the mute set to ask for."),
    ] = None,
    controls: Controls = None,
    apply: Annotated[
        bool,
        typer.Option(
            "--apply",
            help="TARGET is a model without mutes: first apply those of all requests that are not undone.",
        ),
    ] = False,
    head: Head = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for a page of each request, which quotes no text.")
    ] = None,
    column: Column = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    device: Device = None,
    device_map: DeviceMap = None,
    quantize: Quantized = None,
    attention: Attention = None,
    gguf_file: GgufFile = None,
) -> None:
    """Check each request of a ledger on TARGET, the model that is served.

    TARGET may be folded, quantised or tuned further, or a running server. Texts are found by their hashes.
    The exit code is 3 if a request that is not undone no longer holds, never held or could not be checked, or
    if the ledger has no request.
    """
    columns = choose_columns(column, prompt_column, completion_column)
    place = choose_place(device, device_map, quantize, attention, gguf_file)
    server = target.startswith(("http://", "https://"))
    if server != (served is not None):
        raise typer.BadParameter("--model is for the address of a server as TARGET, and needed there")
    if mute_set is not None and not server:
        raise typer.BadParameter("--mute-set is for the address of a server as TARGET")
    if server:
        check_options(command, OF_SERVERS, "the address of a server")
        texts.stat()
    else:
        check_sources(target, texts, controls)
    from neumuter.files import check_writable
    from neumuter.ledger import Ledger
    from neumuter.texts import read_texts
    from neumuter.verifying import HOLDS, UNDONE, verify_server
    from neumuter.verifying import verify as verify_requests

    if out:
        check_writable(out)
    kept = Ledger(folder, head=head)
    unseen = read_texts(controls, columns) if controls else None
    given = list(_read_all(texts, columns, controls))
    if served is not None:
        with print_log(), console.status(f"Asking {escape(target)}"):
            checks = verify_server(kept, target, served, given, mute_set)
    else:
        network, tokenizer = open_model(target, **place)
        with print_log(), console.status("Verifying"):
            checks = verify_requests(kept, network, tokenizer, given, controls=unseen, apply=apply)
    table = Table("request", "name", "state", "why")
    for check in checks:
        request = check.request
        table.add_row(str(request.number), escape(request.name), check.state, escape(check.sentence))
    console.print(table)
    if out:
        server_facts = describe_server(target, served, mute_set) if served else None
        write_pages(out, checks, server_facts or describe_weights(target, apply, controls), kept.head)
    _print_head(kept.head)
    if not checks:
        console.print("The ledger has no request, so nothing was verified.")
    if not checks or any(check.state not in (HOLDS, UNDONE) for check in checks):
        raise typer.Exit(BROKEN)


def _print_head(head: str) -> None:
    console.print(
        f"The last hash is {head}. Keep it elsewhere, and give it as --head later: only it shows if entries "
        "were rewritten or cut off.",
        highlight=False,
        soft_wrap=True,
    )


def _read_all(
    path: Path, columns: str | tuple[str, str] | None, controls: Path | None = None
) -> Iterator[Text]:
    """Read the texts of a file, or of all files of a folder that can be read; the others are named.

    The file of controls is left out.
    """
    from neumuter.texts import read_texts

    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file() or (controls and file.samefile(controls)):
            continue
        try:
            yield from read_texts(file, columns)
        except ValueError as error:
            if file == path:
                raise
            console.print(f"Not read: {escape(f'{error!s:.120}')}", highlight=False, soft_wrap=True)
