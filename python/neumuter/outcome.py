"""What a run found: the mute set, what the model knew before and knows after, and the files of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from neumuter.files import PathLike, write_atomically
from neumuter.mutes.mute_set import MuteSet
from neumuter.report.console import outcome_sentences, outcome_table, render_html, render_text
from neumuter.report.html import write_report

MUTE_FILE = "mutes.safetensors"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What ``unlearn`` found.

    mutes: the neurons to mute and their gains; ``neumuter.mute(model, outcome.mutes)`` applies them.
    before, after: metrics without and with them, {name: value}; see ``neumuter.evaluation.METRICS``.
    curve: for ``budget="auto"`` a point for each budget tried.
    history: {"step", "loss", "forget_loss", "kl", "muted"} of each step of the search.
    samples: {"prompt", "truth", "before", "after"} of the first forget texts: what the model says.
    seconds: of the whole job. peak_memory: bytes, of the GPU where there is one, else of the process.
    """

    mutes: MuteSet
    before: dict[str, float]
    after: dict[str, float]
    curve: list[dict[str, Any]] | None
    history: list[dict[str, Any]]
    samples: list[dict[str, str]]
    seconds: float
    peak_memory: int

    def save(self, folder: PathLike, **facts: Any) -> Path:
        """Write mutes.safetensors, report.json and report.html into ``folder``, which is made if missing.

        Args:
            facts: further entries of the report, JSON values, such as ``model="…"``.

        Returns:
            The path of the mute file.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.mutes.save(folder / MUTE_FILE)
        report = facts | {
            "mode": self.mutes.mode,
            "muted_neurons": self.mutes.count,
            "muted_share": self.mutes.share,
            "method": self.mutes.method,
            "seed": self.mutes.seed,
            "curve": self.curve,
            "before": self.before,
            "after": self.after,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory,
        }
        write_atomically(folder / "report.json", (json.dumps(report, indent=2) + "\n").encode())
        write_report(folder / "report.html", report | {"history": self.history}, self.mutes, self.samples)
        return folder / MUTE_FILE

    def __repr__(self) -> str:
        return render_text(outcome_table(self.before, self.after)) + "\n".join(self._sentences())

    def _repr_html_(self) -> str:
        return render_html(self.before, self.after, self._sentences())

    def _sentences(self) -> list[str]:
        return outcome_sentences(self.mutes, self.seconds, self.peak_memory)
