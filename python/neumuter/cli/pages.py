"""The page about each request that ``neumuter verify`` writes for an auditor; it quotes no text."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from neumuter.cli.common import console
from neumuter.files import hash_file, made_folder

if TYPE_CHECKING:
    from neumuter.ledger import Fit, Request
    from neumuter.verifying import Check


# Of a folder, what holds weights.
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


def describe_server(url: str, name: str, mute_set: str | None) -> dict[str, str]:
    """Say which server was asked for what."""
    return {"server": url, "its model": name} | ({"mute set": mute_set} if mute_set else {})


def describe_weights(target: str, applied: bool, controls: Path | None) -> dict[str, str]:
    """Say which weights were checked, by the SHA-256 of each file if they are in a folder, and how."""
    folder = Path(target)
    files = sorted(file for kind in WEIGHTS for file in folder.glob(kind)) if folder.is_dir() else []
    return {
        "model": target,
        "mutes": "those of the requests, applied for this check" if applied else "as the model is",
        "controls": str(controls) if controls else "made from the texts",
    } | {f"SHA-256 of {file.name}": hash_file(file) for file in files}


def write_pages(out: Path, checks: list[Check], facts: Mapping[str, str], head: str) -> None:
    """Write the page of each check into the folder ``out``, and say so.

    Args:
        facts: {title: value} of what was checked.
        head: the ledger's last hash.
    """
    from neumuter.report.html import write_report

    checked = {"checked": datetime.now(timezone.utc).isoformat(timespec="seconds"), **facts}
    with made_folder(out) as made:
        for check in checks:
            page = _make_page(check, checked | _record(check.request) | {"the ledger's last hash": head})
            write_report(made / f"request-{check.request.number}.html", page, redact=True)
    console.print(f"A page of each request is in {escape(str(out))}.", highlight=False, soft_wrap=True)


def _make_page(check: Check, record: Mapping[str, str]) -> Mapping[str, object]:
    request = check.request
    return {
        "title": f"Request {request.number}{f' ({request.name})' if request.name else ''}: {check.state}",
        "verdict_sentence": check.sentence,
        "comparisons": check.verdict.figures() if check.verdict else [],
        "metrics": check.metrics,
        "controls": check.controls,
        "texts": check.texts or [],
        "record": record,
        "command": shlex.join(["neumuter", *sys.argv[1:]]),
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
