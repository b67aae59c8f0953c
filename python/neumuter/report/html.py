"""One run as a single HTML file: no scripts, nothing from the network, pictures as inline SVG.

A stranger's mute file and a model's output can say anything: every string passes through ``_text``. The
pictures are drawn here and not by matplotlib so that they have the page's colours, light, dark and printed.
"""

import base64
import hashlib
import json
import math
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from html import escape
from itertools import count
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from neumuter.evaluation import METRICS
from neumuter.evaluation.robustness import EXPLAINED
from neumuter.files import PathLike, write_atomically
from neumuter.mutes.mute_set import MuteSet
from neumuter_kernels.info import version

States = Mapping[str, Mapping[str, Any]]  # metrics by state of the model
Points = Sequence[Mapping[str, Any]]  # of a curve

COLUMNS, BARS = 64, 32  # of the heat map, at most, and of the histogram
KEYS = ("forget_extraction", "forget_ma", "forget_loss", "retain_loss", "heldout_perplexity")
# As wide as a phone, so that the letters in a picture are nearly as large there as those around it.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 206, 52, 338, 26, 166
# Control characters, halves of surrogate pairs and non-characters: not allowed in HTML.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010ffff]")

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#f0f3f6;--line:#cfd6de;--dim:#545d68;
--c0:#0b5cad;--c1:#a83c14;--mark:#ffe08a}
@media screen and (prefers-color-scheme:dark){:root{--bg:#14171c;--fg:#e6e9ed;--soft:#20262e;--line:#3d4652;
--dim:#a3adb9;--c0:#6cb6ff;--c1:#ff9d6c;--mark:#5f4b00}}
*{box-sizing:border-box} body{margin:0 auto;max-width:62rem;padding:1rem;background:var(--bg);color:var(--fg);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1,h2,h3{line-height:1.25;margin:1.5rem 0 .5rem} h1{font-size:clamp(1.375rem,5vw,2rem)}
h2{margin-top:2.5rem;padding-top:1rem;border-top:1px solid var(--line)}
dl,dd,figure{margin:0 0 .5rem} dt,small,caption,figcaption{color:var(--dim)}
small,caption,figcaption,pre{font-size:.875rem} small{display:block;font-weight:400}
.note{padding:.75rem 1rem;background:var(--soft);border-left:.25rem solid var(--c1)}
.keys,.grid{display:grid;gap:.75rem;margin:1rem 0}
.grid{grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr))}
.keys{grid-template-columns:repeat(auto-fill,minmax(9.25rem,1fr))} .keys dd{margin:0;font-weight:600}
.keys div,.pair{background:var(--soft);padding:.625rem .75rem;border-radius:.5rem}
svg{display:block;width:100%;max-width:34rem;height:auto;font-size:11px;fill:var(--fg)}
svg line{stroke:var(--line)} svg .row{fill:var(--soft)} svg .bar{fill:var(--c0)}
svg path{fill:none;stroke:var(--c0);stroke-width:2;stroke-linecap:round}
svg .s1{stroke:var(--c1);stroke-dasharray:4 4} .scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;overflow-wrap:normal}
caption,th,td{text-align:left;vertical-align:top;padding:.375rem 1rem .375rem 0}
th,td{border-bottom:1px solid var(--line)} @media(max-width:40rem){td:last-child{white-space:nowrap}}
pre,.said{margin:0;white-space:pre-wrap} mark{background:var(--mark);color:inherit;text-decoration:underline}
@media(min-width:40rem){.facts{display:grid;grid-template-columns:13rem 1fr;gap:0 1rem}}
@media print{body{max-width:none;padding:0;font-size:10pt;print-color-adjust:exact}
.scroll{overflow:visible} .keys div,.pair,.note,figure,tr{break-inside:avoid} h2,h3{break-after:avoid}
details::details-content{content-visibility:visible;display:block}}
"""


def write_report(
    path: PathLike,
    report: Mapping[str, Any],
    mutes: MuteSet | None = None,
    samples: Sequence[Mapping[str, str]] | None = None,
) -> None:
    """Write an HTML report of one run to ``path``, whole or not at all; equal input gives equal bytes.

    ``report``: what ``neumuter unlearn`` or ``neumuter evaluate`` write as JSON; what is missing is left out.
    Shown as well if they are in it: "history", the search, [{"step", "loss", "forget_loss", "muted"}];
    "command", str. ``mutes``: the MuteSet, for pictures of its neurons. ``samples``:
    [{"prompt", "truth", "before", "after"}], each str: a text's beginning, how it goes on, and what the model
    says instead before and after; the words of the truth that come back are marked.

    Raises OSError, and KeyError for a sample or a point of a curve that lacks an entry.
    """
    if mutes:
        told = {"mode": mutes.mode, "method": mutes.method, "seed": mutes.seed}
        report = {**told, "muted_neurons": mutes.count, "muted_share": mutes.share, **report}
    before, after = report.get("before"), report.get("after") or report.get("metrics") or {}
    states = {"before": before, "after": after} if before else {"measured": after}
    tampered, curve = report.get("robustness") or {}, report.get("curve") or []
    name = f"Unlearning report: {report['model']}" if report.get("model") else "Unlearning report"
    sections = {
        "What was asked": _asked(report),
        "What was found": _found(report, mutes),
        "What the model knows": _metrics("Measured on the model", states) + _definitions(states),
        "What the model says": "".join(map(_sample, count(1), samples or [])),
        "Does it stay forgotten?": _wrap(
            "", f"<p>{_text(EXPLAINED)}</p>\n", _metrics("After tampering", tampered)
        ),
        "How many neurons it takes": _curve(curve),
        "What it cost": _cost(report),
        "Provenance": _provenance(report, mutes),
    }
    body = (_wrap(f"<section>\n<h2>{title}</h2>\n", "</section>\n", html) for title, html in sections.items())
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(name)}</title>
<style>{STYLE}</style></head>
<body><main>
<h1>{_text(name)}</h1>
<p class="note">Muting suppresses the texts; it does not prove that no trace of them is left.</p>
{_keys(report, states)}{"".join(body)}</main></body></html>
"""
    write_atomically(path, page.encode())


# The sections: HTML, empty where there is nothing to show.


def _keys(report: Mapping[str, Any], states: States) -> str:
    facts = [(title, " → ".join(values), f"good: {good}") for title, *values, good in _rows(states, KEYS)]
    if "muted_share" in report:
        facts.insert(0, ("muted", f"{report['muted_share']:.2%}", "of the neurons"))
    rows = ((_text(cell) for cell in fact) for fact in facts)
    html = (f"<div><dt>{a}</dt><dd>{b}<small>{c}</small></dd></div>" for a, b, c in rows)
    return _wrap('<dl class="keys">', "</dl>\n", *html)


def _asked(report: Mapping[str, Any]) -> str:
    named = {"model": "model", "texts to forget": "forget", "texts to keep": "retain", "mode": "mode"}
    facts = {title: report.get(name) for title, name in named.items()}
    facts |= {"mute files": ", ".join(report.get("mute") or []), "suite": report.get("suite")}
    method = _text(json.dumps(report["method"], indent=2)) if report.get("method") else ""
    opening = "<details><summary>Method and constants</summary><pre>"
    return _facts(facts) + _wrap(opening, "</pre></details>\n", method)


def _found(report: Mapping[str, Any], mutes: MuteSet | None) -> str:
    points, losses = report.get("history") or [], {"loss": "loss", "forget_loss": "forget loss"}
    history = _grid(
        _lines("Loss while the neurons were sought", points, "step", losses),
        _lines("Share of neurons muted meanwhile", points, "step", {"muted": "muted"}),
    )
    if not mutes:
        return _facts({"neurons muted": report.get("muted_neurons")}) + history
    facts = {
        "neurons muted": f"{mutes.count} of {sum(mutes.widths.values())} ({mutes.share:.2%})",
        "FFNs they are in": f"{len(mutes.layers)} of {len(mutes.widths)}",
        "gains allowed": "{:g} to {:g}; 0 silences a neuron, 1 leaves it as it was".format(*mutes.gain_range),
    }
    rows = []
    for path, width in mutes.widths.items():
        gains = mutes.layers[path].gains if path in mutes.layers else torch.zeros(0)
        span = f"{gains.min():.2f} to {gains.max():.2f}" if len(gains) else ""
        rows.append((path, width, len(gains), f"{len(gains) / width:.2%}", span))
    table = _table("All FFNs", ("FFN", "neurons", "muted", "share", "gains"), rows)
    details = f"<details><summary>FFN by FFN</summary>{table}</details>\n"
    return _facts(facts) + _grid(_heat_map(mutes), _histogram(mutes)) + details + history


def _rows(states: States, names: Iterable[str]) -> list[tuple[str, ...]]:
    """(title, a value per state, which direction is good) of those ``names`` that were measured."""
    rows = []
    for name in names:
        values = [state.get(name) for state in states.values()]
        if any(value is not None for value in values):
            metric = METRICS.get(name)
            title, good = (metric.title, metric.good) if metric else (name, "as before")
            rows.append((title, *("–" if value is None else f"{value:.4g}" for value in values), good))
    return rows


def _metrics(caption: str, states: States) -> str:
    tasks = [name for state in states.values() for name in state if "/" in name]
    rows = _rows(states, dict.fromkeys([*METRICS, *tasks]))
    return _table(caption, ("metric", *states, "good"), rows)


def _definitions(states: States) -> str:
    known = [metric for name, metric in METRICS.items() if any(name in state for state in states.values())]
    return _facts({m.title: f"{m.definition} ({m.source})" if m.source else m.definition for m in known})


def _sample(number: int, sample: Mapping[str, str]) -> str:
    words, columns = sample["truth"].split(), []
    for state in ("before", "after"):
        parts = re.split(r"(\s+)", sample[state])  # words at the even places
        blocks = SequenceMatcher(None, words, parts[::2], autojunk=False).get_matching_blocks()
        back = {2 * (first + k) for _, first, size in blocks for k in range(size)}
        html = (f"<mark>{_text(p)}</mark>" if k in back else _text(p) for k, p in enumerate(parts))
        note = f"<small>{len(back)} of {len(words)} words of the truth come back</small>"
        columns.append(f'<div class="pair"><b>{state}</b>{_said("".join(html))}{note}</div>\n')
    prompt, truth = (f"<dt>{key}</dt><dd>{_said(_text(sample[key]))}</dd>" for key in ("prompt", "truth"))
    return f'<h3>Sample {number}</h3>\n<dl class="facts">{prompt}{truth}</dl>\n{_grid(*columns)}'


def _curve(points: Points) -> str:
    series = {name: METRICS[name].title for name in ("forget_extraction", "forget_ma")}
    rows = []
    for point in points:
        measured, goals = (f"{point[name]:.4g}" for name in series), "met" if point["met"] else "missed"
        rows.append((point["neurons"], f"{point['share']:.2%}", *measured, goals))
    table = _table("Each number tried", ("neurons", "share", *series.values(), "goals"), rows)
    return _lines("What is left, over the share of neurons muted", points, "share", series) + table


def _cost(report: Mapping[str, Any]) -> str:
    seconds, peak = (report.get(key) for key in ("seconds", "peak_memory_bytes"))
    facts = {
        "time": seconds and f"{seconds:.4g} s",
        "peak memory": peak and f"{peak / 2**30:.2f} GiB",
    }
    return _facts(facts)


def _provenance(report: Mapping[str, Any], mutes: MuteSet | None) -> str:
    facts = {"model": report.get("model"), "seed": report.get("seed")}
    if mutes:
        fingerprint = json.dumps(mutes.fingerprint, sort_keys=True).encode()
        facts["model class"] = mutes.architecture["class"]
        facts["SHA-256 of the fingerprint"] = hashlib.sha256(fingerprint).hexdigest()
    facts |= {"neumuter-kernels": version("neumuter-kernels"), "transformers": version("transformers")}
    facts |= {"torch": torch.__version__, "Python": platform.python_version()}
    command = _text(report.get("command") or "")
    return _facts(facts) + _wrap("<h3>To do it again</h3><pre>", "</pre>\n", command)


# The pictures.


def _heat_map(mutes: MuteSet) -> str:
    shares = {}
    for path, width in mutes.widths.items():
        columns = min(COLUMNS, width)
        indices = mutes.layers[path].indices.long().numpy() if path in mutes.layers else np.zeros(0, int)
        sizes = np.diff(-(-np.arange(columns + 1) * width // columns))
        shares[path] = np.bincount(indices * columns // width, minlength=columns) / sizes
    top, densest = max((share.max(), path) for path, share in shares.items())
    height, body = min(14, max(4, 300 / len(shares))), ""
    for row, (path, share) in enumerate(shares.items()):
        y, step = TOP + row * height, (RIGHT - LEFT) / len(share)
        if row % math.ceil(12 / height) == 0:  # as many labels as there is room for
            layer = next(filter(str.isdigit, path.split(".")), path[:6])
            body += _label(LEFT - 6, y + height / 2 + 4, layer, "end")
        body += f"<g><title>{_text(path)}</title>{_rect('row', LEFT, y, RIGHT - LEFT, 0.9 * height)}"
        for column in share.nonzero()[0]:
            body += _rect("bar", LEFT + column * step, y, step, 0.9 * height, share[column] / top)
        body += "</g>"
    body += _label(LEFT - 6, 15, "layer", "end") + _rect("row", LEFT, 6, 14, 10)
    body += "".join(_rect("bar", LEFT + 14 * k, 6, 14, 10, k / 8) for k in range(1, 9))
    body += _label(LEFT + 134, 15, f"0 to {top:.2%} of a cell")
    label = f"Share of neurons muted in {len(shares)} FFNs; most in {densest}, {top:.2%} of a cell"
    caption = f"Where they are: a row per FFN, its neurons in at most {COLUMNS} cells"
    return _svg(y + height + 4, label, caption, body)


def _histogram(mutes: MuteSet) -> str:
    gains = np.concatenate([layer.gains.double().numpy() for layer in mutes.layers.values()])
    _, (low, *_, high) = _axis(mutes.gain_range, LEFT, RIGHT)
    bars = ((gains - low) / (high - low) * BARS).astype(int).clip(0, BARS - 1)
    counts, width = np.bincount(bars, minlength=BARS), (high - low) / BARS
    x, y, body = _axes((low, high), (0, max(5, counts.max())), "gain")  # fewer than 5 would have fractions
    for bar in counts.nonzero()[0]:
        left, right, top = x(low + bar * width), x(low + (bar + 1) * width), y(counts[bar])
        body += _rect("bar", left, top, right - left, BOTTOM - top)
    label = f"Histogram of {len(gains)} gains, from {gains.min():.3g} to {gains.max():.3g}"
    return _svg(HEIGHT, label, "How many of the neurons have which gain", body)


def _lines(caption: str, points: Points, x_name: str, series: Mapping[str, str]) -> str:
    """A line per entry of ``series``, {name in ``points``: what to call it}, through its finite values."""
    lines = {}
    for name, title in series.items():
        known = [(p[x_name], p[name]) for p in points if p.get(name) is not None and math.isfinite(p[name])]
        if known:
            lines[title] = np.array(known, float)
    if not lines:
        return ""
    low, high = (limit(np.concatenate([*lines.values()]), axis=0) for limit in (np.min, np.max))
    x, y, body = _axes((low[0], high[0]), (low[1], high[1]), x_name)
    for number, (title, line) in enumerate(lines.items()):
        start, corners = LEFT + 110 * number, "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in line)
        body += f'<path class="s{number}" d="M{start} 11h24M{corners}h0"/>{_label(start + 32, 15, title)}'
    spans = (f"{title} from {line[0, 1]:.3g} to {line[-1, 1]:.3g}" for title, line in lines.items())
    return _svg(HEIGHT, f"{caption}: {', '.join(spans)}", caption, body)


def _axes(
    xs: tuple[float, float], ys: tuple[float, float], label: str
) -> tuple[Callable[[float], float], Callable[[float], float], str]:
    """(x, y, body): where in the picture a value lies, and the axes around the ranges ``xs`` and ``ys``."""
    (x, x_ticks), (y, y_ticks) = _axis(xs, LEFT, RIGHT), _axis(ys, BOTTOM, TOP)
    body = "".join(_label(x(tick), BOTTOM + 16, f"{tick:.6g}", "middle") for tick in x_ticks)
    for tick in y_ticks:
        body += f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        body += _label(LEFT - 6, y(tick) + 4, f"{tick:.6g}", "end")
    return x, y, body + _label((LEFT + RIGHT) / 2, BOTTOM + 34, label, "middle")


def _axis(
    values: tuple[float, float], start: float, end: float
) -> tuple[Callable[[float], float], NDArray[np.float64]]:
    """(where between ``start`` and ``end`` a value lies, round numbers around the range ``values``)."""
    low, high = values
    room = 0.5 * (max(abs(low), abs(high)) or 1) if math.isclose(low, high) else 0
    ticks = np.asarray(MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low - room, high + room))
    ticks = (ticks / (ticks[1] - ticks[0])).round() * (ticks[1] - ticks[0])  # 0 is not 1e-17
    return lambda value: start + (end - start) * (value - ticks[0]) / (ticks[-1] - ticks[0]), ticks + 0.0


def _label(x: float, y: float, text: object, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_text(text)}</text>'


def _rect(kind: str, x: float, y: float, width: float, height: float, share: float = 1) -> str:
    opacity = 0.2 + 0.8 * share  # one muted neuron among thousands must still be seen
    place = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
    return f'<rect class="{kind}" {place} fill-opacity="{opacity:.2f}"/>'


def _svg(height: float, label: str, caption: str, body: str) -> str:
    box = f'role="img" aria-label="{_text(label)}" viewBox="0 0 {WIDTH} {height:.0f}"'
    return f"<figure><svg {box}>{body}</svg><figcaption>{_text(caption)}</figcaption></figure>\n"


# HTML. What takes text escapes it; what takes HTML is named html.


def _text(value: object) -> str:
    return escape(_FORBIDDEN.sub("\ufffd", str(value)))


def _wrap(before: str, after: str, *html: str) -> str:
    """All of it in a row; empty if ``html`` is."""
    inner = "".join(html)
    return inner and f"{before}{inner}{after}"


def _grid(*html: str) -> str:
    return _wrap('<div class="grid">\n', "</div>\n", *html)


def _said(html: str) -> str:
    return f'<p class="said" lang="" dir="auto">{html}</p>'  # in a language that is not known


def _facts(facts: Mapping[str, object]) -> str:
    """A list of terms and what they are, without those that are not known."""
    known = ((_text(name), _text(value)) for name, value in facts.items() if value not in (None, ""))
    return _wrap('<dl class="facts">', "</dl>\n", *(f"<dt>{a}</dt><dd>{b}</dd>\n" for a, b in known))


def _table(caption: str, head: Iterable[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in a box that scrolls; the first cell of a row names it."""
    caption, head = _text(caption), "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    before = f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table>'
    before += f"<caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>\n"
    html = ""
    for first, *cells in rows:
        others = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        html += f'<tr><th scope="row">{_text(first)}</th>{others}</tr>\n'
    return _wrap(before, "</tbody></table></div>\n", html)
