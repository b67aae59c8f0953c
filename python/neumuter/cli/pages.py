"""The page about each request that ``neumuter verify`` writes for an auditor; it quotes no text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from neumuter.cli.common import console

if TYPE_CHECKING:
    from neumuter.ledger import Fit, Request
    from neumuter.verifying import Check


def write_pages(out: Path, checks: list[Check], target: str, head: str) -> None:
    from neumuter.files import made_folder
    from neumuter.report.html import write_report

    with made_folder(out) as made:
        for check in checks:
            write_report(
                made / f"request-{check.request.number}.html", _page(check, target, head), redact=True
            )
    console.print(f"A page of each request is in {escape(str(out))}.", highlight=False, soft_wrap=True)


def _page(check: Check, target: str, head: str) -> Mapping[str, object]:
    request = check.request
    return {
        "title": f"Request {request.number}{f' ({request.name})' if request.name else ''}: {check.state}",
        "model": target,
        "verdict_sentence": check.sentence,
        "comparisons": check.verdict.figures() if check.verdict else [],
        "metrics": check.metrics,
        "controls": check.controls,
        "texts": check.texts or [],
        "record": _record(request) | {"the ledger's last hash": head},
    }


def describe_fit(fit: Fit) -> str:
    """Say which mute set it is: by the number of its entry, and the model that it was made for."""
    model = fit.entry["report"].get("model")
    return f"entry {fit.entry['number']}{f', for {model}' if model else ''}"


def _record(request: Request) -> dict[str, str]:
    entry = request.entry
    return {
        "added": entry["time"],
        "texts": str(len(request.texts)),
        "verdict then": entry["report"]["verdict_sentence"],
        "neurons": f"{entry['report']['muted_neurons']} ({entry['report']['muted_share']:.2%})",
        "seed": str(entry["report"]["seed"]),
        "versions then": ", ".join(f"{name} {number}" for name, number in entry["versions"].items()),
        "SHA-256 of the mute file": entry["files"]["mutes.safetensors"],
        "SHA-256 of the fingerprint": entry["fingerprint"],
        "hash of the entry": entry["hash"],
        **{f"fitted anew: {describe_fit(fit)}": _record_fit(fit) for fit in request.fits[1:]},
    }


def _record_fit(fit: Fit) -> str:
    return (
        f"{fit.entry['time']}. {fit.entry['report']['verdict_sentence']} SHA-256 of the mute file: "
        f"{fit.entry['files']['mutes.safetensors']}; hash of the entry: {fit.entry['hash']}"
    )
