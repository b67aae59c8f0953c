"""The job of the demo from end to end."""

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from neumuter import evaluation
from neumuter.demo import screen, task
from neumuter.demo.model import Training, build, load_or_train
from neumuter.files import PathLike, write_atomically
from neumuter.mutes.mute_set import MuteSet
from neumuter.recipes import (
    FittedConfig,
    GainsConfig,
    PaperConfig,
    SupportConfig,
    mute_by_attribution,
    mute_random,
    train_gates,
)
from neumuter.report.progress import show_progress
from neumuter.serving.fold import fold
from neumuter.serving.live import mute
from neumuter.serving.saved import save_verified
from neumuter.training.batches import PairedBatches
from neumuter.training.masked import attach
from neumuter.training.selection import NothingSelectedError
from neumuter.types import Batch
from neumuter.unlearning import unlearn

BUDGET = 0.10
CURVE = {"mute": (0.01, 0.02, 0.05, 0.10, 0.15), "modulate": (0.01, 0.02, 0.05, 0.10)}
# A few windows of ordinary text among the retain texts protect the perplexity. As they thin out KL per token,
# silencing has a larger η than by default, and gains have a smaller KL budget.
RETAIN_WINDOWS = 8
RECIPE = FittedConfig(
    GainsConfig(kl_target=0.015),
    SupportConfig(steps=60, kl_weight=10.0, batch_size=None),
)


def run_demo(
    out: PathLike, seed: int = 0, fresh: bool = False, console: Console | None = None, short: bool = False
) -> dict[str, Any]:
    """Train a small model on made-up records, make it forget twelve of them, measure and report.

    Args:
        out: folder for muted.safetensors, modulated.safetensors, model/ (a checkpoint with the modulated
            mute set folded in), report.json and report.png; made if missing. Earlier results are replaced
            one by one, each whole.
        seed: seed of the records, the training and the masks.
        fresh: train even if the models are in the cache.
        console: where the progress and the tables go; by default stdout.
        short: leave out the retrained model, the paper's constants, and the points of the curve that no row
            of the table needs.

    Returns:
        What report.json holds: {"rows", "curve", "seconds_total"}.

    Raises:
        OSError: ``out`` or the cache cannot be written.
        ImportError: matplotlib, which draws report.png, is not installed.
    """
    # Imported before any work, because matplotlib may be missing.
    from neumuter.demo import figure

    start = time.perf_counter()
    console = console or Console()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    files = {"muted": out / "muted.safetensors", "modulated": out / "modulated.safetensors"}
    console.print("Reading ordinary text, and training a tokenizer and a model on it", style="dim")
    job = _Job(seed, fresh, console)
    before = job.row("before", build(job.state), 0.0, job.seconds)
    rows = [before]
    for name, mode in (("muted", "mute"), ("modulated", "modulate")):
        mutes, seconds = job.find(BUDGET, mode)
        mutes.save(files[name])
        model = build(job.state)
        with mute(model, files[name]):
            rows.append(job.row(name, model, mutes.share, seconds))
        metrics = {"before": _metrics(before), "after": _metrics(rows[-1])}
        dataclasses.replace(mutes, metrics=metrics).save(files[name])
    rows += job.baselines(BUDGET)
    if not short:
        state, seconds = job.train(job.records.retain, "Training without the records")
        rows.append(job.row("retrained", build(state), 0.0, seconds))
    curve = job.curve({} if short else CURVE)
    closed = None if short else job.count_closed_by_the_paper()
    examples = job.examples(files["modulated"])
    _save_folded(out / "model", build(job.state), files["modulated"], job.tokenizer)
    write_atomically(out / "report.png", figure.draw(curve, before))
    report = {"rows": rows, "curve": curve, "seconds_total": time.perf_counter() - start}
    write_atomically(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    screen.show(console, report, examples, closed, out)
    return report


class _Job:
    """The models, batches and mute sets of one run."""

    def __init__(self, seed: int, fresh: bool, console: Console) -> None:
        self.seed, self.fresh, self.console = seed, fresh, console
        texts, heldout_texts = task.read_corpus()
        self.tokenizer = task.train_tokenizer(texts)
        self.text = task.windows(self.tokenizer, texts)
        heldout = task.windows(self.tokenizer, heldout_texts)[: task.HELDOUT_WINDOWS]
        self.records = records = task.make_records(seed)
        self.state, self.seconds = self.train(records.forget + records.retain, "Training the model")
        self.heldout: Batch = {
            "input_ids": heldout,
            "attention_mask": torch.ones_like(heldout),
            "labels": heldout,
        }
        self.secrets = self.encode(records.forget, "secret")
        kept = self.encode(records.retain, "continuation")
        spread = torch.linspace(0, len(self.text) - 1, RETAIN_WINDOWS).long()
        self.retain = task.with_text(kept, self.text[spread])
        self.found: dict[tuple[float, str], tuple[MuteSet, float]] = {}

    def encode(self, records: Sequence[task.Record], counted: str) -> Batch:
        return task.encode(self.tokenizer, records, counted)

    def train(self, records: Sequence[task.Record], description: str) -> tuple[dict[str, Tensor], float]:
        """The weights of the model trained on the text and ``records``, and the seconds it took."""
        start = time.perf_counter()
        batch = self.encode(records, "record")
        with show_progress(description) as advance:
            state = load_or_train(self.text, batch, Training(), self.seed, self.fresh, advance)
        return state, time.perf_counter() - start

    def find(self, budget: float, mode: str) -> tuple[MuteSet, float]:
        """The MuteSet of a ``budget`` of neurons and the seconds it took; each is computed once."""
        if (budget, mode) not in self.found:
            words = "Silencing" if mode == "mute" else "Modulating"
            with show_progress(f"{words} {budget:.0%} of the neurons") as advance:
                outcome = unlearn(
                    build(self.state),
                    self.tokenizer,
                    self.secrets,
                    self.retain,
                    budget=budget,
                    mode=mode,
                    recipe=RECIPE,
                    samples=0,
                    start_layer=0,
                    seed=self.seed,
                    callback=advance,
                )
            self.found[budget, mode] = outcome.mutes, outcome.seconds
        return self.found[budget, mode]

    def baselines(self, budget: float) -> list[dict[str, Any]]:
        """The rows of neurons at random and by one gradient, silenced."""
        rows = []
        with attach(build(self.state), start_layer=0) as masked:
            recipes: dict[str, Callable[[], MuteSet]] = {
                "random": lambda: mute_random(masked, budget, self.seed),
                "attribution": lambda: mute_by_attribution(masked, self.secrets, budget),
            }
            for name, make in recipes.items():
                start = time.perf_counter()
                mutes = make()
                seconds = time.perf_counter() - start
                model = build(self.state)
                with mute(model, mutes):
                    rows.append(self.row(name, model, mutes.share, seconds))
        return rows

    def curve(self, budgets: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
        """Points at ``budgets`` {mode: budgets}, and wherever a mute set has been found already."""
        for mode, values in budgets.items():
            for budget in values:
                self.find(budget, mode)
        self.console.print("Measuring what is left for each share of the neurons", style="dim")
        points = []
        for (_, mode), (mutes, _) in sorted(self.found.items()):
            model = build(self.state)
            with mute(model, mutes):
                points.append({"mode": mode, "muted_share": mutes.share, **self.measure(model)})
        return points

    def count_closed_by_the_paper(self) -> int:
        """How many neurons NeuMuter's own recipe mutes with the authors' constants."""
        kept = self.encode(self.records.retain, "continuation")
        with (
            attach(build(self.state), start_layer=0) as masked,
            show_progress("Trying the paper's constants") as advance,
        ):
            pair = PairedBatches(masked, self.secrets, kept)
            # It may select no neuron.
            with contextlib.suppress(NothingSelectedError):
                train_gates(pair, PaperConfig(), self.seed, advance)
            threshold = PaperConfig().threshold
            return sum(int((score.sigmoid() < threshold).sum()) for score in masked.scores.values())

    def row(self, name: str, model: PreTrainedModel, share: float, seconds: float) -> dict[str, Any]:
        self.console.print(f"Measuring what the model says: {name}", style="dim")
        return {"name": name, "muted_share": share, **self.measure(model), "seconds": seconds}

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        records = self.records
        extraction = {
            f"{name}_extraction": evaluation.extraction_rate(model, self.encode(group, "continuation"))
            for name, group in (
                ("forget", records.forget),
                ("retain_same", records.retain_same),
                ("retain_other", records.retain_other),
            )
        }
        return extraction | {
            "forget_ma": evaluation.memorization_accuracy(model, self.encode(records.forget, "record")),
            "forget_nll": evaluation.mean_token_loss(model, self.secrets),
            "heldout_ppl": evaluation.perplexity(model, self.heldout),
        }

    def examples(self, mute_file: Path) -> dict[str, dict[str, Any]]:
        """Greedy continuations, before and after, of one forgotten and one retained customer."""
        model = build(self.state)
        chosen = {"forgotten": self.records.forget[0], "retained": self.records.retain_same[0]}
        batch = self.encode(list(chosen.values()), "continuation")
        before = evaluation.continue_texts(model, self.tokenizer, batch, len(chosen))
        with mute(model, mute_file):
            after = evaluation.continue_texts(model, self.tokenizer, batch, len(chosen))
        return {
            name: {"record": record, "before": old["said"], "after": new["said"]}
            for (name, record), old, new in zip(chosen.items(), before, after, strict=True)
        }


def _metrics(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("name", "muted_share", "seconds")}


def _save_folded(
    path: Path, model: PreTrainedModel, mute_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """An ordinary checkpoint with the mutes folded in; a former one at ``path`` is replaced at the end."""
    fold(model, mute_file)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        fresh, former = Path(temporary) / "fresh", Path(temporary) / "former"
        save_verified(model, tokenizer, fresh)
        if path.exists():
            os.replace(path, former)
        os.replace(fresh, path)
