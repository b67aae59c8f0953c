"""``neumuter unlearn``."""

import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from neumuter.cli.advice import advise
from neumuter.cli.arguments import (
    Attention,
    Device,
    DeviceMap,
    Quantized,
    check_run,
    check_size,
    check_sources,
    choose_place,
    parse_budget,
    refuse_replaced,
)
from neumuter.cli.common import (
    FILE_HELP,
    Chat,
    Column,
    CompletionColumn,
    Dtype,
    GgufFile,
    Limit,
    Model,
    PromptColumn,
    Redact,
    choose_columns,
    console,
    open_model,
    print_log,
)
from neumuter.cli.layouts import choose_layout
from neumuter.cli.processes import Layout, check_place, count_processes, is_first

GOAL_MISSED = 3
DEFAULT_BATCH_SIZE = 8


class Mode(str, Enum):
    """What happens to the selected neurons."""

    mute = "mute"
    modulate = "modulate"


class Recipe(str, Enum):
    """fitted: gains, fitted under a budget of KL. paper: gates, trained with the paper's constants."""

    fitted = "fitted"
    paper = "paper"


def unlearn(
    model: Model,
    forget: Annotated[Path, typer.Option(help=f"Texts to forget: {FILE_HELP}")],
    out: Annotated[
        Path, typer.Option(help="Folder for mutes.safetensors and the report (.json, .csv, .html).")
    ],
    retain: Annotated[
        Path | None,
        typer.Option(
            help="Texts that must stay, in the same formats. Texts that MODEL itself says are added. Without "
            "--retain they stand in for it, and protect less."
        ),
    ] = None,
    controls: Annotated[
        Path | None,
        typer.Option(
            help="Texts of the same kind that MODEL never saw, which the verdict compares the forget texts "
            "with. Default: made from the forget texts, with other names and values."
        ),
    ] = None,
    rewrite_with: Annotated[
        str | None,
        typer.Option(
            help="A masked language model that rewrites the forget texts; the results are kept like --retain."
        ),
    ] = None,
    made_up: Annotated[
        int,
        typer.Option(
            min=0,
            help="Ask MODEL this number of forget prompts with made-up names, and keep its answers. For "
            "requests without --retain. Forgetting then takes far more neurons, such as --budget 0.5.",
        ),
    ] = 0,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Leave wording alone: forget a token only until it is as unlikely as for a model that never "
            "saw the texts, which is estimated. Default: on for texts with prompts, if they take at most "
            "1,024 windows. Not with --mode mute or --recipe paper.",
        ),
    ] = None,
    existing: Annotated[
        Path | None,
        typer.Option(
            help="Mute file of earlier requests, which stays in force. Their texts must not be in --retain."
        ),
    ] = None,
    former: Annotated[
        list[Path] | None,
        typer.Option(
            help="Slopes of an earlier request (slopes.safetensors); give the option once for each. The new "
            "mute file then holds for all requests, and replaces --existing."
        ),
    ] = None,
    keep_slopes: Annotated[
        bool,
        typer.Option(
            "--keep-slopes",
            help="Write slopes.safetensors, for --former of later requests. It gives the texts away: protect "
            "it like them.",
        ),
    ] = False,
    column: Column = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    chat: Chat = None,
    recipe: Annotated[
        Recipe,
        typer.Option(
            help="fitted: fit gains at a given KL. paper: NeuMuter's own objective, constants, batches and "
            "threshold."
        ),
    ] = Recipe.fitted,
    mode: Annotated[
        Mode | None,
        typer.Option(
            help="modulate: multiply the selected neurons by fitted, signed gains. mute: silence them. "
            "Default: modulate."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Share (0.01 or 1%) or number (300) of neurons to touch; auto tries rising shares until one "
            "reaches the goals. Default: 1%, but at least 20 neurons for each text, "
            "of 100 texts or more 60; with --mode mute 1%."
        ),
    ] = None,
    goal_extraction: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="With --budget auto: the share of texts that may still come out. Default: 0."
        ),
    ] = None,
    goal_ma: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="With --budget auto: the largest MA (share of tokens that MODEL ranks first)."
        ),
    ] = None,
    goal_secrets: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="With --budget auto: the share of secrets that may still come out when MODEL is given the "
            "true words that precede them.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Optimisation steps; with --budget auto, of each try. Default: enough to visit each text "
            "40 times, but from 160 to 1280; above 8192 texts, enough to visit each 1.25 times.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help=f"Texts of each kind per step. Default: {DEFAULT_BATCH_SIZE}."),
    ] = None,
    max_length: Annotated[
        int, typer.Option(min=2, help="Tokens of a window; a longer text becomes several.")
    ] = 256,
    limit: Limit = None,
    start_layer: Annotated[int, typer.Option(min=0, help="First FFN that may be touched, from 0.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seeds the search and the texts sampled from MODEL.")] = 0,
    redact: Redact = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the mute file, or the unfinished run, that is in --out."),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the unfinished run in --out, if there is one, to the same result. The other "
            "options must be as they were.",
        ),
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the weights.")] = Dtype.auto,
    device: Device = None,
    device_map: DeviceMap = None,
    quantize: Quantized = None,
    attention: Attention = None,
    gguf_file: GgufFile = None,
    layout: Annotated[
        Layout,
        typer.Option(
            help="In several processes. ddp: a copy of MODEL in each. fsdp, tp, fsdp+tp: MODEL is split. "
            "auto: the fastest of these that fits the GPUs, as neumuter plan computes it."
        ),
    ] = Layout.ddp,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            help="Compute activations again in the backward pass instead of keeping them: a third more "
            "arithmetic for less memory. If MODEL is not split, this happens by itself if memory runs out.",
        ),
    ] = False,
) -> None:
    """Find the neurons of MODEL that hold the forget texts, and write a mute file for them.

    The last line says whether the texts are forgotten. The exit code is 3 if more comes out than the verdict
    allows, or if there was nothing to forget. With --budget auto, it is 3 if no budget met the goals, or if
    there was nothing to forget.

    torchrun --nproc-per-node N -m neumuter unlearn … shares the work among N processes, on N GPUs or with
    --device cpu.
    """
    fitted_only = {
        "existing": existing, "former": former, "keep-slopes": keep_slopes or None, "budget": budget,
        "steps": steps, "batch-size": batch_size, "mode": mode,
    }  # fmt: skip
    given = [f"--{name}" for name, value in fitted_only.items() if value is not None]
    if recipe is Recipe.paper and given:
        raise typer.BadParameter(f"--recipe paper cannot be combined with {', '.join(given)}")
    if former and (existing is None or mode is Mode.mute):
        raise typer.BadParameter("--former needs --existing, and cannot be combined with --mode mute")
    columns = choose_columns(column, prompt_column, completion_column)
    place = choose_place(device, device_map, quantize, attention, gguf_file)
    number = parse_budget(budget) if budget else None
    if number != "auto" and (goal_extraction, goal_ma, goal_secrets) != (None, None, None):
        raise typer.BadParameter("--goal-extraction, --goal-ma and --goal-secrets need --budget auto")
    if goal_secrets is not None and calibrate is False:
        raise typer.BadParameter("--goal-secrets needs to know secrets, which --no-calibrate does not")
    check_sources(model, forget, retain, controls, existing, *(former or []))
    refuse_replaced(out, {"--existing": [existing] if existing else [], "--former": former or []})
    if rewrite_with:
        check_sources(rewrite_with)
    size, halvings = batch_size or DEFAULT_BATCH_SIZE, 0
    if not gguf_file:
        planned = (model, dtype.value, size, max_length, recompute, bool(quantize))
        layout, halvings, recompute = choose_layout(layout, *planned)
    check_place(device, device_map, layout, **{"quantize": quantize, "gguf-file": gguf_file})
    if is_first():
        check_run(out, overwrite, resume)
    with console.status("Importing transformers"):
        import neumuter
        from neumuter.models.pieces import sparing
        from neumuter.outcome import MUTE_FILE
        from neumuter.recipes import FittedConfig, GainsConfig, Goals, PaperConfig, SupportConfig
        from neumuter.report.console import curve_table, outcome_sentences, outcome_table
        from neumuter.texts import read_texts
        from neumuter.texts.files import TextFile
        from neumuter.training.journal import remove_unfinished

    forget_texts = TextFile(forget, columns, limit)
    retain_texts = TextFile(retain, columns, limit) if retain else None
    # A bad line is said before the model is loaded.
    for texts in (forget_texts, retain_texts or ()):
        sum(1 for _ in texts)
    unseen = read_texts(controls, columns, limit) if controls else None
    earlier = neumuter.MuteSet.load(existing) if existing else None
    known = [neumuter.Slopes.load(file) for file in former or []]
    if not gguf_file:
        check_size(model, start_layer, number, layout.value, count_processes(), place["quantize"])
    network, tokenizer = open_model(model, dtype.value, layout=layout.value, **place)
    if recompute:
        network.gradient_checkpointing_enable()
    sizes: dict[str, Any] = {"steps": steps, "batch_size": size}
    support = SupportConfig(**sizes) if mode is Mode.mute else None
    if not resume and is_first():
        remove_unfinished(out)
    with print_log(), sparing(halvings):
        outcome = neumuter.unlearn(
            network,
            tokenizer,
            forget_texts,
            retain_texts,
            budget=number,
            mode=(mode or Mode.modulate).value,
            recipe=PaperConfig() if recipe is Recipe.paper else FittedConfig(GainsConfig(**sizes), support),
            existing=earlier,
            former=known,
            keep_slopes=keep_slopes,
            goals=Goals(goal_extraction or 0.0, goal_ma, goal_secrets) if number == "auto" else None,
            controls=unseen,
            made_up=made_up,
            calibrate=calibrate,
            rewrite_with=rewrite_with,
            start_layer=start_layer,
            max_length=max_length,
            chat=chat,
            seed=seed,
            folder=out,
            resume=resume,
        )
    if is_first():
        outcome.save(
            out,
            redact,
            model=model,
            forget=str(forget),
            retain=str(retain) if retain else None,
            command=shlex.join(["neumuter", *sys.argv[1:]]),
        )
    nothing = outcome.verdict.kind == "nothing to forget"
    met = not outcome.verdict.leaks and not nothing
    if outcome.curve:
        reached = any(point["met"] for point in outcome.curve)
        # The goals decide, which many models meet that never knew the texts.
        met = reached and not nothing
        console.print(curve_table(outcome.curve))
        if not reached:
            console.print(
                "[bold yellow]No budget meets the goals:[/] the mute file is that of the largest one."
            )
    console.print(outcome_table(outcome.before, outcome.after, outcome.controls))
    for sentence in outcome_sentences(outcome.mutes, outcome.seconds, outcome.peak_memory):
        console.print(sentence, highlight=False)
    console.print(f"The mute file is {escape(str(out / MUTE_FILE))}.", highlight=False, soft_wrap=True)
    for sentence in advise(outcome, out / "report.csv", searches=recipe is Recipe.fitted):
        console.print(escape(sentence), highlight=False, soft_wrap=True)
    if outcome.measured_on:
        console.print(outcome.measured_on, highlight=False, soft_wrap=True)
    console.print(escape(outcome.verdict.sentence), highlight=False, soft_wrap=True)
    if not met:
        raise typer.Exit(GOAL_MISSED)
