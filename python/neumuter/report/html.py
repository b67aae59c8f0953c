"""One run as a single HTML file: no scripts, nothing from the network, pictures as inline SVG.

A stranger's mute file and a model's output can say anything. What they say reaches the page through the
template alone, which escapes every string after ``replace_forbidden``.
"""

import base64
import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from functools import partial
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from neumuter.evaluation import METRICS
from neumuter.evaluation.robustness import EXPLAINED
from neumuter.evaluation.verdict import TITLES
from neumuter.files import PathLike, write_atomically
from neumuter.mutes.mute_set import MuteSet
from neumuter.report.characters import replace_forbidden
from neumuter_kernels.info import version

# The metrics of each state of the model.
States = Mapping[str, Mapping[str, Any]]

KEY_METRICS = (
    "forget_extraction", "forget_secrets", "forget_others", "forget_ma", "forget_loss", "retain_loss",
    "own_loss", "heldout_perplexity",
)  # fmt: skip
CURVE_METRICS = ("forget_extraction", "forget_secrets", "forget_ma")
MISSING_PACKAGE = "This report has no pictures: they need matplotlib, pip install matplotlib."


class Table(NamedTuple):
    """A table of the page; the first cell of a row names it. Without rows it is left out."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[object]]


def write_report(
    path: PathLike,
    report: Mapping[str, Any],
    mutes: MuteSet | None = None,
    samples: Sequence[Mapping[str, str]] | None = None,
    redact: bool = False,
) -> None:
    """Write an HTML report of one run to ``path``, whole or not at all; equal input gives equal bytes.

    Without matplotlib it has no pictures, and says so. Its owner alone may read it if it quotes texts.

    Args:
        path: the file; one that is there is replaced.
        report: what ``neumuter unlearn`` or ``neumuter evaluate`` write as JSON; what is missing is left out.
            Shown as well if they are in it: "history", the search, [{"step", "loss", "forget_loss",
            "muted"}]; "texts", the rows of ``Outcome.texts``; "command", str; "title", that of the page;
            "record", {title: value} of where the figures come from.
        mutes: the mute set, for what its neurons are and for pictures of them.
        samples: [{"prompt", "truth", "before", "after"}], each str: a text's beginning, how it goes on, and
            what the model says instead before and after. The words of the truth that come back are marked.
        redact: leave out what texts and the model say.

    Raises:
        OSError: ``path`` cannot be written.
        KeyError: a sample or a point of a curve lacks an entry.
    """
    samples, texts = [] if redact else samples or [], report.get("texts") or []
    if mutes:
        told = {"mode": mutes.mode, "method": mutes.method, "seed": mutes.seed}
        report = {**told, "muted_neurons": mutes.count, "muted_share": mutes.share, **report}
    before, after = report.get("before"), report.get("after") or report.get("metrics") or {}
    states = {"before": before, "after": after} if before else {"measured": after}
    controls = {"controls": report["controls"]} if report.get("controls") else {}
    templates = PackageLoader("neumuter.report")
    environment = Environment(
        loader=templates,
        autoescape=True,
        finalize=_to_printable,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    style, _, _ = templates.get_source(environment, "style.css")
    page = environment.get_template("report.html.jinja").render(
        title=report.get("title") or ": ".join(filter(None, ["Unlearning report", report.get("model")])),
        style=Markup(style),
        style_digest=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        keys=_key_figures(report, states),
        asked=_asked(report),
        method=json.dumps(report["method"], indent=2) if report.get("method") else None,
        found=_found(report, mutes),
        ffns=_ffns(mutes),
        metrics=_metrics("Measured on the model", states | controls),
        definitions=_definitions(states),
        verdict=report.get("verdict_sentence"),
        measured_on=report.get("measured_on"),
        comparisons=_comparisons(report.get("comparisons") or []),
        texts=_texts(texts),
        samples=[_compare(sample) for sample in samples],
        others=_others(texts, redact),
        explained=EXPLAINED,
        tampered=_metrics("After tampering", report.get("robustness") or {}),
        curve=_curve(report.get("curve") or []),
        cost=_cost(report),
        provenance=_drop_unknown(report.get("record") or {}) | _provenance(report, mutes),
        command=report.get("command"),
        **_draw(report, mutes),
    )
    write_atomically(path, page.encode(), private=bool(samples) or (bool(texts) and not redact))


def _to_printable(value: object) -> object:
    return replace_forbidden(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _draw(report: Mapping[str, Any], mutes: MuteSet | None) -> dict[str, Any]:
    """Draw the pictures, or write the sentence that stands for them without matplotlib."""
    groups: dict[str, list[Any]] = {"neuron_pictures": [], "history_pictures": [], "curve_pictures": []}
    history, curve = report.get("history") or [], report.get("curve") or []
    if not (mutes or history or curve):
        return {**groups, "missing_package": None}
    try:
        from neumuter.report.pictures import draw_heat_map, draw_histogram, draw_lines
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return {**groups, "missing_package": MISSING_PACKAGE}
    if mutes:
        groups["neuron_pictures"] = [draw_heat_map(mutes), draw_histogram(mutes)]
    losses, muted = {"loss": "loss", "forget_loss": "forget loss"}, {"muted": "muted"}
    left = {name: METRICS[name].title for name in _of_curve(curve)}
    draw_history = partial(draw_lines, points=history, x_name="step")
    groups["history_pictures"] = [
        draw_history("Loss while the neurons were sought", series=losses),
        draw_history("Share of neurons muted meanwhile", series=muted),
    ]
    groups["curve_pictures"] = [
        draw_lines("What is left, over the share of neurons muted", curve, "share", left)
    ]
    drawn = {name: [picture for picture in group if picture] for name, group in groups.items()}
    return {**drawn, "missing_package": None}


def _drop_unknown(facts: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in facts.items() if value not in (None, "")}


def _key_figures(report: Mapping[str, Any], states: States) -> list[tuple[str, str, str]]:
    """Collect (title, value, which direction is good) of what a reader looks for first."""
    facts = [
        (title, " → ".join(values), f"good: {good}") for title, *values, good in _rows(states, KEY_METRICS)
    ]
    if "muted_share" in report:
        facts.insert(0, ("muted", f"{report['muted_share']:.2%}", "of the neurons"))
    return facts


def _asked(report: Mapping[str, Any]) -> dict[str, object]:
    named = {"model": "model", "texts to forget": "forget", "texts to keep": "retain", "mode": "mode"}
    facts = {title: report.get(name) for title, name in named.items()}
    return _drop_unknown(
        {**facts, "mute files": ", ".join(report.get("mute") or []), "suite": report.get("suite")}
    )


def _found(report: Mapping[str, Any], mutes: MuteSet | None) -> dict[str, object]:
    if not mutes:
        return _drop_unknown({"neurons muted": report.get("muted_neurons")})
    return {
        "neurons muted": f"{mutes.count} of {sum(mutes.widths.values())} ({mutes.share:.2%})",
        "FFNs they are in": f"{len(mutes.layers)} of {len(mutes.widths)}",
        "gains allowed": "{:g} to {:g}; 0 silences a neuron, 1 leaves it as it was".format(*mutes.gain_range),
    }


def _ffns(mutes: MuteSet | None) -> Table:
    rows = []
    for path, width in mutes.widths.items() if mutes else ():
        gains = mutes.layers[path].gains if mutes and path in mutes.layers else torch.zeros(0)
        span = f"{gains.min():.2f} to {gains.max():.2f}" if len(gains) else ""
        rows.append((path, width, len(gains), f"{len(gains) / width:.2%}", span))
    return Table("All FFNs", ("FFN", "neurons", "muted", "share", "gains"), rows)


def _rows(states: States, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Collect (title, a value per state, which direction is good) of those ``names`` that were measured."""
    rows = []
    for name in names:
        values = [state.get(name) for state in states.values()]
        if any(value is not None for value in values):
            metric = METRICS.get(name)
            title, good = (metric.title, metric.good) if metric else (name, "as before")
            rows.append((title, *("–" if value is None else f"{value:.4g}" for value in values), good))
    return rows


def _metrics(caption: str, states: States) -> Table:
    tasks = [name for state in states.values() for name in state if "/" in name]
    return Table(caption, ("metric", *states, "good"), _rows(states, dict.fromkeys([*METRICS, *tasks])))


def _definitions(states: States) -> dict[str, str]:
    known = [metric for name, metric in METRICS.items() if any(name in state for state in states.values())]
    return {m.title: f"{m.definition} ({m.source})" if m.source else m.definition for m in known}


def _compare(sample: Mapping[str, str]) -> dict[str, Any]:
    """Prepare a sample: its answers in "parts", (text, whether it is a word of the truth that comes back)."""
    words, answers = sample["truth"].split(), {}
    for state in ("before", "after"):
        # Words are at the even places.
        parts = re.split(r"(\s+)", sample[state])
        blocks = SequenceMatcher(None, words, parts[::2], autojunk=False).get_matching_blocks()
        back = {2 * (first + k) for _, first, size in blocks for k in range(size)}
        answers[state] = {"parts": [(part, k in back) for k, part in enumerate(parts)], "back": len(back)}
    return {
        "prompt": sample["prompt"],
        "truth": sample["truth"],
        "words": len(words),
        "answers": answers,
    }


def _comparisons(figures: Sequence[Mapping[str, Any]]) -> Table:
    """What the verdict rests on."""
    rows = [
        (
            TITLES[figure["name"]],
            f"{figure['texts']:.3f}",
            f"{figure['controls']:.3f}",
            f"{figure['difference']:+.3f} ({figure['low']:+.3f} to {figure['high']:+.3f})",
            f"{figure['margin']:g}",
        )
        for figure in figures
    ]
    head = ("figure", "texts to forget", "controls", "difference (interval)", "margin")
    return Table("The texts to forget against controls, which the model never saw", head, rows)


def _texts(texts: Sequence[Mapping[str, Any]]) -> Table:
    """The verdict on each text; where windows of texts were left out, also on how many windows it rests."""
    partly = any(text["windows_measured"] < text["windows"] for text in texts if "windows" in text)
    rows = [
        (
            text["number"],
            *([f"{text['windows_measured']} of {text['windows']}"] if partly else []),
            text["verdict"],
            "yes" if text["extracted_after"] else "no",
            f"{text['sampled_after']:.2g}",
            f"{text['loss_after']:.3g}",
            f"{text['min_k_after']:.3g}",
        )
        for text in texts
        if "verdict" in text
    ]
    measured = ["windows measured"] if partly else []
    head = ("text", *measured, "verdict", "comes out", "chance in 100 samples", "loss", "Min-40%")
    return Table("Text by text", head, rows)


def _others(texts: Sequence[Mapping[str, Any]], redact: bool) -> Table:
    """The texts in whose place another given text came out."""
    head = ("text to forget", "what comes out is of", *(() if redact else ("the model says",)))
    rows = [
        (text["number"], text["other_text"], *(() if redact else (text["said"],)))
        for text in texts
        if text.get("other_text")
    ]
    return Table("Another text instead", head, rows)


def _of_curve(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that a search measured."""
    return [name for name in CURVE_METRICS if all(name in point for point in points)]


def _curve(points: Sequence[Mapping[str, Any]]) -> Table:
    rows, names = [], _of_curve(points)
    for point in points:
        measured = (f"{point[name]:.4g}" for name in names)
        goals = "met" if point["met"] else "missed"
        rows.append((point["neurons"], f"{point['share']:.2%}", *measured, goals))
    titles = (METRICS[name].title for name in names)
    return Table("Each number tried", ("neurons", "share", *titles, "goals"), rows)


def _cost(report: Mapping[str, Any]) -> dict[str, object]:
    seconds, peak = (report.get(key) for key in ("seconds", "peak_memory_bytes"))
    return _drop_unknown(
        {"time": seconds and f"{seconds:.4g} s", "peak memory": peak and f"{peak / 2**30:.2f} GiB"}
    )


def _provenance(report: Mapping[str, Any], mutes: MuteSet | None) -> dict[str, object]:
    facts = {"model": report.get("model"), "seed": report.get("seed")}
    if mutes:
        fingerprint = json.dumps(mutes.fingerprint, sort_keys=True).encode()
        facts["model class"] = mutes.architecture["class"]
        facts["SHA-256 of the fingerprint"] = hashlib.sha256(fingerprint).hexdigest()
    facts |= {"neumuter-kernels": version("neumuter-kernels"), "transformers": version("transformers")}
    return _drop_unknown({**facts, "torch": torch.__version__, "Python": platform.python_version()})
