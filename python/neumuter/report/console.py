"""What the command line prints: one function per table."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from neumuter.cli.doctor import Speed, Verdict
    from neumuter.mutes.mute_set import MuteSet
    from neumuter.training.plan import Plan

console = Console()


def print_metrics(columns: Mapping[str, Mapping[str, float]]) -> None:
    """One line per metric, a column per state, and what each metric is."""
    from neumuter.evaluation import METRICS

    table, definitions = Table("metric", *columns, "good"), []
    for name, metric in METRICS.items():
        values = [metrics.get(name) for metrics in columns.values()]
        if any(value is not None for value in values):
            cells = ("" if value is None else f"{value:.4g}" for value in values)
            table.add_row(metric.title, *cells, metric.good)
            source = f" ({metric.source})" if metric.source else ""
            definitions.append(f"[bold]{metric.title}[/]: {metric.definition}{source}")
    for name in dict.fromkeys(name for metrics in columns.values() for name in metrics if "/" in name):
        cells = (f"{m[name]:.4g}" if name in m else "" for m in columns.values())
        table.add_row(escape(name), *cells, "as before")
    console.print(table)
    console.print("\n".join(definitions), highlight=False)


def print_robustness(states: Mapping[str, Mapping[str, float]]) -> None:
    """One line per metric, a column per state of ``neumuter.evaluation.robustness``."""
    from neumuter.evaluation import METRICS
    from neumuter.evaluation.robustness import EXPLAINED

    table = Table("metric", *states)
    for name, metric in METRICS.items():
        if name in states["half"]:
            table.add_row(metric.title, *(f"{metrics[name]:.4g}" for metrics in states.values()))
    console.print(table)
    console.print(EXPLAINED)


def print_curve(curve: Sequence[Mapping[str, Any]]) -> None:
    table = Table("neurons", "share", "texts still extracted", "MA", "goals")
    for point in curve:
        extraction, ma = f"{point['forget_extraction']:.2f}", f"{point['forget_ma']:.3f}"
        met = "met" if point["met"] else "missed"
        table.add_row(str(point["neurons"]), f"{point['share']:.2%}", extraction, ma, met)
    console.print(table)
    if not any(point["met"] for point in curve):
        console.print("[bold yellow]No budget tried meets the goals:[/] the largest one is kept.")


def print_plan(
    found: Plan, gpus: int, memory: float, card: str, batch: tuple[int, int], served: tuple[int, int]
) -> None:
    seconds, binds = found.step_seconds(card)
    facts = Table(show_header=False)
    rows = {
        "model": f"{found.model}, {found.parameters / 1e9:.3g} billion parameters",
        "neurons under masks": f"{found.neurons} ({found.masks / 1e6:.3g} MB with gradients and Adam)",
        "a training step": f"{2 * batch[0]} texts of {batch[1]} tokens a device: {found.flops / 1e12:.3g} "
        f"TFLOP, {found.moved / 1e9:.3g} GB moved",
        f"time on one {card}": f"at least {seconds * 1e3:.3g} ms by the data sheet, bound by {binds}",
        "serving": f"{found.serving(*served) / 1e9:.3g} GB for {served[0]} sequences of {served[1]} tokens "
        f"with one mute set ({4 * found.neurons / 1e6:.3g} MB); a decoded token reads up to "
        f"{found.weights / 1e9:.3g} GB of weights",
    }
    for name, value in rows.items():
        facts.add_row(name, value)
    console.print(facts)
    table = Table(
        f"training on {gpus}", "weights", "activations", "rest", "peak, GB each", f"fits {memory:g} GB"
    )
    for layout, sizes in found.layouts.items():
        peak = sum(sizes.values())
        rest = peak - sizes["weights"] - sizes["activations"]
        numbers = (f"{x / 1e9:.3g}" for x in (sizes["weights"], sizes["activations"], rest, peak))
        table.add_row(layout, *numbers, "yes" if peak <= 0.95e9 * memory else "no")
    console.print(table)
    console.print(
        "It fits with 5 % to spare, or not: then fewer --samples, --checkpointing or more devices help."
    )


def print_environment(pairs: Sequence[tuple[str, str]]) -> None:
    table = Table(show_header=False)
    for what, value in pairs:
        table.add_row(what, escape(value))
    console.print(table)


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    table = Table("op", "on", "by", "agrees with the reference")
    for device, op, backend, error in verdicts:
        table.add_row(op, device, escape(backend), f"[bold red]no:[/] {escape(error)}" if error else "yes")
    console.print(table)
    if any(verdict.error for verdict in verdicts):
        console.print("[bold red]A kernel fails here:[/] please report it, with the text below.")


def print_speeds(speeds: Sequence[Speed]) -> None:
    table = Table("on", "ours, ms", "eager, ms", "copy of as much, ms", "to eager", "of copy bandwidth")
    for speed in speeds:
        times = (f"{1e3 * x:.3g}" for x in (speed.ours, speed.eager, speed.copy))
        table.add_row(speed.device, *times, f"{speed.ratio:.2f}×", f"{speed.share:.0%}")
    console.print(table)
    console.print("; ".join(dict.fromkeys(speed.problem for speed in speeds)) + ". Medians.")


def print_outcome(mutes: MuteSet, path: Path, seconds: float) -> None:
    table = Table("", "before", "after")
    before, after = mutes.metrics["before"], mutes.metrics["after"]
    for key, name in (
        ("forget_ma", "forget: MA (share of tokens that are the most likely one)"),
        ("forget_loss", "forget: mean token loss (nats)"),
        ("retain_loss", "neighbours: mean token loss (nats)"),
    ):
        table.add_row(name, f"{before[key]:.3f}", f"{after[key]:.3f}")
    console.print(table)
    if after["forget_loss"] <= before["forget_loss"]:
        papers = mutes.method.get("recipe") == "gates"
        advice = "--recipe fitted" if papers else "more --steps or a larger --budget"
        console.print(
            f"[bold yellow]The forget texts are as likely as before:[/] nothing was forgotten. Try {advice}."
        )
    console.print(
        f"{mutes.count} neurons ({mutes.share:.2%}), mode {mutes.mode}, {seconds:.0f} s, peak memory "
        f"{peak_memory() / 2**30:.1f} GiB. The mute file is {escape(str(path))}. It suppresses the texts; "
        "it does not prove that no trace of them is left."
    )


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of the process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
