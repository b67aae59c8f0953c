"""What terminals and notebooks show of an outcome."""

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table

from neumuter.mutes.mute_set import MuteSet

WIDTH = 100
STATES = ("before", "after", "controls, after")
ROWS = {
    "forget_extraction": "forget: extraction (share of texts)",
    "forget_sampled": "forget: extraction in 100 samples",
    "forget_secrets": "forget: secrets behind the true words (share)",
    "forget_others": "forget: another text instead (share of answers)",
    "forget_ma": "forget: MA (share of tokens)",
    "forget_loss": "forget: mean token loss (nats)",
    "retain_loss": "retain: mean token loss (nats)",
    "own_loss": "texts of its own: mean token loss (nats)",
}
CURVE = {"forget_extraction": "texts still extracted", "forget_secrets": "secrets", "forget_ma": "MA"}


def outcome_table(
    before: Mapping[str, float], after: Mapping[str, float], controls: Mapping[str, float] | None = None
) -> Table:
    """Build the table of what was measured before and after, and of the controls after."""
    head, rows = _rows(before, after, controls)
    table = Table("", *head)
    for name, *values in rows:
        table.add_row(name, *values)
    return table


def outcome_sentences(mutes: MuteSet, seconds: float, peak_memory: int) -> list[str]:
    """Say in sentences what was found and what it means."""
    return [
        f"{mutes.count} neurons ({mutes.share:.2%}), mode {mutes.mode}, {seconds:.0f} s, peak memory "
        f"{peak_memory / 2**30:.1f} GiB.",
        "Muting suppresses the texts; it does not prove that no trace of them is left.",
    ]


def curve_table(curve: Sequence[Mapping[str, Any]]) -> Table:
    """Build the table of a search: one row for each budget tried."""
    measured = {name: head for name, head in CURVE.items() if all(name in point for point in curve)}
    table = Table("neurons", "share", *measured.values(), "goals")
    for point in curve:
        found = [f"{point[name]:.3f}" for name in measured]
        met = "met" if point["met"] else "missed"
        table.add_row(str(point["neurons"]), f"{point['share']:.2%}", *found, met)
    return table


def render_text(table: Table) -> str:
    """Render a table as plain text."""
    plain = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    with plain.capture() as capture:
        plain.print(table)
    return capture.get()


def render_html(
    before: Mapping[str, float],
    after: Mapping[str, float],
    controls: Mapping[str, float] | None,
    sentences: Sequence[str],
) -> str:
    """Render an outcome for a notebook."""
    head, rows = _rows(before, after, controls)
    cells = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th>{''.join(f'<td>{v}</td>' for v in values)}</tr>"
        for name, *values in rows
    )
    titles = "".join(f"<th>{title}</th>" for title in ("", *head))
    return f"<table><tr>{titles}</tr>{cells}</table><p>{escape(' '.join(sentences))}</p>"


def _rows(*states: Mapping[str, float] | None) -> tuple[Sequence[str], list[list[str]]]:
    """The heads of the columns, and (what it is, a value for each state) of each figure."""
    known = {title: state for title, state in zip(STATES, states, strict=True) if state}
    rows = [
        [name, *(f"{state[key]:.3f}" if key in state else "" for state in known.values())]
        for key, name in ROWS.items()
        if any(key in state for state in known.values())
    ]
    return list(known), rows
