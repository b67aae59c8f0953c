"""``neumuter doctor``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer
from rich.markup import escape
from rich.table import Table

from neumuter.cli.common import console

if TYPE_CHECKING:
    from neumuter.cli.diagnosis import Speed, Verdict


def doctor() -> None:
    """Test the kernels on this machine, measure their speed, and print what a bug report needs."""
    from neumuter.cli import diagnosis

    # Printed before anything can crash.
    environment = diagnosis.environment()
    print_environment(environment)
    with console.status("Testing the kernels"):
        verdicts = list(diagnosis.self_test())
    print_verdicts(verdicts)
    with console.status("Measuring their speed"):
        speeds = list(diagnosis.speed_check())
    print_speeds(speeds)
    console.print("\nFor a bug report, from here on:\n", style="bold")
    text = diagnosis.bug_report(environment, verdicts, speeds)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if any(verdict.error for verdict in verdicts):
        raise typer.Exit(1)


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
        console.print("[bold red]A kernel fails here:[/] please report it with the text below.")


def print_speeds(speeds: Sequence[Speed]) -> None:
    table = Table("on", "ours, ms", "eager, ms", "copying, ms", "to eager", "of copy bandwidth")
    for speed in speeds:
        times = (f"{1e3 * x:.3g}" for x in (speed.ours, speed.eager, speed.copy))
        table.add_row(speed.device, *times, f"{speed.ratio:.2f}×", f"{speed.share:.0%}")
    console.print(table)
    console.print("; ".join(dict.fromkeys(speed.problem for speed in speeds)) + ". Medians.")
