"""``neumuter evaluate``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from neumuter.cli.arguments import (
    Attention,
    Device,
    DeviceMap,
    Quantized,
    check_report,
    check_size,
    check_sources,
    choose_place,
    need_packages,
)
from neumuter.cli.common import (
    FILE_HELP,
    MODEL_HELP,
    Chat,
    Column,
    CompletionColumn,
    GgufFile,
    PromptColumn,
    Redact,
    choose_columns,
    console,
    load_sets,
    open_model,
    print_log,
    unite,
)
from neumuter.cli.processes import Split, check_split, count_processes, is_first
from neumuter.cli.server import OPTIONS, check_options, evaluate_server
from neumuter.files import write_json

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from neumuter.evaluation import Examination
    from neumuter.evaluation.tofu import Question
    from neumuter.mutes.mute_set import MuteSet
    from neumuter.types import Batch

# Of a window.
TOKENS, TDEC_TOKENS = 256, 200
# Of what somebody can ask for in several forms, that counts in which the model knows a text best; and as what
# it is measured. Membership compares texts to forget with held-out ones, so both are taken so.
MOST_KNOWN = {"forget": "forget", "paraphrased": "paraphrased", "heldout": "nonmembers"}


class Suite(str, Enum):
    """custom: your texts. tdec: texts of 200 tokens, as the paper measures them. tofu: questions."""

    custom = "custom"
    tdec = "tdec"
    tofu = "tofu"


def evaluate(
    command: typer.Context,
    forget: Annotated[
        Path, typer.Option(help=f"Texts to forget: {FILE_HELP} With --suite tofu, a file of its questions.")
    ],
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP)] = None,
    mute: Annotated[
        list[Path] | None,
        typer.Option(
            help="A mute file made for MODEL, to measure before and after muting. Give the option once for "
            "each file."
        ),
    ] = None,
    retain: Annotated[Path | None, typer.Option(help="Texts, or questions, that must stay.")] = None,
    heldout: Annotated[Path | None, typer.Option(help="Texts that MODEL never saw.")] = None,
    suite: Annotated[
        Suite,
        typer.Option(
            help="custom: your texts. tdec: texts of 200 tokens, as the paper measures them. tofu: TOFU's "
            "questions."
        ),
    ] = Suite.custom,
    real_authors: Annotated[Path | None, typer.Option(help="TOFU's questions about real authors.")] = None,
    world_facts: Annotated[Path | None, typer.Option(help="TOFU's questions about the world.")] = None,
    retrained: Annotated[
        Path | None,
        typer.Option(
            help="The report (--out) of this command on a model that was trained without the forget texts."
        ),
    ] = None,
    paraphrased: Annotated[
        Path | None,
        typer.Option(help="The forget texts with other prompts, paraphrased or translated."),
    ] = None,
    controls: Annotated[
        Path | None,
        typer.Option(
            help="Texts of the same kind that MODEL never saw, which the verdict compares the forget texts "
            "with. Default: made from the forget texts, with other names and values."
        ),
    ] = None,
    robust: Annotated[
        bool,
        typer.Option(
            "--robust",
            help="With --mute: measure again after quantisation, and after training on half of the forget "
            "texts.",
        ),
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, separated by commas.")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder of your own task files for lm-evaluation-harness.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A .json file for the report; a page (.html) is written beside it.")
    ] = None,
    column: Column = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    chat: Chat = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a window. Default: 256, as for unlearn; 200 with --suite tdec."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Read only this number of texts from the start of each file, and of documents of each task.",
        ),
    ] = None,
    redact: Redact = False,
    device: Device = None,
    device_map: DeviceMap = None,
    quantize: Quantized = None,
    attention: Attention = None,
    gguf_file: GgufFile = None,
    layout: Annotated[
        Split | None,
        typer.Option(
            help="With torchrun: how MODEL is split over processes. Each reads all texts, so this is "
            "for a MODEL that one GPU does not hold."
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            help="Instead of MODEL: a running server with OpenAI's API, such as http://127.0.0.1:8000."
        ),
    ] = None,
    served: Annotated[
        str | None, typer.Option("--model", help="With --server: its name for the model or adapter.")
    ] = None,
    mute_set: Annotated[
        str | None,
        typer.Option(
            help="With --server: the mute set to ask for, if it is a vLLM server with NeuMuter's plug-in."
        ),
    ] = None,
) -> None:
    """Measure what MODEL still knows of the forget texts, and of the texts that must stay.

    With --server, say which texts come out of a running server; the exit code is 3 if one does.
    """
    if server is not None:
        check_options(command, OPTIONS, "--server")
        check_report(out)
        columns = choose_columns(column, prompt_column, completion_column)
        evaluate_server(server, served, forget, columns, limit, out, mute_set)
        return
    if model is None or served is not None or mute_set is not None:
        raise typer.BadParameter("give either MODEL, or --server and --model")
    if robust and (not mute or suite is Suite.tofu):
        raise typer.BadParameter("--robust needs --mute, and cannot be combined with --suite tofu")
    if task_folder and not tasks:
        raise typer.BadParameter("--task-folder needs --tasks")
    of_texts = {
        "heldout": heldout, "paraphrased": paraphrased, "controls": controls, "column": column,
        "prompt-column": prompt_column, "completion-column": completion_column, "chat": chat,
    }  # fmt: skip
    columns = choose_columns(column, prompt_column, completion_column)
    of_questions = {"real-authors": real_authors, "world-facts": world_facts}
    others = of_texts if suite is Suite.tofu else of_questions
    if given := [f"--{name}" for name, value in others.items() if value is not None]:
        raise typer.BadParameter(f"--suite {suite.value} cannot be combined with {', '.join(given)}")
    reference = _read_report(retrained)
    auc = reference["metrics"].get("min_k_auc") if reference else None
    place = choose_place(device, device_map, quantize, attention, gguf_file)
    whole_only = {"quantize": quantize, "gguf-file": gguf_file, "robust": robust, "tasks": tasks}
    laid_out = check_split(layout, device, device_map, **whole_only).value
    if is_first():
        check_report(out)
    if suite is Suite.tofu:
        need_packages("--suite tofu", "rouge-score", *(["scipy"] if retrained else []))
    if robust:
        need_packages("--robust", "torchao")
    if tasks:
        need_packages("--tasks", "lm-eval")
    files = {
        "forget": forget, "retain": retain, "heldout": heldout, "paraphrased": paraphrased,
        "controls": controls, "real_authors": real_authors, "world_facts": world_facts,
    }  # fmt: skip
    given_files = {name: file for name, file in files.items() if file}
    check_sources(model, *given_files.values(), *(mute or []))
    from neumuter.evaluation import (
        examine,
        harness_metrics,
        judge_texts,
        list_given,
        make_controls,
        most_known,
        text_metrics,
    )
    from neumuter.evaluation.robustness import robustness
    from neumuter.evaluation.tofu import read_questions
    from neumuter.models.loading import limit_length
    from neumuter.preparing import encode_forms_of, refuse_seen
    from neumuter.serving.live import mute as mute_live
    from neumuter.texts import read_texts
    from neumuter.texts.chat import TEMPLATE_USED

    sets = load_sets(mute or [])
    if suite is Suite.tofu:
        questions = {name: read_questions(file, limit) for name, file in given_files.items()}
    else:
        texts = {name: read_texts(file, columns, limit) for name, file in given_files.items()}
    if layout:
        check_size(model, 0, 1.0, laid_out, count_processes())
    # Copies are trained and quantised.
    network, tokenizer = open_model(model, **place, merge=robust, layout=laid_out)
    if suite is not Suite.tofu:
        default = TDEC_TOKENS if suite is Suite.tdec else TOKENS
        length = limit_length(network, max_length or default)
        with print_log():
            forms = {
                name: encode_forms_of(name, read, tokenizer, length, chat) for name, read in texts.items()
            }
        if chat is None and any(len(found) > 1 for found in forms.values()):
            console.print(TEMPLATE_USED)
        batches = {name: found[0] for name, found in forms.items() if name != "controls"}
        known = list_given(
            {name: batches[name] for name in ("forget", "retain") if name in batches}, tokenizer
        )
        if controls:
            refuse_seen(forms["controls"][0], known, tokenizer)
        unseen = forms.pop("controls", None) or make_controls(forms["forget"], known, tokenizer, length)
    figures: dict[str, dict[str, float]] = {}
    examined: dict[str, Examination] = {}
    unknown: dict[str, Examination] = {}
    extra: dict[str, Any] = {}
    mutes = unite(network, sets) if sets else None
    with mute_live(network, mutes) if mutes else nullcontext() as handle:
        states: dict[str, Callable[[], AbstractContextManager[object]]]
        states = {"original": handle.off, "muted": nullcontext} if handle else {"model": nullcontext}
        for state, context in states.items():
            with context(), console.status(f"Measuring: {state}"):
                if suite is Suite.tofu:
                    figures[state], extra = _measure_tofu(network, tokenizer, questions, reference)
                else:
                    original = handle.off if handle and state == "muted" else None
                    asked = {
                        MOST_KNOWN[name]: most_known(network, found)
                        for name, found in forms.items()
                        if name in MOST_KNOWN
                    }
                    figures[state] = text_metrics(
                        network, **batches | asked, original=original, retrained_auc=auc
                    )
                    examined[state] = examine(network, tokenizer, forms["forget"], known)
                    figures[state] |= examined[state].metrics
                    unknown[state] = examine(network, tokenizer, unseen, known, "controls")
                if tasks:
                    figures[state] |= harness_metrics(
                        network, tokenizer, tasks.split(","), limit, task_folder
                    )
    shown = figures | ({"retrained": reference["metrics"]} if reference else {})
    last = list(figures)[-1]
    _print_metrics(shown | ({"controls": unknown[last].metrics} if unknown else {}))
    if suite is Suite.tdec:
        console.print("The paper's thresholds for GPT-Neo: MA below 0.2994, EL_10 below 0.0499.")
    report: dict[str, Any] = {"model": model, "mute": list(map(str, mute or [])), "suite": suite.value}
    report |= {"metrics": figures[last], "before": figures.get("original")} | extra
    if examined:
        # Without mutes there is no state before.
        old = "original" if "muted" in examined else ""
        verdict, rows = judge_texts(known, examined[last], unknown[last], examined.get(old), unknown.get(old))
        _print_others(rows)
        report |= {
            "controls": unknown[last].metrics, "verdict": verdict.kind, "verdict_sentence": verdict.sentence,
            "comparisons": verdict.figures(), "texts": rows,
        }  # fmt: skip
    _write_evaluation(out, report, mutes, redact)
    if robust:
        kept: dict[str, Any] = {
            name: batch for name, batch in batches.items() if name in ("retain", "heldout")
        }

        def tampered_metrics(tampered: nn.Module, asked: Batch) -> dict[str, float]:
            nonmembers = most_known(tampered, forms["heldout"]) if "heldout" in forms else None
            return text_metrics(tampered, asked, **kept, retrained_auc=auc, nonmembers=nonmembers)

        with console.status("Quantising and relearning"):
            report["robustness"] = robustness(network, mutes, forms["forget"], tampered_metrics)
        _write_evaluation(out, report, mutes, redact)
        _print_robustness(report["robustness"])
    if examined:
        console.print(escape(report["verdict_sentence"]), highlight=False, soft_wrap=True)


def _write_evaluation(out: Path | None, report: dict[str, Any], mutes: MuteSet | None, redact: bool) -> None:
    from neumuter.report.html import write_report

    if out and is_first():
        # What the model says is in the page alone.
        texts = [{name: row[name] for name in row if name != "said"} for row in report.get("texts", [])]
        write_json(out, report | ({"texts": texts} if texts else {}))
        write_report(out.with_suffix(".html"), report, mutes, redact=redact)


def _print_others(rows: Sequence[Mapping[str, Any]]) -> None:
    """Say in whose place another given text comes out; it is not quoted."""
    if found := [f"{row['number']}: {row['other_text']}" for row in rows if row["other_text"]]:
        console.print(f"Asked for these texts to forget, the model gives another one: {'; '.join(found)}.")


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


def _print_metrics(columns: Mapping[str, Mapping[str, float]]) -> None:
    """One line per metric, a column per state, and what each metric is."""
    from neumuter.evaluation import METRICS

    table, definitions = Table("metric", *columns, "good"), []
    for name, metric in METRICS.items():
        values = [metrics.get(name) for metrics in columns.values()]
        if any(value is not None for value in values):
            cells = ("" if value is None else f"{value:.4g}" for value in values)
            table.add_row(metric.title, *cells, metric.good)
            source = f" ({metric.source})" if metric.source else ""
            definitions.append(f"[bold]{metric.title}[/]: {metric.definition}{source}")
    for name in dict.fromkeys(name for metrics in columns.values() for name in metrics if "/" in name):
        cells = (f"{m[name]:.4g}" if name in m else "" for m in columns.values())
        table.add_row(escape(name), *cells, "as before")
    console.print(table)
    console.print("\n".join(definitions), highlight=False)


def _print_robustness(states: Mapping[str, Mapping[str, float]]) -> None:
    """One line per metric, a column per state of ``neumuter.evaluation.robustness``."""
    from neumuter.evaluation import METRICS
    from neumuter.evaluation.robustness import EXPLAINED

    table = Table("metric", *states)
    for name, metric in METRICS.items():
        # Half of the texts may all be long enough for a metric that not all texts have.
        values = [metrics.get(name) for metrics in states.values()]
        if any(value is not None for value in values):
            table.add_row(metric.title, *("" if value is None else f"{value:.4g}" for value in values))
    console.print(table)
    console.print(EXPLAINED)


def _measure_tofu(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Mapping[str, Sequence[Question]],
    reference: Mapping[str, Any] | None,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    import torch

    from neumuter.evaluation import tofu_metrics

    if reference and "truth_ratios" not in reference:
        raise ValueError("--retrained is a report of another suite than tofu")
    ratios = torch.tensor(reference["truth_ratios"], dtype=torch.float64) if reference else None
    metrics, ratios = tofu_metrics(network, tokenizer, questions, ratios)
    return metrics, {"truth_ratios": ratios.tolist()}
