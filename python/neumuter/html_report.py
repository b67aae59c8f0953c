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
from difflib import SequenceMatcher
from html import escape
from importlib.metadata import version

import numpy as np
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import nonsingular

from neumuter.evaluation import METRICS
from neumuter.files import write_atomically

COLUMNS, BARS = 64, 32  # of the heat map, at most, and of the histogram
KEY_METRICS = ("forget_extraction", "forget_ma", "forget_loss", "retain_loss", "heldout_perplexity")
LIMITS = "Muting suppresses the texts; it does not prove that no trace of them is left."
STATES = (
    "int8, int4: muted, folded and quantised. half: of every second text. relearned N: of the same, after N "
    "steps of training on the other texts."
)
# As wide as a phone, so that the letters in a picture are nearly as large there as those around it.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 206, 46, 346, 26, 166
# Control characters, halves of surrogate pairs and non-characters: not allowed in HTML.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd\U00010000-\U0010ffff]")

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#f0f3f6;--line:#cfd6de;--dim:#545d68;
--c0:#0b5cad;--c1:#a83c14;--mark:#ffe08a}
@media screen and (prefers-color-scheme:dark){:root{--bg:#14171c;--fg:#e6e9ed;--soft:#20262e;--line:#3d4652;
--dim:#a3adb9;--c0:#6cb6ff;--c1:#ff9d6c;--mark:#5f4b00}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:62rem;padding:1rem;background:var(--bg);color:var(--fg);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1,h2,h3,h4{line-height:1.25;margin:1.5rem 0 .5rem}
h2{margin-top:2.5rem;padding-top:1rem;border-top:1px solid var(--line)}
h4{margin-top:0}
dt,small,caption,figcaption{color:var(--dim)}
small,caption,figcaption{font-size:.875rem}
small{display:block;font-weight:400}
dl,dd,figure{margin:0 0 .5rem}
.note{padding:.75rem 1rem;background:var(--soft);border-left:.25rem solid var(--c1)}
.keys,.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr))}
.keys{grid-template-columns:repeat(auto-fill,minmax(9.25rem,1fr))}
.grid{margin:1rem 0}
.keys div,.pair{background:var(--soft);padding:.75rem 1rem;border-radius:.5rem}
.keys dd{margin:0;font-size:1.125rem;font-weight:600}
svg{display:block;width:100%;max-width:34rem;height:auto;font-size:11px;fill:var(--fg)}
svg line{stroke:var(--line)}
svg .row{fill:var(--soft)}
svg .bar{fill:var(--c0)}
svg .s0,svg .s1{fill:none;stroke:var(--c0);stroke-width:2}
svg .s1{stroke:var(--c1)}
svg path.s1{stroke-dasharray:5 3}
.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;overflow-wrap:normal}
caption{text-align:left}
th,td{text-align:left;vertical-align:top;padding:.375rem 1rem .375rem 0;border-bottom:1px solid var(--line)}
pre,.said{margin:0;white-space:pre-wrap}
pre{font:.875rem/1.5 ui-monospace,monospace}
mark{background:var(--mark);color:inherit;text-decoration:underline}
summary{cursor:pointer}
@media(min-width:40rem){.facts{display:grid;grid-template-columns:13rem 1fr;gap:0 1rem}}
@media print{body{max-width:none;padding:0;font-size:10pt;print-color-adjust:exact}
.scroll{overflow:visible}
.keys div,.pair,.note,figure,tr{break-inside:avoid}
h2,h3,h4{break-after:avoid}
details::details-content{content-visibility:visible;display:block}}
"""


def write_report(path, report, mutes=None, samples=None):
    """Write an HTML report of one run to ``path``, whole or not at all; equal input gives equal bytes.

    ``report``: what ``neumuter unlearn`` or ``neumuter evaluate`` write as JSON; what is missing is left out.
    Also shown where they are in it: "history", [{"step", "loss", "forget_loss", "kl", "muted"}] of the search;
    "command", str; "energy_joules". ``mutes``: the MuteSet, for pictures of its neurons. ``samples``:
    [{"prompt", "truth", "before", "after"}], each str: a text's beginning, how it goes on, and what the model
    says instead before and after; the words of the truth that come back are marked.

    Raises OSError, and KeyError for a sample or a point of a curve that lacks an entry.
    """
    if mutes:
        told = {"muted_neurons": mutes.count, "muted_share": mutes.share}
        report = told | {name: getattr(mutes, name) for name in ("mode", "method", "seed")} | report
    before, after = report.get("before"), report.get("after") or report.get("metrics") or {}
    states = {"before": before, "after": after} if before else {"measured": after}
    name = f"Unlearning report: {report['model']}" if report.get("model") else "Unlearning report"
    sections = (
        _keys(report, states),
        _section("What was asked", _asked(report)),
        _section("What was found", _found(report, mutes), _history(report.get("history") or [])),
        _section("What the model knows", _metrics("Measured on the model", states), _definitions(states)),
        _section("What the model says", *(_sample(*item) for item in enumerate(samples or [], 1))),
        _section("Does it stay forgotten?", _robustness(report.get("robustness") or {})),
        _section("How many neurons it takes", _curve(report.get("curve") or [])),
        _section("What it cost", _cost(report)),
        _section("Provenance", _provenance(report, mutes)),
    )
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(name)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{_text(name)}</h1>
<p class="note">{LIMITS}</p>
{"".join(sections)}</main>
</body>
</html>
"""
    write_atomically(path, page.encode())


# The sections: HTML, empty where there is nothing to show.


def _keys(report, states):
    facts = []
    if "muted_share" in report:
        facts.append(("neurons muted", f"{report['muted_share']:.2%}", f"mode {report['mode']}"))
    for title, *values, good in _metric_rows(states, KEY_METRICS):
        facts.append((title, " → ".join(values), f"good: {good}"))
    return _wrap(
        '<dl class="keys">{}</dl>\n',
        *(f"<div><dt>{_text(a)}</dt><dd>{_text(b)}<small>{_text(c)}</small></dd></div>" for a, b, c in facts),
    )


def _asked(report):
    facts = {
        "model": report.get("model"),
        "texts to forget": report.get("forget"),
        "texts to keep": report.get("retain"),
        "mode": report.get("mode"),
        "mute files": ", ".join(report.get("mute") or []),
        "suite": report.get("suite"),
    }
    method = report.get("method")
    return _facts(facts) + _details("Method and constants", method and _pre(json.dumps(method, indent=2)))


def _found(report, mutes):
    if not mutes:
        return _facts({"neurons muted": report.get("muted_neurons")})
    low, high = mutes.gain_range
    facts = {
        "neurons muted": f"{mutes.count} of {sum(mutes.widths.values())} ({mutes.share:.2%})",
        "FFNs they are in": f"{len(mutes.layers)} of {len(mutes.widths)}",
        "gains": f"{low:g} to {high:g} allowed; 0 silences a neuron, 1 leaves it as it was",
    }
    rows = []
    for path, width in mutes.widths.items():
        gains = mutes.layers[path].gains if path in mutes.layers else ()
        span = f"{gains.min():.2f} to {gains.max():.2f}" if len(gains) else ""
        rows.append((path, width, len(gains), f"{len(gains) / width:.2%}", span))
    table = _table("All FFNs", ("FFN", "neurons", "muted", "share", "gains"), rows)
    return _facts(facts) + _grid(_heat_map(mutes), _histogram(mutes)) + _details("FFN by FFN", table)


def _history(points):
    losses = {"loss": "loss", "forget_loss": "forget loss"}
    return _grid(
        _lines("Loss while neurons were sought", points, "step", losses),
        _lines("Share of neurons muted meanwhile", points, "step", {"muted": "muted"}),
        _lines("KL meanwhile, on texts to keep, in nats", points, "step", {"kl": "KL"}),
    )


def _metric_rows(states, names):
    """(title, a value per state, which direction is good) of those ``names`` that were measured."""
    rows = []
    for name in names:
        values = [state.get(name) for state in states.values()]
        if any(value is not None for value in values):
            metric = METRICS.get(name)
            title, good = (metric.title, metric.good) if metric else (name, "as before")
            rows.append((title, *("–" if value is None else f"{value:.4g}" for value in values), good))
    return rows


def _metrics(caption, states):
    tasks = [name for state in states.values() for name in state if "/" in name]
    rows = _metric_rows(states, dict.fromkeys([*METRICS, *tasks]))
    return _table(caption, ("metric", *states, "good"), rows)


def _definitions(states):
    known = [metric for name, metric in METRICS.items() if any(name in state for state in states.values())]
    return _facts({m.title: f"{m.definition} ({m.source})" if m.source else m.definition for m in known})


def _sample(number, sample):
    columns = []
    for state in ("before", "after"):
        html, back, words = _marked(sample[state], sample["truth"])
        back = f"<small>{back} of {words} words of the truth come back</small>"
        columns.append(f'<div class="pair"><h4>{state.capitalize()}</h4>{_said(html)}{back}</div>')
    prompt, truth = (_said(_text(sample[name])) for name in ("prompt", "truth"))
    asked = f'<dl class="facts"><dt>prompt</dt><dd>{prompt}</dd><dt>truth</dt><dd>{truth}</dd></dl>'
    return f"<article><h3>Sample {number}</h3>{asked}{_grid(*columns)}</article>"


def _marked(text, truth):
    """(HTML of ``text`` with words of ``truth`` marked, how many, the number of words of ``truth``)."""
    parts, words = re.split(r"(\s+)", text), truth.split()  # parts: words, and between them what parts them
    blocks = SequenceMatcher(None, words, parts[::2], autojunk=False).get_matching_blocks()
    html, end = "", 0
    for _, word, count in blocks[:-1]:
        start, stop = 2 * word, 2 * (word + count) - 1
        html += f"{_text(''.join(parts[end:start]))}<mark>{_text(''.join(parts[start:stop]))}</mark>"
        end = stop
    return html + _text("".join(parts[end:])), sum(block.size for block in blocks), len(words)


def _robustness(states):
    return _wrap(f"{{}}<p>{STATES}</p>", _metrics("Measured after tampering with the muted model", states))


def _curve(points):
    series = {name: METRICS[name].title for name in ("forget_extraction", "forget_ma")}
    rows = []
    for point in points:
        measured = (f"{point[name]:.4g}" for name in series)
        goals = "met" if point["met"] else "missed"
        rows.append((point["neurons"], f"{point['share']:.2%}", *measured, goals))
    table = _table("Each number tried", ("neurons", "share", *series.values(), "goals"), rows)
    return _grid(_lines("What is left, over the share of neurons muted", points, "share", series)) + table


def _cost(report):
    units = {
        "time": ("seconds", "{:.4g} s"),
        "peak memory": ("peak_memory_bytes", "{:.3g} bytes"),
        "energy": ("energy_joules", "{:.4g} J"),
    }
    known = {name: (report.get(key), unit) for name, (key, unit) in units.items()}
    return _facts({name: unit.format(value) for name, (value, unit) in known.items() if value is not None})


def _provenance(report, mutes):
    facts = {"seed": report.get("seed")}
    if mutes:
        fingerprint = json.dumps(mutes.fingerprint, sort_keys=True).encode()
        facts["model class"] = mutes.architecture["class"]
        facts["SHA-256 of the fingerprint"] = hashlib.sha256(fingerprint).hexdigest()
    facts |= {package: version(package) for package in ("neumuter-kernels", "torch", "transformers")}
    facts["Python"] = platform.python_version()
    command = report.get("command")
    return _facts(facts) + (f"<h3>To do it again</h3>{_pre(command)}" if command else "")


# The pictures.


def _heat_map(mutes):
    shares = {}
    for path, width in mutes.widths.items():
        columns = min(COLUMNS, width)
        indices = mutes.layers[path].indices.long().numpy() if path in mutes.layers else np.zeros(0, int)
        sizes = np.diff(-(-np.arange(columns + 1) * width // columns))
        shares[path] = np.bincount(indices * columns // width, minlength=columns) / sizes
    top, densest = max((share.max(), path) for path, share in shares.items())
    height, y, named, labelled, body = min(14, max(4, 300 / len(shares))), TOP, None, 0, ""
    for path, share in shares.items():
        layer = next(filter(str.isdigit, path.split(".")), path[:6])
        if layer != named and y - labelled >= 12:
            body += _label(LEFT - 6, y + height / 2 + 4, layer, "end")
            named, labelled = layer, y
        step = (RIGHT - LEFT) / len(share)
        body += f"<g><title>{_text(path)}</title>{_rect('row', LEFT, y, RIGHT - LEFT, 0.9 * height)}"
        for column in share.nonzero()[0]:
            body += _rect("bar", LEFT + column * step, y, step, 0.9 * height, _opacity(share[column] / top))
        body += "</g>"
        y += height
    body += _label(LEFT - 6, 15, "layer", "end") + _rect("row", LEFT, 6, 14, 10)
    body += "".join(_rect("bar", LEFT + 14 * k, 6, 14, 10, _opacity(k / 8)) for k in range(1, 9))
    body += _label(LEFT + 134, 15, f"none to {top:.2%} of a cell muted")
    label = f"Share of neurons muted in {len(shares)} FFNs; most in {densest}, {top:.2%} of a cell"
    caption = f"Where they are: a row per FFN, its neurons in at most {COLUMNS} cells"
    return _svg(y + 4, label, caption, body)


def _opacity(share):
    return 0.2 + 0.8 * share  # one muted neuron among thousands must still be seen


def _histogram(mutes):
    gains = np.concatenate([layer.gains.double().numpy() for layer in mutes.layers.values()])
    low, high = nonsingular(*mutes.gain_range)
    bars = ((gains - low) / (high - low) * BARS).astype(int).clip(0, BARS - 1)
    counts, width = np.bincount(bars, minlength=BARS), (high - low) / BARS
    x, y, body = _axes((low, high), (0, max(5, counts.max())), "gain")  # fewer than 5 would have fractions
    for bar in counts.nonzero()[0]:
        left, right, top = x(low + bar * width), x(low + (bar + 1) * width), y(counts[bar])
        body += _rect("bar", left, top, right - left, BOTTOM - top)
    label = f"Histogram of {len(gains)} gains, from {gains.min():.3g} to {gains.max():.3g}"
    return _svg(HEIGHT, label, "How many of the neurons have which gain", body)


def _lines(caption, points, x_name, series):
    """A line per entry of ``series``, {name in ``points``: what to call it}, through its finite values."""
    lines = {}
    for name, title in series.items():
        known = [(p[x_name], p[name]) for p in points if p.get(name) is not None and math.isfinite(p[name])]
        if known:
            lines[title] = known
    if not lines:
        return ""
    xs, ys = zip(*sum(lines.values(), []), strict=True)
    x, y, body = _axes((min(xs), max(xs)), (min(ys), max(ys)), x_name)
    for number, (title, line) in enumerate(lines.items()):
        corners = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in line)
        start = LEFT + 110 * number
        body += f'<path class="s{number}" d="M{corners}"/><path class="s{number}" d="M{start} 11h24"/>'
        body += _label(start + 30, 15, title)
        if len(line) <= BARS:
            body += "".join(
                f'<circle class="s{number}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.5"/>' for a, b in line
            )
    spans = (f"{title} from {line[0][1]:.3g} to {line[-1][1]:.3g}" for title, line in lines.items())
    return _svg(HEIGHT, f"{caption}: {', '.join(spans)}", caption, body)


def _axes(xs, ys, label):
    """(x, y, body): where in the picture a value lies, and the axes around the ranges ``xs`` and ``ys``."""
    (x, x_ticks), (y, y_ticks) = _axis(xs, LEFT, RIGHT), _axis(ys, BOTTOM, TOP)
    body = "".join(_label(x(tick), BOTTOM + 16, f"{tick:.6g}", "middle") for tick in x_ticks)
    for tick in y_ticks:
        body += f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        body += _label(LEFT - 6, y(tick) + 4, f"{tick:.6g}", "end")
    return x, y, body + _label((LEFT + RIGHT) / 2, BOTTOM + 34, label, "middle")


def _axis(values, start, end):
    ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(*nonsingular(*values))
    ticks = (ticks / (ticks[1] - ticks[0])).round() * (ticks[1] - ticks[0])  # 0 is not 1e-17
    return lambda value: start + (end - start) * (value - ticks[0]) / (ticks[-1] - ticks[0]), ticks + 0.0


def _label(x, y, text, anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_text(text)}</text>'


def _rect(kind, x, y, width, height, opacity=1):
    size = f'width="{width:.2f}" height="{height:.2f}"'
    return f'<rect class="{kind}" x="{x:.2f}" y="{y:.2f}" {size} fill-opacity="{opacity:.2f}"/>'


def _svg(height, label, caption, body):
    box = f'role="img" aria-label="{_text(label)}" viewBox="0 0 {WIDTH} {height:.0f}"'
    return f"<figure><svg {box}>{body}</svg><figcaption>{_text(caption)}</figcaption></figure>\n"


# HTML. What takes text escapes it; what takes HTML is named html.


def _text(value):
    return escape(_FORBIDDEN.sub("\ufffd", str(value)))


def _wrap(frame, *html):
    """``html`` joined and put into ``frame``; empty if it is empty."""
    inner = "".join(html)
    return inner and frame.format(inner)


def _section(title, *html):
    return _wrap(f"<section>\n<h2>{_text(title)}</h2>\n{{}}</section>\n", *html)


def _grid(*html):
    return _wrap('<div class="grid">\n{}</div>\n', *html)


def _details(summary, html):
    return _wrap(f"<details><summary>{_text(summary)}</summary>{{}}</details>\n", html or "")


def _pre(text):
    return f"<pre>{_text(text)}</pre>"


def _said(html):
    return f'<p class="said" lang="" dir="auto">{html}</p>'  # in a language that is not known


def _facts(facts):
    """A list of terms, those without a value left out."""
    pairs = [(name, value) for name, value in facts.items() if value not in (None, "")]
    return _wrap(
        '<dl class="facts">{}</dl>\n',
        *(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in pairs),
    )


def _table(caption, head, rows):
    """A table in a box that scrolls; the first column names the rows."""
    box = f'<div class="scroll" role="region" aria-label="{_text(caption)}" tabindex="0"><table>'
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    body = (
        f'<tr><th scope="row">{_text(first)}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    )
    top = f"{box}<caption>{_text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>"
    return _wrap(f"{top}{{}}</tbody></table></div>\n", *body)
