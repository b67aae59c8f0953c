"""``neumuter inspect``, ``fold`` and ``export``: what can be done with mute files."""

import json
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from neumuter.cli.arguments import check_folder, check_sources, need_packages
from neumuter.cli.common import GgufFile, Model, console, load_sets, open_model, unite

if TYPE_CHECKING:
    from neumuter.mutes.mute_set import MuteSet

# The largest share of what muting does to the logits by which an export may differ.
MAX_DIFFERENCE = 0.1
ADAPTER_NOTE = (
    "--to {form} cannot export {model}, which is an adapter: the export would be for the base with that "
    "adapter merged, which no engine loads by name. `neumuter fold` merges it and writes a checkpoint for "
    "any engine; `neumuter.mute` mutes base and adapter in transformers. Or merge it yourself, and export "
    "from the result"
)
SHARDS = ("model.safetensors", "model.safetensors.index.json")


def inspect(file: Annotated[Path, typer.Argument(help="A mute file.")]) -> None:
    """Show what a mute file holds: the model that it is for, the neurons, the method, the metrics."""
    from neumuter.mutes.mute_set import MuteSet

    mutes = MuteSet.load(file)
    table = Table(title=escape(str(file)), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = {
        "model class": mutes.architecture["class"],
        "model type": mutes.architecture["model_type"],
        "mode": f"{mutes.mode}, gains from {mutes.gain_range[0]:g} to {mutes.gain_range[1]:g}",
        "neurons": f"{mutes.count} of {sum(mutes.widths.values())} ({mutes.share:.2%})",
        "adapter": f"for a base with an adapter on it, which changes {next(iter(mutes.adapter))} and others"
        if mutes.adapter
        else "none",
        "seed": str(mutes.seed),
        "method": json.dumps(mutes.method),  # ASCII: control characters of a stranger's file stay escaped
        "before": json.dumps(mutes.metrics.get("before", {})),
        "after": json.dumps(mutes.metrics.get("after", {})),
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)

    layers = Table("FFN", "neurons", "muted", "share", "gains")
    for name, width in mutes.widths.items():
        layer = mutes.layers.get(name)
        count = len(layer.indices) if layer else 0
        gains = f"{layer.gains.min():.2f} to {layer.gains.max():.2f}" if layer else ""
        layers.add_row(name, str(width), str(count), f"{count / width:.2%}", gains)
    console.print(layers)


def fold(
    model: Model,
    files: Annotated[
        list[Path], typer.Argument(help="Mute files made for MODEL. All are folded; a GGUF file takes one.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the new checkpoint, which must be empty or not exist. If MODEL is a GGUF file: "
            "a file."
        ),
    ],
    gguf_file: GgufFile = None,
) -> None:
    """Fold mute files into the weights of MODEL, and write an ordinary checkpoint.

    If MODEL is a GGUF file, a GGUF file is written. Only its scales change; nothing is quantised again.
    """
    if _is_gguf(model, gguf_file):
        _fold_gguf(Path(model), files, out)
        return
    mutes = _fold_files(model, files, out, gguf_file)
    console.print(
        f"{mutes.count} neurons ({mutes.share:.2%}) folded; the checkpoint is in {escape(str(out))}"
    )


class Form(str, Enum):
    """ia3, lora: PEFT. vllm-lora: LoRA of one rank. gguf-lora: llama.cpp. shrink: a smaller checkpoint."""

    ia3 = "ia3"
    lora = "lora"
    vllm_lora = "vllm-lora"
    gguf_lora = "gguf-lora"
    shrink = "shrink"


def export(
    model: Model,
    files: Annotated[
        list[Path], typer.Argument(help="Mute files made for MODEL. All are exported; gguf-lora takes one.")
    ],
    to: Annotated[
        Form,
        typer.Option(
            help="ia3, lora: an adapter for PEFT. vllm-lora: for vLLM. gguf-lora: for llama.cpp; MODEL and "
            "--out are files. shrink: a folded checkpoint without the silenced neurons."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the export, which must be empty or not exist. With --to gguf-lora: a file."
        ),
    ],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Also compare the logits with those of the live muted model."),
    ] = False,
    gguf_file: GgufFile = None,
) -> None:
    """Convert mute files into a form that other tools serve. docs/serving.md says which tool takes which."""
    if to is Form.gguf_lora:
        _export_gguf_lora(model, files, out, verify, gguf_file)
        return
    check_sources(model, *files)
    check_folder(out)
    from neumuter.models.adapted import find_source

    if to is not Form.shrink:
        need_packages(f"--to {to.value}", "peft")
        if find_source(model).adapter:
            raise ValueError(ADAPTER_NOTE.format(form=to.value, model=model))
    from neumuter.files import new_folder
    from neumuter.serving import adapters as exports
    from neumuter.serving.saved import find_origin, save_verified
    from neumuter.serving.shrink import shrink

    sets = load_sets(files)
    origin = find_origin(model, gguf_file) if to is Form.shrink else None
    # With an adapter, only shrink comes here.
    network, tokenizer = open_model(model, gguf_file=gguf_file, merge=True)
    mutes = unite(network, sets)
    if to is Form.ia3:
        note = exports.export_ia3(network, mutes, out).note
    elif to in (Form.lora, Form.vllm_lora):
        note = exports.export_lora(network, mutes, out, one_rank=to is Form.vllm_lora).note
    elif to is Form.shrink:
        with new_folder(out) as temporary:
            found = shrink(network, mutes)
            save_verified(network, tokenizer, temporary, origin)
        widths = ", ".join(sorted({f"{old} to {new}" for old, new in found.widths.values()}))
        sizes = f"{found.bytes_before / 1e6:.4g} to {found.bytes_after / 1e6:.4g} MB"
        note = f"Neurons per FFN: {widths}; parameters: {sizes}."
    if verify:
        # In bfloat16, the rounding of a right export can be more than a tenth of what muting does.
        original, _ = open_model(model, "float32", gguf_file=gguf_file, merge=True)
        difference, effect = exports.largest_difference(original, mutes, out), exports.effect(original, mutes)
        console.print(
            f"Largest difference of logits to the live muted model: {difference:.3g}; to the original, "
            f"which is what muting does: {effect:.3g}"
        )
        if not difference <= MAX_DIFFERENCE * effect:
            raise RuntimeError(f"{out} does not compute what the muted model does: do not serve it")
    console.print(f"Written to {escape(str(out))}. {escape(note)}", soft_wrap=True)


def _is_gguf(model: str, gguf_file: str | None) -> bool:
    return gguf_file is None and Path(model).suffix.lower() == ".gguf"


def _the_only(files: Sequence[Path]) -> Path:
    """The mute file for a GGUF file, which takes one at a time."""
    if len(files) > 1:
        raise typer.BadParameter(
            "a GGUF file takes only one mute file. Unite several with neumuter.combine, on the model that "
            "the GGUF file was made from"
        )
    need_packages("a GGUF file as MODEL", "gguf")
    return files[0]


def _fold_gguf(model: Path, files: Sequence[Path], out: Path) -> None:
    file = _the_only(files)
    from neumuter.report.progress import show_progress
    from neumuter.serving.fold_gguf import fold_gguf

    with show_progress("Folding, bytes") as advance:
        found = fold_gguf(model, file, out, callback=advance)
    for name, count in found.coarse.items():
        console.print(f"{name}: float16 holds the scales of {count} rows, times their gains, coarsely only.")
    console.print(f"{found.neurons} neurons folded; the new file is {escape(str(out))}", soft_wrap=True)


def _export_gguf_lora(
    model: str, files: Sequence[Path], out: Path, verify: bool, gguf_file: str | None
) -> None:
    file = _the_only(files)
    if verify or not _is_gguf(model, gguf_file):
        raise typer.BadParameter("--to gguf-lora needs a GGUF file as MODEL, and has no --verify")
    from neumuter.serving.gguf_lora import export_gguf_lora

    export_gguf_lora(model, file, out)
    console.print(
        f"Written to {escape(str(out))}. Serve it: llama-server -m {model} --lora {out}", soft_wrap=True
    )


def _fold_files(model: str, files: Sequence[Path], out: Path, gguf_file: str | None) -> "MuteSet":
    """Fold into a copy of the checkpoint: on disk where that is possible, else through a loaded model."""
    check_sources(model, *files)
    check_folder(out)
    from neumuter.files import new_folder
    from neumuter.models.adapted import find_source
    from neumuter.report.progress import show_progress
    from neumuter.serving.companions import write_card
    from neumuter.serving.fold import fold as fold_live
    from neumuter.serving.fold_checkpoint import NotOnDiskError, fold_checkpoint
    from neumuter.serving.saved import find_origin, save_verified

    sets = load_sets(files)
    whole = not gguf_file and not find_source(model).adapter
    if len(sets) == 1 and whole and any((Path(model) / name).is_file() for name in SHARDS):
        mutes = sets[0]
        with suppress(NotOnDiskError), show_progress("Folding, bytes") as advance:
            fold_checkpoint(model, mutes, out, callback=advance)
            return mutes
    origin = find_origin(model, gguf_file)
    with new_folder(out) as temporary:
        network, tokenizer = open_model(model, gguf_file=gguf_file, merge=True)
        mutes = unite(network, sets)
        fold_live(network, mutes)
        with console.status("Saving the checkpoint"):
            save_verified(network, tokenizer, temporary, origin)
            write_card(mutes, temporary)
    return mutes
