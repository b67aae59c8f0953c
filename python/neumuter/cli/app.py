"""The command line. Heavy imports are inside the commands, so that ``neumuter --help`` is fast."""

import dataclasses
import json
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError

from neumuter.models.loading import (
    batches_of,
    continued,
    fold_files,
    load,
    measure,
    measure_tofu,
    progress_bar,
    rewritten,
    sampled,
    union_of,
)
from neumuter.report.console import (
    console,
    peak_memory,
    print_curve,
    print_environment,
    print_metrics,
    print_outcome,
    print_plan,
    print_robustness,
    print_speeds,
    print_verdicts,
)

if TYPE_CHECKING:
    from torch import nn

    from neumuter.mutes.mute_set import MuteSet
    from neumuter.types import Batch

app = typer.Typer(
    help="Make a trained language model forget given texts by muting the few FFN neurons that hold them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
DEFAULT_BUDGET, DEFAULT_STEPS, DEFAULT_BATCH_SIZE = "0.01", 80, 8  # of unlearn
OUT_OF_MEMORY = (
    "The memory does not suffice. Smaller batches (--batch-size), shorter texts (--max-length) and --dtype "
    "bfloat16 need less; in Python, NeuMuterTrainer can recompute activations (gradient_checkpointing=True). "
    "neumuter plan CONFIG shows what takes how much."
)
VERIFIED = 0.1  # of what muting does to the logits, by which an export may differ
FILE_HELP = (
    "jsonl or csv (column 'text', or 'prompt' and 'completion', of which only the completion is forgotten), "
    "or plain text with paragraphs separated by blank lines."
)


class Mode(str, Enum):
    """What happens to the selected neurons."""

    mute = "mute"
    modulate = "modulate"


class Recipe(str, Enum):
    """fitted: the neurons' gains under a budget of KL. paper: gates, trained with the paper's constants."""

    fitted = "fitted"
    paper = "paper"


class Dtype(str, Enum):
    """The dtype a model is loaded in; auto is the checkpoint's own."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


GgufFile = Annotated[str | None, typer.Option(help="Name of a GGUF file in MODEL to read the weights from.")]
Model = Annotated[str, typer.Argument(help="Folder of a Hugging Face causal language model, or its name.")]


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the mute file, the checkpoint and the report.")
    ] = Path("demo-out"),
    seed: Annotated[int, typer.Option(min=0, help="Of the records, the training and the masks.")] = 0,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train the model again even if it is cached.")
    ] = False,
    short: Annotated[
        bool, typer.Option("--short", help="Fewer comparisons, for continuous integration.")
    ] = False,
) -> None:
    """The whole job on made-up records, in three minutes: train a small model, make it forget, measure."""
    from neumuter.demo import run_demo

    run_demo(out, seed=seed, fresh=fresh, console=console, short=short)


@app.command()
def unlearn(
    model: Model,
    forget: Annotated[Path, typer.Option(help=f"Texts to forget: {FILE_HELP}")],
    out: Annotated[Path, typer.Option(help="Folder for mutes.safetensors and report.json.")],
    retain: Annotated[
        Path | None,
        typer.Option(help="Texts that must stay, same formats; the model's own samples are added."),
    ] = None,
    rewrite_with: Annotated[
        str | None,
        typer.Option(help="A masked language model that rewrites the forget texts as further neighbours."),
    ] = None,
    beside: Annotated[
        Path | None,
        typer.Option(
            help="A mute file of a former request, in force as well; its texts must not be in --retain."
        ),
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column that holds the texts.")] = None,
    recipe: Annotated[
        Recipe, typer.Option(help="paper: NeuMuter's own objective, constants, batches and threshold.")
    ] = Recipe.fitted,
    mode: Annotated[
        Mode | None,
        typer.Option(
            help="modulate: selected neurons get signed gains. mute: they are silenced. Default: modulate."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Share (0.01) or number (300) of neurons to touch; auto: the fewest that do. Default: "
            f"{DEFAULT_BUDGET}."
        ),
    ] = None,
    goal_extraction: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="With --budget auto: share of texts still extractable, at most. Default: 0."
        ),
    ] = None,
    goal_ma: Annotated[
        float | None, typer.Option(min=0, max=1, help="With --budget auto: MA of the texts, at most.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Optimisation steps; with --budget auto of each try. Default: {DEFAULT_STEPS}."
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help=f"Texts of each kind per step. Default: {DEFAULT_BATCH_SIZE}."),
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens per text.")] = 256,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first texts of a file.")] = None,
    start_layer: Annotated[int, typer.Option(min=0, help="First FFN that may be touched, from 0.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the masks, and of sampled neighbours.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the weights.")] = Dtype.auto,
    gguf_file: GgufFile = None,
) -> None:
    """Find the neurons of MODEL that hold the forget texts and write a mute file for them."""
    from neumuter.mutes.algebra import combine
    from neumuter.mutes.mute_set import MuteSet
    from neumuter.recipes import GainsConfig, GatesConfig, Goals, SupportConfig, smallest_share, train_gates
    from neumuter.recipes import forget as run_recipe
    from neumuter.report.html import write_report
    from neumuter.serving.live import mute
    from neumuter.texts import encode, read_texts
    from neumuter.training.masked import attach

    start = time.perf_counter()
    fitted_only = {"beside": beside, "budget": budget, "steps": steps, "batch-size": batch_size, "mode": mode}
    given = [f"--{name}" for name, value in fitted_only.items() if value is not None]
    if recipe is Recipe.paper and given:
        raise typer.BadParameter(f"--recipe paper goes without {', '.join(given)}")
    share = None if budget == "auto" else _parse_budget(budget or DEFAULT_BUDGET)
    if share is not None and (goal_extraction, goal_ma) != (None, None):
        raise typer.BadParameter("--goal-extraction and --goal-ma go with --budget auto alone")
    forget_texts = read_texts(forget, column, limit)
    neighbours = read_texts(retain, column, limit) if retain else []
    former = MuteSet.load(beside) if beside else None
    out.mkdir(parents=True, exist_ok=True)
    network, tokenizer = load(model, dtype.value, gguf_file)
    positions = getattr(network.config, "max_position_embeddings", None) or max_length
    if max_length > positions:
        console.print(f"This model has {positions} positions: texts are cut to {positions} tokens.")
        max_length = positions
    forget_batch = encode(forget_texts, tokenizer, max_length)
    if rewrite_with:
        neighbours += rewritten(forget_texts, rewrite_with, seed, out)
    if neighbours:
        encode(
            neighbours, tokenizer, max_length
        )  # a text that cannot be read is found before the work begins
    with mute(network, former) if former else nullcontext():
        neighbours += sampled(network, tokenizer, forget_batch, neighbours, former, seed, out)
        if not neighbours:
            raise ValueError("the model said nothing when sampled from: give texts that must stay, --retain")
        retain_batch = encode(neighbours, tokenizer, max_length)
        before = measure("Measuring before", network, forget_batch, retain_batch)
    with attach(network, start_layer) as masked:
        batches = masked, forget_batch, retain_batch
        with progress_bar("Finding neurons", None, "loss", "muted") as advance:
            history = []

            def progress(step: int, total: int, info: dict[str, Any]) -> None:
                history.append({"step": step, **info})
                advance(step, total, loss=f"{info['loss']:.3f}", muted=f"{info['muted']:.2%}")

            curve = None
            if recipe is Recipe.paper:
                mutes = train_gates(*batches, GatesConfig(), seed, progress)
            else:
                steps, batch_size = steps or DEFAULT_STEPS, batch_size or DEFAULT_BATCH_SIZE
                support = SupportConfig(steps=steps, batch_size=batch_size)
                config: dict[str, Any] = {
                    "mode": (mode or Mode.modulate).value,
                    "support": support if mode is Mode.mute else None,
                    "gains": GainsConfig(steps=steps, batch_size=batch_size),
                    "seed": seed,
                    "beside": former,
                }
                if share is None:
                    goals = Goals(goal_extraction or 0.0, goal_ma)
                    mutes, curve = smallest_share(*batches, goals, progress=progress, **config)
                else:
                    mutes = run_recipe(*batches, share, callback=progress, **config)
    if curve:
        print_curve(curve)
    path = out / "mutes.safetensors"
    mutes.save(path)  # before anything else can fail
    mutes = MuteSet.load(path)
    samples = continued(network, tokenizer, forget_texts, "before")
    with mute(network, combine(network, [former, mutes]) if former else mutes):
        after = measure("Measuring after", network, forget_batch, retain_batch)
        samples = continued(network, tokenizer, forget_texts, "after", samples)
    mutes = dataclasses.replace(mutes, metrics={"before": before, "after": after})
    mutes.save(path)
    seconds = time.perf_counter() - start
    report = _report(model, forget, retain, mutes, seconds, curve)
    _write_json(out / "report.json", report)
    write_report(out / "report.html", report | {"history": history}, mutes, samples)
    print_outcome(mutes, path, seconds)


class Suite(str, Enum):
    """custom: your texts. tdec: texts of 200 tokens, as the paper measures them. tofu: questions."""

    custom = "custom"
    tdec = "tdec"
    tofu = "tofu"


@app.command()
def evaluate(
    model: Model,
    forget: Annotated[Path, typer.Option(help="Texts to forget; with --suite tofu a file of its questions.")],
    mute: Annotated[
        list[Path] | None,
        typer.Option(help="A mute file made for MODEL, shown before and after; again for their union."),
    ] = None,
    retain: Annotated[Path | None, typer.Option(help="Texts, or questions, that must stay.")] = None,
    heldout: Annotated[Path | None, typer.Option(help="Texts that MODEL never saw.")] = None,
    suite: Annotated[Suite, typer.Option(help="What is measured.")] = Suite.custom,
    real_authors: Annotated[Path | None, typer.Option(help="TOFU's questions about real authors.")] = None,
    world_facts: Annotated[Path | None, typer.Option(help="TOFU's questions about the world.")] = None,
    retrained: Annotated[
        Path | None,
        typer.Option(help="The report of this command on a model that was trained without the forget texts."),
    ] = None,
    paraphrased: Annotated[
        Path | None,
        typer.Option(help="The forget texts behind other prompts, paraphrased or translated."),
    ] = None,
    robust: Annotated[
        bool, typer.Option("--robust", help="With --mute: also after quantisation and after relearning.")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, separated by commas.")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder of your own task files for lm-evaluation-harness.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the report, as JSON.")] = None,
    column: Annotated[str | None, typer.Option(help="Column that holds the texts.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens per text; 200 with --suite tdec.")] = 256,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Read only the first texts of a file, documents of a task.")
    ] = None,
    gguf_file: GgufFile = None,
) -> None:
    """Measure what MODEL still knows of the forget texts, and what else it knows."""
    from neumuter.evaluation import harness_metrics, text_metrics
    from neumuter.evaluation.robustness import robustness
    from neumuter.serving import live as muting

    if robust and (not mute or suite is Suite.tofu):
        raise typer.BadParameter("--robust needs --mute, and texts: not --suite tofu")
    of_texts = {"heldout": heldout, "paraphrased": paraphrased, "column": column}
    of_questions = {"real-authors": real_authors, "world-facts": world_facts}
    others = of_texts if suite is Suite.tofu else of_questions
    if given := [f"--{name}" for name, value in others.items() if value is not None]:
        raise typer.BadParameter(f"--suite {suite.value} goes without {', '.join(given)}")
    reference = _read_report(retrained)
    auc = reference["metrics"].get("min_k_auc") if reference else None
    network, tokenizer = load(model, "auto", gguf_file)
    files: dict[str, Path | None]
    if suite is Suite.tofu:
        files = {
            "forget": forget, "retain": retain, "real_authors": real_authors, "world_facts": world_facts,
        }  # fmt: skip
    else:
        files = {"forget": forget, "retain": retain, "heldout": heldout, "paraphrased": paraphrased}
        batches = batches_of(tokenizer, files, column, 200 if suite is Suite.tdec else max_length, limit)
    columns: dict[str, dict[str, float]] = {}
    extra: dict[str, Any] = {}
    mutes = union_of(network, mute) if mute else None
    with muting.mute(network, mutes) if mutes else nullcontext() as handle:
        states: dict[str, Callable[[], AbstractContextManager[object]]]
        states = {"original": handle.off, "muted": nullcontext} if handle else {"model": nullcontext}
        for state, context in states.items():
            with context(), console.status(f"Measuring: {state}"):
                if suite is Suite.tofu:
                    columns[state], extra = measure_tofu(network, tokenizer, files, limit, reference)
                else:
                    original = handle.off if handle and state == "muted" else None
                    columns[state] = text_metrics(network, **batches, original=original, retrained_auc=auc)
                if tasks:
                    columns[state] |= harness_metrics(
                        network, tokenizer, tasks.split(","), limit, task_folder
                    )
    print_metrics(columns | ({"retrained": reference["metrics"]} if reference else {}))
    if suite is Suite.tdec:
        console.print("The paper's thresholds for GPT-Neo: MA below 0.2994, EL_10 below 0.0499.")
    last = list(columns)[-1]
    report: dict[str, Any] = {"model": model, "mute": list(map(str, mute or [])), "suite": suite.value}
    report |= {"metrics": columns[last], "before": columns.get("original")} | extra
    _write_evaluation(out, report, mutes)
    if robust:
        kept: dict[str, Any] = {
            name: batch for name, batch in batches.items() if name in ("retain", "heldout")
        }

        def tampered_metrics(tampered: "nn.Module", asked: "Batch") -> dict[str, float]:
            return text_metrics(tampered, asked, **kept, retrained_auc=auc)

        with console.status("Quantising and relearning"):
            report["robustness"] = robustness(network, mutes, batches["forget"], tampered_metrics)
        print_robustness(report["robustness"])
        _write_evaluation(out, report, mutes)


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="A mute file.")]) -> None:
    """Show what a mute file holds: the model it is for, the neurons, the method, the metrics."""
    from neumuter.mutes.mute_set import MuteSet

    mutes = MuteSet.load(file)
    table = Table(title=escape(str(file)), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = {
        "model class": mutes.architecture["class"],
        "model type": mutes.architecture["model_type"],
        "mode": f"{mutes.mode}, gains from {mutes.gain_range[0]:g} to {mutes.gain_range[1]:g}",
        "neurons": f"{mutes.count} of {sum(mutes.widths.values())} ({mutes.share:.2%})",
        "seed": str(mutes.seed),
        "method": json.dumps(mutes.method),  # ASCII: control characters of a stranger's file stay escaped
        "before": json.dumps(mutes.metrics.get("before", {})),
        "after": json.dumps(mutes.metrics.get("after", {})),
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)

    layers = Table("FFN", "neurons", "muted", "share", "gains")
    for name, width in mutes.widths.items():
        layer = mutes.layers.get(name)
        count = len(layer.indices) if layer else 0
        gains = f"{layer.gains.min():.2f} to {layer.gains.max():.2f}" if layer else ""
        layers.add_row(name, str(width), str(count), f"{count / width:.2%}", gains)
    console.print(layers)


@app.command()
def apply(
    model: Model,
    files: Annotated[list[Path], typer.Argument(help="Mute files made for MODEL: their union is folded.")],
    out: Annotated[Path, typer.Option(help="Folder for the new checkpoint; must not exist or be empty.")],
    gguf_file: GgufFile = None,
) -> None:
    """Fold mute files into the weights of MODEL: an ordinary Hugging Face checkpoint comes out."""
    mutes = fold_files(model, files, out, gguf_file)
    console.print(
        f"{mutes.count} neurons ({mutes.share:.2%}) folded; the checkpoint is in {escape(str(out))}"
    )


class Form(str, Enum):
    """ia3, lora: PEFT adapters. vllm-lora: LoRA of one rank. fold, shrink: checkpoints."""

    ia3 = "ia3"
    lora = "lora"
    vllm_lora = "vllm-lora"
    fold = "fold"
    shrink = "shrink"


@app.command()
def export(
    model: Model,
    files: Annotated[list[Path], typer.Argument(help="Mute files made for MODEL: their union is exported.")],
    to: Annotated[Form, typer.Option(help="shrink: fold, and remove silenced neurons.")],
    out: Annotated[Path, typer.Option(help="Folder for the export; must not exist or be empty.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Run the export and the live muted model, and compare.")
    ] = False,
    gguf_file: GgufFile = None,
) -> None:
    """Bring mute files into a form that other tools serve; docs/serving.md says which takes what."""
    from neumuter.files import new_folder
    from neumuter.serving import adapters as exports
    from neumuter.serving.shrink import shrink

    if to is Form.fold:
        mutes = fold_files(model, files, out, gguf_file)
        note = f"{mutes.count} neurons ({mutes.share:.2%}) are folded."
    else:
        network, tokenizer = load(model, "auto", gguf_file)
        mutes = union_of(network, files)
    if to is Form.ia3:
        note = exports.export_ia3(network, mutes, out).note
    elif to in (Form.lora, Form.vllm_lora):
        note = exports.export_lora(network, mutes, out, one_rank=to is Form.vllm_lora).note
    elif to is Form.shrink:
        with new_folder(out) as temporary:
            found = shrink(network, mutes)
            network.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        widths = ", ".join(sorted({f"{old} to {new}" for old, new in found.widths.values()}))
        sizes = f"{found.bytes_before / 1e6:.4g} to {found.bytes_after / 1e6:.4g} MB"
        note = f"Neurons per FFN: {widths}; parameters: {sizes}."
    console.print(f"Written to {escape(str(out))}. {escape(note)}", soft_wrap=True)
    if verify:
        original, _ = load(model, "auto", gguf_file)
        difference, effect = exports.largest_difference(original, mutes, out), exports.effect(original, mutes)
        console.print(
            f"Largest difference of logits to the live muted model: {difference:.3g}; to the original, "
            f"which is what muting does: {effect:.3g}"
        )
        if not difference <= VERIFIED * effect:
            raise RuntimeError(f"{out} does not compute what the muted model does: do not serve it")


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="A config.json, or the folder that has one.")],
    gpus: Annotated[int, typer.Option(min=1, help="Number of devices.")] = 1,
    memory: Annotated[float, typer.Option(min=1e-6, help="Of each device, in GB (10^9 bytes).")] = 80.0,
    card: Annotated[str, typer.Option(help="For the time: A100, H100, H200, B200 or MI300X.")] = "H100",
    samples: Annotated[int, typer.Option(min=1, help="Texts of each kind per step and device.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per text.")] = 256,
    sequences: Annotated[int, typer.Option(min=1, help="Served at a time.")] = 8,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a served sequence.")] = 8192,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the weights.")] = Dtype.auto,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations in the backward pass.")] = False,
) -> None:
    """What mask training and serving of a model would cost, and how it fits, from its config alone."""
    import torch

    from neumuter.training import plan as planning

    if card not in planning.CARDS:
        raise typer.BadParameter(f"--card must be one of {', '.join(planning.CARDS)}, got {card!r}")
    loaded = planning.load_config(config)
    wanted = (getattr(loaded, "dtype", None) or "bfloat16") if dtype is Dtype.auto else dtype.value
    wanted = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    with console.status("Counting"):
        found = planning.plan(loaded, gpus, samples, tokens, wanted, checkpointing)
    print_plan(found, gpus, memory, card, (samples, tokens), (sequences, context))


@app.command()
def doctor() -> None:
    """Test the kernels on this machine, measure their speed, and print what belongs into a bug report."""
    from neumuter.cli import doctor

    environment = doctor.environment()
    print_environment(environment)  # before anything can crash
    with console.status("Testing the kernels"):
        verdicts = list(doctor.self_test())
    print_verdicts(verdicts)
    with console.status("Measuring their speed"):
        speeds = list(doctor.speed_check())
    print_speeds(speeds)
    console.print("\nFor a bug report, from here on:\n", style="bold")
    text = doctor.bug_report(environment, verdicts, speeds)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if any(verdict.error for verdict in verdicts):
        raise typer.Exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error is one message on stderr and exit code 1 (2 for wrong usage)."""
    # A polite kill unwinds the stack, which removes temporary files; kill -9 can leave them, under
    # hidden names of their own.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        app(arguments)
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError, SafetensorError) as error:
        message = str(error) or type(error).__name__
        if type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "allocate memory" in message:
            message += f"\n{OUT_OF_MEMORY}"
        Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _write_evaluation(out: Path | None, report: dict[str, Any], mutes: "MuteSet | None") -> None:
    from neumuter.report.html import write_report

    _write_json(out, report)
    if out:
        write_report(out.with_suffix(".html"), report, mutes)


def _write_json(path: Path | None, value: object) -> None:
    from neumuter.files import write_atomically

    if path:
        write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def _read_report(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        if isinstance(report["metrics"], dict):
            return report
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"--retrained: {path} is not a report of neumuter evaluate")


def _parse_budget(text: str) -> int | float:
    try:
        return float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        raise typer.BadParameter(
            f"--budget must be a share (0.01), a number (300) or auto, got {text!r}"
        ) from None


def _report(
    model: str,
    forget: Path,
    retain: Path | None,
    mutes: "MuteSet",
    seconds: float,
    curve: list[dict[str, Any]] | None,
) -> dict[str, Any]:
    return {
        "model": model,
        "forget": str(forget),
        "retain": str(retain) if retain else None,
        "mode": mutes.mode,
        "muted_neurons": mutes.count,
        "muted_share": mutes.share,
        "method": mutes.method,
        "seed": mutes.seed,
        "curve": curve,
        **mutes.metrics,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "command": shlex.join(["neumuter", *sys.argv[1:]]),
    }
