"""The picture of the demo: how many neurons it takes to forget, and what that costs."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
except ImportError as error:
    raise ImportError("the demo draws a picture, which needs matplotlib: pip install matplotlib") from error

COLOURS = {"mute": "#b3432b", "modulate": "#1f6f8b"}
WORDS = {"mute": "silenced (gain 0)", "modulate": "modulated (fitted gains)"}


def draw(curve: Sequence[Mapping[str, Any]], before: Mapping[str, Any]) -> bytes:
    """PNG bytes of records still extracted (y) over the share of neurons touched (x, percent).

    ``curve``: points as in report.json; ``before``: the report's row of the untouched model.
    """
    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    panels = (
        ("forget_extraction", "To be forgotten"),
        ("retain_same_extraction", "To be kept, same template"),
    )
    for ax, (key, title) in zip(axes, panels, strict=True):
        ax.axhline(before[key], color="0.6", linestyle=":", label="before")
        for mode, colour in COLOURS.items():
            points = sorted((p["muted_share"], p[key]) for p in curve if p["mode"] == mode)
            ax.plot(*zip(*points, strict=True), marker="o", color=colour, label=WORDS[mode])
        ax.set_title(title)
        ax.set_xlabel("share of neurons touched")
        ax.set_xlim(left=0)
        ax.set_ylim(-0.04, 1.04)
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("records extracted word for word")
    axes[0].legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
