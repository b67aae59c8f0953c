"""``neumuter refit``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from neumuter.cli.arguments import Device, check_results, check_sources, refuse_replaced
from neumuter.cli.common import (
    FILE_HELP,
    Chat,
    Column,
    CompletionColumn,
    Dtype,
    Model,
    PromptColumn,
    choose_columns,
    console,
    open_model,
    print_log,
)
from neumuter.cli.processes import check_place, is_first


def refit(
    model: Model,
    existing: Annotated[Path, typer.Option(help="The mute file in force, made for all requests.")],
    out: Annotated[Path, typer.Option(help="Folder for the new mutes.safetensors.")],
    undone: Annotated[
        list[Path] | None, typer.Option(help="Slopes of a request to undo; give the option once for each.")
    ] = None,
    former: Annotated[
        list[Path] | None, typer.Option(help="Slopes of a request that stays; give the option once for each.")
    ] = None,
    retain: Annotated[
        Path | None,
        typer.Option(help=f"Texts that must stay. None may be of a request in --former. {FILE_HELP}"),
    ] = None,
    forget: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --undone, for a new version of the model: the texts of all requests. "
            f"{FILE_HELP}"
        ),
    ] = None,
    column: Column = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    chat: Chat = None,
    start_layer: Annotated[
        int,
        typer.Option(min=0, help="First FFN that may be touched, from 0; as when the mute file was found."),
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seeds the order of texts and what is sampled.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the mute file that is in --out.")
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the weights.")] = Dtype.auto,
    device: Device = None,
) -> None:
    """Fit a mute file anew, to undo requests from their slopes or for a new version of the model."""
    if bool(undone) == bool(forget):
        raise typer.BadParameter("give either --undone or --forget")
    if forget and former:
        raise typer.BadParameter(
            "--former needs --undone; with --forget, give the texts of all requests there"
        )
    columns = choose_columns(column, prompt_column, completion_column)
    check_sources(model, existing, retain, forget, *(undone or []), *(former or []))
    refuse_replaced(out, {"--existing": [existing], "--former": former or [], "--undone": undone or []})
    check_place(device)
    if is_first():
        check_results(out, overwrite)
    with console.status("Importing transformers"):
        import neumuter
        from neumuter.files import made_folder
        from neumuter.outcome import MUTE_FILE
        from neumuter.texts import read_texts

    retain_texts, forget_texts = (read_texts(file, columns) if file else None for file in (retain, forget))
    leaving, staying = ([neumuter.Slopes.load(file) for file in files or []] for files in (undone, former))
    mutes = neumuter.MuteSet.load(existing)
    network, tokenizer = open_model(model, dtype.value, device=device)
    with print_log():
        found = neumuter.refit(
            network, tokenizer, mutes, staying, leaving, retain_texts, forget=forget_texts,
            start_layer=start_layer, chat=chat, seed=seed,
        )  # fmt: skip
    if is_first():
        with made_folder(out) as folder:
            found.save(folder / MUTE_FILE)
    done = (
        f"Requests undone: {len(leaving)}; staying: {len(staying)}."
        if leaving
        else f"The gains of {found.count} neurons are fitted to this model."
    )
    console.print(
        f"{done} The mute file is "
        f"{escape(str(out / MUTE_FILE))}. Measure all requests again with neumuter evaluate.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
