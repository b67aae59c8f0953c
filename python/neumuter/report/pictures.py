"""The pictures of a report, drawn by matplotlib: SVG that takes the colours and the font of its page."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from neumuter.mutes.mute_set import MuteSet
from neumuter.report.characters import replace_forbidden

MAX_CELLS_PER_ROW = 64
MAX_ROW_LABELS = 24
BARS = 32
# As wide as a phone, in points: letters in a picture are then nearly as large as those around it.
WIDTH, HEIGHT = 360.0, 206.0
# What matplotlib draws in the colour of a value becomes the CSS variable of that name in style.css.
COLOURS = {"c0": "#000001", "c1": "#000002", "soft": "#000003", "line": "#000004"}
# The colour and the style of the first and the second line.
SERIES = (("c0", "-"), ("c1", "--"))
STYLE = {
    "axes.autolimit_mode": "round_numbers", "axes.xmargin": 0, "axes.ymargin": 0,
    "axes.spines.bottom": False, "axes.spines.left": False,
    "axes.spines.right": False, "axes.spines.top": False,
    "font.size": 11, "grid.color": COLOURS["line"], "legend.frameon": False, "lines.linewidth": 2,
    "lines.dash_capstyle": "round", "lines.solid_capstyle": "round",
    "svg.fonttype": "none", "svg.hashsalt": "neumuter", "text.parse_math": False,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.labelsize": 11, "ytick.labelsize": 11,
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """``svg``: an ``<svg>`` element with an accessible name. ``caption``: plain text."""

    svg: Markup
    caption: str


def draw_heat_map(mutes: MuteSet) -> Picture:
    """Draw where the muted neurons are: a row per FFN, and in it the share of muted neurons per cell."""
    shares = {path: _compute_shares(mutes, path) for path in mutes.widths}
    top, densest = max((share.max(), path) for path, share in shares.items())
    row_height = min(14.0, max(4.0, 300 / len(shares)))
    with style.context(["default", STYLE]):
        height = row_height * len(shares) + 28
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        axes = figure.add_axes((0.1, 4 / height, 0.87, 1 - 28 / height))
        for row, share in enumerate(shares.values()):
            filled, width = share.nonzero()[0], 1 / len(share)
            # One muted neuron among thousands must still be seen. The quotient is exactly 1 at the most; with
            # the product first, rounding can exceed 1, which matplotlib refuses.
            opacities = 0.2 + 0.8 * (share[filled] / top)
            colours: list[Any] = [COLOURS["soft"], *((COLOURS["c0"], opacity) for opacity in opacities)]
            spans = [(0.0, 1.0), *((cell * width, width) for cell in filled)]
            axes.broken_barh(spans, (row, 0.9), facecolors=colours, clip_on=False, gid=f"row{row}")
        labels = [next((part for part in path.split(".") if _is_number(part)), "") for path in shares]
        rows = range(0, len(shares), math.ceil(len(shares) / MAX_ROW_LABELS))
        axes.set(xlim=(0, 1), ylim=(len(shares), 0), xticks=[], ylabel="")
        axes.set_yticks([row + 0.45 for row in rows], [labels[row] for row in rows])
        scale = figure.add_axes((0.1, 1 - 16 / height, 0.35, 10 / height))
        colours = [COLOURS["soft"], *((COLOURS["c0"], 0.2 + 0.8 * step / 8) for step in range(1, 9))]
        scale.broken_barh([(step, 1) for step in range(9)], (0, 1), facecolors=colours, clip_on=False)
        scale.set(xlim=(0, 9), ylim=(0, 1), xticks=[])
        scale.set_yticks([0.5], [f"0 to {top:.2%} of a cell"])
        scale.yaxis.tick_right()
        label = f"Share of neurons muted in {len(shares)} FFNs; most in {densest}, {top:.2%} of a cell"
        titles = {f"row{row}": path for row, path in enumerate(shares)}
        caption = f"Where they are: a row per FFN, numbered by layer, in at most {MAX_CELLS_PER_ROW} cells"
        return Picture(_save_svg(figure, label, titles), caption)


def draw_histogram(mutes: MuteSet) -> Picture:
    """Draw how many of the muted neurons have which gain, over the range of gains that was allowed."""
    gains = np.concatenate([layer.gains.double().numpy() for layer in mutes.layers.values()])
    low, high = _widen(*mutes.gain_range)
    bars = ((gains - low) / (high - low) * BARS).astype(int).clip(0, BARS - 1)
    counts, edges = np.bincount(bars, minlength=BARS), np.linspace(low, high, BARS + 1)
    with style.context(["default", STYLE]):
        figure = _make_figure(HEIGHT)
        axes = figure.subplots()
        axes.stairs(counts, edges, fill=True, color=COLOURS["c0"], clip_on=False)
        # An axis that ends below 5 would have fractions as ticks.
        axes.set(xlim=(low, high), ylim=(0, max(5, counts.max())))
        _add_grid(axes, "gain")
        label = f"Histogram of {len(gains)} gains, from {gains.min():.3g} to {gains.max():.3g}"
        return Picture(_save_svg(figure, label), "How many of the neurons have which gain")


def draw_lines(
    caption: str, points: Sequence[Mapping[str, Any]], x_name: str, series: Mapping[str, str]
) -> Picture | None:
    """Draw one line per series through its finite values.

    Args:
        points: the points of all series, {name: value} each.
        x_name: the name of the values on the x axis, and its label.
        series: {name in ``points``: its title}, two at most.

    Returns:
        The picture, None if no series has a finite value.
    """
    lines = {}
    for name, title in series.items():
        known = [(p[x_name], p[name]) for p in points if p.get(name) is not None and math.isfinite(p[name])]
        if known:
            # The last point comes again, so that a line of one point is a dot.
            lines[title] = np.array([*known, known[-1]], float)
    if not lines:
        return None
    with style.context(["default", STYLE]):
        figure = _make_figure(HEIGHT)
        axes = figure.subplots()
        for (title, line), (colour, dashes) in zip(lines.items(), SERIES, strict=False):
            axes.plot(*line.T, dashes, color=COLOURS[colour], label=title, clip_on=False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0, borderaxespad=0.2)
        _add_grid(axes, x_name)
        spans = (f"{title} from {line[0, 1]:.3g} to {line[-1, 1]:.3g}" for title, line in lines.items())
        return Picture(_save_svg(figure, f"{caption}: {', '.join(spans)}"), caption)


def _compute_shares(mutes: MuteSet, path: str) -> NDArray[np.float64]:
    """Compute the share of muted neurons in each cell of an FFN's row: float64 [cells]."""
    width = mutes.widths[path]
    cells = min(MAX_CELLS_PER_ROW, width)
    indices = mutes.layers[path].indices.long().numpy() if path in mutes.layers else np.zeros(0, int)
    sizes = np.diff(-(-np.arange(cells + 1) * width // cells))
    shares: NDArray[np.float64] = np.bincount(indices * cells // width, minlength=cells) / sizes
    return shares


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _widen(low: float, high: float) -> tuple[float, float]:
    """Return the range itself, or a wider one around it if it is too narrow for an axis."""
    if high - low > 1e-9 * max(abs(low), abs(high), 1e-300):
        return low, high
    room = 0.5 * max(abs(low), abs(high)) or 0.5
    return low - room, high + room


def _make_figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")


def _add_grid(axes: Axes, x_label: str) -> None:
    axes.locator_params(nbins=5)
    axes.grid(axis="y", clip_on=False)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label)


def _save_svg(figure: Figure, label: str, titles: Mapping[str, str] | None = None) -> Markup:
    """Write a figure as an ``<svg>`` element for the body of a page whose stylesheet has ``COLOURS``.

    It has no ids, which must be unique in a page, no style attributes, which the page's policy forbids, and
    no namespaces, which HTML implies.

    Args:
        figure: drawn in the colours of ``COLOURS``; no text in it is turned.
        label: the accessible name, plain text.
        titles: {gid of an artist: its tooltip}, plain text.
    """
    for background in (figure.patch, *(axes.patch for axes in figure.axes)):
        background.set_visible(False)
    buffer = io.BytesIO()
    # A date or a version would differ from one run to the next.
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawn = ElementTree.fromstring(buffer.getvalue())
    box = drawn.attrib["viewBox"]
    for definitions in drawn.findall("{*}defs"):
        drawn.remove(definitions)
    for element in list(drawn.iter()):
        old, element.attrib = element.attrib, _page_attributes(element.attrib)
        element.tag, element.tail = element.tag.rpartition("}")[2], None
        if (element.text or "").isspace():
            element.text = None
        if titles and old.get("id") in titles:
            title = ElementTree.Element("title")
            title.text = replace_forbidden(titles[old["id"]])
            element.insert(0, title)
    drawn.attrib = {"role": "img", "aria-label": replace_forbidden(label), "viewBox": box}
    return Markup(ElementTree.tostring(drawn, encoding="unicode"))


def _page_attributes(drawn: Mapping[str, str]) -> dict[str, str]:
    """Translate what matplotlib gave an element: style to attributes, colours to variables of the page."""
    variables = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
    properties = (entry.split(": ", 1) for entry in drawn.get("style", "").split("; ") if entry)
    found = {name: variables.get(value, value) for name, value in properties if name != "font-family"}
    found |= {name: drawn[name] for name in ("x", "y") if name in drawn}
    if "d" in drawn:
        found["d"] = " ".join(re.sub(r"(\.\d\d)\d+", r"\1", drawn["d"]).split())
    return found
