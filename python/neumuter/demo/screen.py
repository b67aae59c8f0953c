"""What the demo shows when it is done."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

NEXT = "neumuter unlearn MODEL --forget forget.jsonl --retain retain.jsonl --out forgotten"
COLUMNS = ("forget", "same", "other", "MA", "loss", "perplexity", "neurons", "seconds")
LEGEND = (
    "forget: records to forget that greedy decoding still continues word for word; same, other: likewise, "
    "records to keep of the same and of another template. MA: share of a record's tokens that are the most "
    "likely one; loss: mean over the tokens of the secrets, in nats; both on the records to forget. "
    "perplexity: on held-out text. seconds: to train the model (few if cached) or to find the mutes. "
    "Training on another processor gives another model, so all of it depends on the processor."
)


def show(
    console: Console,
    report: Mapping[str, Any],
    examples: Mapping[str, Mapping[str, Any]],
    closed: int | None,
    out: Path,
) -> None:
    """Print the table, the examples, what the numbers do not show, and where the files are.

    ``closed``: the number of neurons muted with the paper's constants, None if that was not tried.
    """
    rows = {row["name"]: row for row in report["rows"]}
    console.print(_table(rows))
    console.print(LEGEND, style="dim", highlight=False)
    for name, example in examples.items():
        console.print(f"\n[bold]A {name} customer[/]  {escape(example['record'].prompt)} ...")
        for when, text in (("before", example["before"]), ("modulated", example["after"])):
            verdict = "extracted" if text == example["record"].continuation else "not extracted"
            console.print(f"  {when:9} ...{escape(text)}  [dim]({verdict})[/]", highlight=False)
    console.print()
    for sentence in _limits(rows, report["curve"], closed):
        console.print(f"• {sentence}", highlight=False)
    console.print(
        f"\n{escape(str(out))} holds muted.safetensors, modulated.safetensors, model/ (a checkpoint with the "
        f"latter folded in), report.json and report.png. {report['seconds_total']:.0f} s in all.",
        highlight=False,
    )
    console.print(
        f"\n[bold]Next[/], with a model and texts of your own:\n\n    {NEXT}\n\ndocs/quick-start.md goes "
        "through it step by step.",
        highlight=False,
        soft_wrap=True,
    )


def _table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="Twelve customers ask to be forgotten", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    before = rows["before"]["heldout_ppl"]
    for name, row in rows.items():
        change = f" {row['heldout_ppl'] / before - 1:+.1%}" if name != "before" else ""
        table.add_row(
            name,
            f"{row['forget_extraction']:.0%}",
            f"{row['retain_same_extraction']:.0%}",
            f"{row['retain_other_extraction']:.0%}",
            f"{row['forget_ma']:.2f}",
            f"{row['forget_nll']:.2f}",
            f"{row['heldout_ppl']:.1f}{change}",
            f"{row['muted_share']:.1%}",
            f"{row['seconds']:.1f}",
        )
    return table


def _limits(
    rows: Mapping[str, Mapping[str, Any]], curve: Sequence[Mapping[str, Any]], closed: int | None
) -> Iterator[str]:
    """What the numbers of this very run do not show, one sentence each."""
    losses = f"{rows['muted']['forget_nll']:.2f} muted and {rows['modulated']['forget_nll']:.2f} modulated"
    if "retrained" in rows:
        losses += f"; a model that never saw them has {rows['retrained']['forget_nll']:.2f}"
    yield (
        "It suppresses, it does not erase: the mean loss on the forgotten secrets went from "
        f"{rows['before']['forget_nll']:.2f} nats to {losses}."
    )
    smallest = min(curve, key=lambda point: point["muted_share"])["muted_share"]
    points = {point["mode"]: point for point in curve if point["muted_share"] == smallest}
    if len(points) == 2:
        extracted = {mode: point["forget_extraction"] for mode, point in points.items()}
        so = ": so few cannot hold them all in a model this small" if min(extracted.values()) > 0.125 else ""
        yield (
            f"With {smallest:.0%} of the neurons, {extracted['mute']:.0%} of the records are still extracted "
            f"when muted and {extracted['modulate']:.0%} when modulated{so}."
        )
    if closed is not None:
        yield (
            "The share of neurons is given here. NeuMuter's own constants, made for large models, find the "
            f"share by themselves; they mute {closed or 'no'} neuron{'s' if closed > 1 else ''} of this one."
        )
    yield (
        "The retained records were among the texts that the masks were trained to leave alone. The held-out "
        "perplexity is measured on text that neither the model nor the masks have seen."
    )
