"""What several commands check before they load a model, because loading takes minutes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer


class Quantize(str, Enum):
    """Weights of 4 or 8 bits, by bitsandbytes."""

    four = "4bit"
    eight = "8bit"


Device = Annotated[
    str | None, typer.Option(help="Where the model runs, such as cuda:1. Default: the GPU, if there is one.")
]
DeviceMap = Annotated[
    str | None, typer.Option(help="How accelerate spreads the model over devices, such as auto.")
]
Quantized = Annotated[
    Quantize | None, typer.Option("--quantize", help="Quantise the weights while they load, by bitsandbytes.")
]
Attention = Annotated[
    str | None, typer.Option("--attn", help="Implementation of attention, such as eager or sdpa.")
]


def choose_place(
    device: str | None,
    device_map: str | None,
    quantize: Quantize | None,
    attention: str | None,
    gguf_file: str | None,
) -> dict[str, Any]:
    """Put the options of where and how a model runs into what ``load_model`` takes."""
    if device and device_map:
        raise typer.BadParameter("--device cannot be combined with --device-map")
    if quantize and gguf_file:
        raise typer.BadParameter(
            "--quantize cannot be combined with --gguf-file, whose weights are quantised already"
        )
    if device_map or quantize:
        need_packages("--quantize" if quantize else "--device-map", "accelerate")
    if quantize:
        need_packages("--quantize", "bitsandbytes")
    return {
        "device": device, "device_map": device_map, "quantize": quantize and quantize.value,
        "attention": attention, "gguf_file": gguf_file,
    }  # fmt: skip


def need_packages(option: str, *packages: str) -> None:
    """Raise ImportError if an option needs packages that are not installed."""
    if missing := [name for name in packages if find_spec(name.replace("-", "_")) is None]:
        raise ImportError(f"{option} needs {', '.join(missing)}: pip install {' '.join(missing)}")


def parse_budget(text: str) -> int | float | str:
    """Read ``--budget``: a share (0.01 or 1%), a number of neurons (300) or auto."""
    if text == "auto":
        return text
    if text == "1":
        raise typer.BadParameter("--budget 1 can mean one neuron or all of them: write 1% or 1.0")
    try:
        if text.endswith("%"):
            number: int | float = float(text[:-1]) / 100
        else:
            number = float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        raise typer.BadParameter(
            f"--budget must be a share (0.01 or 1%), a number (300) or auto, got {text!r}"
        ) from None
    if not 0 < number <= 1 and (isinstance(number, float) or number < 1):
        raise typer.BadParameter(f"--budget must be a share in (0, 1] or a number from 2 on, got {text!r}")
    return number


def check_sources(model: str, *files: Path | None) -> None:
    """Raise OSError if a file, or the model, is not there; for an adapter, what ``find_source`` raises."""
    from neumuter.models.adapted import find_source

    for file in files:
        if file:
            file.stat()
    find_source(model)


def read_config(model: str) -> Any:
    """Read the config of a model, or of the base of an adapter."""
    from transformers import AutoConfig

    from neumuter.models.adapted import find_source

    source = find_source(model)
    return AutoConfig.from_pretrained(
        source.base, trust_remote_code=False, local_files_only=source.cached, revision=source.revision
    )


def check_size(
    model: str,
    start_layer: int,
    budget: int | float | str | None,
    layout: str = "ddp",
    processes: int = 1,
    quantize: str | None = None,
) -> None:
    """Raise ValueError if a model has no such layer, fewer neurons or no such layout, by its config alone."""
    import torch
    from transformers import AutoModelForCausalLM

    from neumuter.models.layouts import check_layout
    from neumuter.models.quantised import make_quantisation
    from neumuter.training.masked import split_ffns
    from neumuter.training.selection import neuron_count

    config = read_config(model)
    if quantize:
        config.quantization_config = make_quantisation(quantize)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    _, ffns = split_ffns(network, start_layer)
    if isinstance(budget, int | float):
        neuron_count(budget, sum(ffn.width for ffn in ffns))
    check_layout(layout, network, processes)


def refuse_replaced(out: Path, sources: Mapping[str, Iterable[Path]]) -> None:
    """Raise BadParameter if a file that an option names is in ``out``, where it would be replaced."""
    for option, files in sources.items():
        for file in files:
            if file.resolve().parent == out.resolve():
                raise typer.BadParameter(f"{option} {file} would be replaced: name another folder for --out")


def check_results(out: Path, overwrite: bool) -> None:
    """Raise OSError if nothing can be written into ``out``, or something would be lost there."""
    from neumuter.files import check_writable
    from neumuter.outcome import MUTE_FILE

    if (out / MUTE_FILE).exists() and not overwrite:
        raise FileExistsError(f"{out / MUTE_FILE} exists: name another folder, or replace it by --overwrite")
    check_writable(out)


def check_run(out: Path, overwrite: bool, resume: bool) -> None:
    """Do as ``check_results`` for a run that may go on with an unfinished one in ``out``."""
    from neumuter.training.journal import UNFINISHED, refuse_unfinished

    if resume and (out / UNFINISHED).exists():
        # A run that was killed while it measured has written its mute file already.
        overwrite = True
    elif not overwrite:
        refuse_unfinished(out)
    check_results(out, overwrite)


def check_report(out: Path | None) -> None:
    """Raise ValueError or OSError if ``--out`` cannot be a report in JSON."""
    from neumuter.files import check_writable

    if out is None:
        return
    if out.suffix.lower() != ".json":
        raise typer.BadParameter(f"--out must be a file that ends with .json, got {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out: no such folder: {out.parent}")
    check_writable(out.parent)


def check_folder(out: Path) -> None:
    """Raise OSError or ValueError if ``out`` is taken, or cannot be made."""
    from neumuter.files import check_writable, refuse_taken

    refuse_taken(out)
    check_writable(out.parent)
