"""What terminals and notebooks show of an outcome."""

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table

from neumuter.mutes.mute_set import MuteSet

WIDTH = 100
ROWS = {
    "forget_ma": "forget: MA (share of tokens that are the most likely one)",
    "forget_loss": "forget: mean token loss (nats)",
    "retain_loss": "retain: mean token loss (nats)",
}


def outcome_table(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    """Build the table of what was measured before and after."""
    table = Table("", "before", "after")
    for name, *values in _rows(before, after):
        table.add_row(name, *values)
    return table


def outcome_sentences(mutes: MuteSet, seconds: float, peak_memory: int) -> list[str]:
    """Say in sentences what was found and what it means."""
    before, after = mutes.metrics["before"], mutes.metrics["after"]
    sentences = []
    if after["forget_loss"] <= before["forget_loss"]:
        paper = mutes.method.get("recipe") == "paper"
        advice = "the fitted recipe" if paper else "more steps or a larger budget"
        sentences.append(f"The forget texts are as likely as before: nothing was forgotten. Try {advice}.")
    return [
        *sentences,
        f"{mutes.count} neurons ({mutes.share:.2%}), mode {mutes.mode}, {seconds:.0f} s, peak memory "
        f"{peak_memory / 2**30:.1f} GiB.",
        "Muting suppresses the texts; it does not prove that no trace of them is left.",
    ]


def curve_table(curve: Sequence[Mapping[str, Any]]) -> Table:
    """Build the table of a search: one row for each budget tried."""
    table = Table("neurons", "share", "texts still extracted", "MA", "goals")
    for point in curve:
        extraction, ma = f"{point['forget_extraction']:.2f}", f"{point['forget_ma']:.3f}"
        met = "met" if point["met"] else "missed"
        table.add_row(str(point["neurons"]), f"{point['share']:.2%}", extraction, ma, met)
    return table


def render_text(table: Table) -> str:
    """Render a table as plain text."""
    plain = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    with plain.capture() as capture:
        plain.print(table)
    return capture.get()


def render_html(before: Mapping[str, float], after: Mapping[str, float], sentences: Sequence[str]) -> str:
    """Render an outcome for a notebook."""
    cells = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th><td>{old}</td><td>{new}</td></tr>"
        for name, old, new in _rows(before, after)
    )
    head = "<tr><th></th><th>before</th><th>after</th></tr>"
    return f"<table>{head}{cells}</table><p>{escape(' '.join(sentences))}</p>"


def _rows(before: Mapping[str, float], after: Mapping[str, float]) -> list[tuple[str, str, str]]:
    return [(name, f"{before[key]:.3f}", f"{after[key]:.3f}") for key, name in ROWS.items()]
