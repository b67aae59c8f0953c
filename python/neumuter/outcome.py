"""What a run found: the mute set, what the model knew before and knows after, and the files of it."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

from neumuter.evaluation.verdict import Verdict
from neumuter.files import PathLike, made_folder, write_atomically, write_json
from neumuter.mutes.mute_set import MuteSet
from neumuter.mutes.slopes import Slopes
from neumuter.report.console import outcome_sentences, outcome_table, render_html, render_text
from neumuter.report.html import write_report
from neumuter.texts.corpus import describe_sample
from neumuter.training.journal import remove_unfinished

MUTE_FILE = "mutes.safetensors"
SLOPES_FILE = "slopes.safetensors"
# Of report.csv.
COLUMNS = (
    "number", "windows", "windows_measured", "tokens", "verdict", "extracted_before", "extracted_after",
    "sampled_before", "sampled_after", "loss_before", "loss_after", "min_k_before", "min_k_after",
    "other_text",
)  # fmt: skip


def write_sets(folder: Path, mutes: MuteSet, slopes: Slopes | None) -> None:
    """Write the mute file and the slopes of one run into ``folder``; slopes of another run are removed."""
    mutes.save(folder / MUTE_FILE)
    if slopes:
        slopes.save(folder / SLOPES_FILE)
    else:
        (folder / SLOPES_FILE).unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What ``unlearn`` found.

    mutes: the neurons to mute and their gains; ``neumuter.mute(model, outcome.mutes)`` applies them.
    before, after: metrics without and with them, {name: value}; see ``neumuter.evaluation.METRICS``.
    controls: the metrics, with the mutes, of texts that the model never saw; None where there are none.
    verdict: whether the texts are forgotten; see ``neumuter.evaluation.judge``.
    texts: of each text to forget its "number" from 1; how many "windows" it has, and "windows_measured", on
    which the rest is measured; how many of their "tokens" count; its "verdict"; before and after whether it
    is "extracted", the chance that it comes out in 100 samples ("sampled"), its "loss" in nats and its
    "min_k", each with "_before" or "_after"; what the model has "said" after its prompt, and whose text that
    is ("other_text"), such as "retain 7", or None.
    texts_given, windows_given: how many texts there are to forget, and how many windows they have. ``texts``
    has those that were measured: of more than 1,024 windows, those of a random sample.
    curve: for ``budget="auto"`` a point for each budget tried.
    history: {"step", "loss", "forget_loss", "kl", "muted"} of each step of the search; of more than 4,096
    steps, of some at even distances and of the last.
    samples: {"prompt", "truth", "before", "after"} of the first forget texts: what the model says.
    seconds: of the whole job. peak_memory: bytes, of the GPU that took most where there is one, else of
    the process; of several processes that of the one which took most.
    max_length, chat: how the texts were read, as ``unlearn`` was told.
    slopes: for ``former`` of later requests, if they were asked for. They are made of the texts.
    """

    mutes: MuteSet
    before: dict[str, float]
    after: dict[str, float]
    controls: dict[str, float] | None
    verdict: Verdict
    texts: list[dict[str, Any]]
    texts_given: int
    windows_given: int
    curve: list[dict[str, Any]] | None
    history: list[dict[str, Any]]
    samples: list[dict[str, str]]
    seconds: float
    peak_memory: int
    max_length: int
    chat: bool | None
    slopes: Slopes | None = None

    @property
    def measured_on(self) -> str | None:
        """The sentence that says what was measured; None where all texts were."""
        windows = sum(row["windows_measured"] for row in self.texts)
        if windows == self.windows_given:
            return None
        share = describe_sample(windows, self.windows_given, len(self.texts), self.texts_given)
        return f"Measured on {share} to forget, drawn at random."

    def save(self, folder: PathLike, redact: bool = False, **facts: Any) -> Path:
        """Write mutes.safetensors, report.json, report.csv and report.html into ``folder``, made if missing.

        report.csv has a row for each text to forget and quotes none. report.html quotes texts unless
        ``redact`` is given, and only its owner may read it. So may slopes.safetensors, if there are slopes.
        What an earlier run left there is replaced, and its slopes are removed; so is the file of an
        unfinished run.

        Args:
            redact: leave out what texts and the model say.
            facts: further entries of the report, JSON values, such as ``model="…"``.

        Returns:
            The path of the mute file.

        Raises:
            OSError: the folder cannot be written.
        """
        report = facts | {
            "mode": self.mutes.mode,
            "muted_neurons": self.mutes.count,
            "muted_share": self.mutes.share,
            "method": self.mutes.method,
            "seed": self.mutes.seed,
            "max_length": self.max_length,
            "chat": self.chat,
            "curve": self.curve,
            "verdict": self.verdict.kind,
            "verdict_sentence": self.verdict.sentence,
            "leaks": self.verdict.leaks,
            "comparisons": self.verdict.figures(),
            "texts_given": self.texts_given,
            "texts_measured": len(self.texts),
            "measured_on": self.measured_on,
            "before": self.before,
            "after": self.after,
            "controls": self.controls,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory,
        }
        shown = report | {"history": self.history, "texts": self.texts}
        with made_folder(folder) as made:
            write_sets(made, self.mutes, self.slopes)
            write_json(made / "report.json", report)
            write_atomically(made / "report.csv", self._rows().encode())
            write_report(made / "report.html", shown, self.mutes, self.samples, redact)
        # Now all that it has found has its place.
        remove_unfinished(folder)
        return made / MUTE_FILE

    def __repr__(self) -> str:
        return render_text(outcome_table(self.before, self.after, self.controls)) + "\n".join(
            self._sentences()
        )

    def _repr_html_(self) -> str:
        return render_html(self.before, self.after, self.controls, self._sentences())

    def _sentences(self) -> list[str]:
        told = outcome_sentences(self.mutes, self.seconds, self.peak_memory)
        return [*told, *filter(None, [self.measured_on]), self.verdict.sentence]

    def _rows(self) -> str:
        file = io.StringIO()
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.texts)
        return file.getvalue()
