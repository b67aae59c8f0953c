"""``neumuter plan``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from neumuter.cli.common import Dtype, console

if TYPE_CHECKING:
    from neumuter.training.plan import Fitting


def plan(
    config: Annotated[Path, typer.Argument(help="A config.json, or the folder that has one.")],
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    gpus_per_machine: Annotated[int, typer.Option(min=1, help="Number of GPUs in a machine.")] = 8,
    memory: Annotated[float, typer.Option(min=1e-6, help="Memory of each GPU, in GB (10^9 bytes).")] = 80.0,
    card: Annotated[
        str, typer.Option(help="GPU whose data sheet the times are from: A100, H100, H200, B200 or MI300X.")
    ] = "H100",
    samples: Annotated[
        int, typer.Option(min=1, help="Texts of each kind per step and GPU; at least 4 are planned for.")
    ] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per text.")] = 256,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences served at a time.")] = 8,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a served sequence.")] = 8192,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the weights.")] = Dtype.auto,
) -> None:
    """Plan what unlearning and serving would take, and what fits, from the config of a model alone.

    Of a copy on each GPU, FSDP2, tensor parallelism, both together and one process, it names the fastest
    that fits. Times are by the data sheets of the GPU and of what joins GPUs; nobody has measured them. If
    nothing fits as asked, activations are recomputed in the backward pass. If that is not enough, the number
    of texts in a step is halved until a layout fits.
    """
    import torch

    from neumuter.training import plan as planning
    from neumuter.training.pace import CARDS

    if card not in CARDS:
        raise typer.BadParameter(f"--card must be one of {', '.join(CARDS)}, got {card!r}")
    if gpus > gpus_per_machine and gpus % gpus_per_machine:
        raise typer.BadParameter(
            f"--gpus must be at most --gpus-per-machine, or a multiple of it; got {gpus} and "
            f"{gpus_per_machine}"
        )
    loaded = planning.load_config(config)
    wanted = (getattr(loaded, "dtype", None) or "bfloat16") if dtype is Dtype.auto else dtype.value
    wanted = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    with console.status("Counting"):
        batch = samples * gpus
        found = planning.find_fitting(
            loaded, 1e9 * memory, gpus, batch, tokens, wanted, gpus_per_machine, card=card
        )
    print_plan(found, gpus, memory, card, tokens, (sequences, context))
    if found.layout is None:
        console.print("No layout fits. Take fewer --tokens, or more or larger GPUs.")
        return
    how = f" with {found.batch} texts of each kind in a step" * (found.batch < batch)
    how += " and" * bool(how and found.recompute) + " with recomputed activations" * found.recompute
    how += ", and is the fastest that does, by the data sheet" * (gpus > 1)
    folder = config if config.is_dir() else config.parent
    command = write_command(found, str(folder), gpus, tokens, gpus_per_machine)
    where = (
        f" on each of the {gpus // gpus_per_machine} machines, with the address of one of them as HOST. Each "
        "machine needs the model and both files; one machine writes FOLDER"
    ) * (gpus > gpus_per_machine)
    console.print(
        f"{found.layout} fits{how}. Start this command{where}:\n{escape(command)}",
        highlight=False,
        soft_wrap=True,
    )


def write_command(found: Fitting, model: str, gpus: int, tokens: int, machine: int) -> str:
    """Write the command that unlearns in the layout that fits; machine: GPUs of each machine."""
    from neumuter.training.plan import LAYOUTS

    start, option = "neumuter", " --device-map auto" if found.layout == "device_map" else ""
    if layout := LAYOUTS.get(found.layout or ""):
        local = min(gpus, machine)
        rendezvous = f"--nnodes {gpus // local} --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
        start = f"torchrun {rendezvous * (gpus > local)}--nproc-per-node {local} -m neumuter"
        option = f" --layout {layout}" * (layout != "ddp")
    option += " --recompute" * found.recompute
    return (
        f"{start} unlearn {shlex.quote(model)} --forget FILE --retain FILE --out FOLDER "
        f"--batch-size {found.batch} --max-length {tokens}{option}"
    )


def print_plan(
    fitting: Fitting, gpus: int, memory: float, card: str, tokens: int, served: tuple[int, int]
) -> None:
    from neumuter.training.plan import FILLED

    found = fitting.plan
    facts = Table(show_header=False)
    rows = {
        "model": f"{found.model}, {found.parameters / 1e9:.3g} billion parameters",
        "neurons under masks": f"{found.neurons} ({found.masks / 1e6:.3g} MB with gradients and Adam)",
        "a training step": f"{2 * fitting.samples} texts of {tokens} tokens a device: "
        f"{found.flops / 1e12:.3g} TFLOP, {found.moved / 1e9:.3g} GB moved"
        + ", activations recomputed"
        * fitting.recompute,
        "serving": f"{found.serving(*served) / 1e9:.3g} GB for {served[0]} sequences of {served[1]} tokens "
        f"with one mute set ({4 * found.neurons / 1e6:.3g} MB); a decoded token reads up to "
        f"{found.weights / 1e9:.3g} GB of weights",
    }
    for name, value in rows.items():
        facts.add_row(name, value)
    console.print(facts)
    table = Table(
        f"training on {gpus}", "weights", "activations", "rest", "peak, GB each", f"fits {memory:g} GB",
        f"ms a step by the data sheet of {card}",
    )  # fmt: skip
    for layout, sizes in found.layouts.items():
        peak = sum(sizes.values())
        rest = peak - sizes["weights"] - sizes["activations"]
        numbers = (f"{x / 1e9:.3g}" for x in (sizes["weights"], sizes["activations"], rest, peak))
        fits = "yes" if peak <= FILLED * 1e9 * memory else "no"
        table.add_row(layout, *numbers, fits, f"{1e3 * found.seconds[layout][card]:,.1f}")
    console.print(table)
    for layout, reason in found.refused.items():
        console.print(f"No {layout}: {escape(reason)}", highlight=False)
