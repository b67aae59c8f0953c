"""The pictures of the pages of results. Each carries a digest of the results that it shows."""

import os
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from bench import text
from bench.unlearning.cells import NAMES

CONTENDERS = {"ours": "#1f6feb", "torch.compile": "#8b949e", "eager": "#c9d1d9",
              "down-projection pre-hook": "#e6a817", "Liger SwiGLU (no mask)": "#bc4c00"}  # fmt: skip
METHODS = {
    "neumuter, mute": "#8b949e",
    "neumuter, trained support": "#e6a817",
    "neumuter, modulate": "#1f6feb",
}
PANELS = {
    "forget_extraction": "extraction of what is forgotten",
    "same_extraction": "of what stays, same template",
}


def digest_of(path):
    """The digest that a picture carries, or None."""
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get("Source")


def _save(figure, path, digest):
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130, metadata={"Source": digest})
    plt.close(figure)
    os.replace(temporary, path)


# --- docs/performance.md: what masked_glu reaches of the copy bandwidth, and its speed against others ---


def machines_shown(results):
    """The rows of masked_glu that are shown, of each machine that has some."""
    return [rows for rows in map(_pictured, results.values()) if rows]


def draw_activations(machines, path, digest):
    """One line of two panels for each machine."""
    figure, axes = plt.subplots(
        len(machines), 2, figsize=(11, 3.6 * len(machines)), squeeze=False, layout="constrained"
    )
    for (left, right), rows in zip(axes, machines, strict=True):
        _bars(left, rows, lambda entry, row: 100 * entry["share_of_limit"], skip=())
        left.set_ylabel("% of copy bandwidth")
        left.set_title(text.where(rows[0]["machine"]), fontsize=10, loc="left")
        _bars(
            right, rows, lambda entry, row: entry["median_us"] / row["contenders"][0]["median_us"], ("ours",)
        )
        right.set_ylabel("time over ours")
        right.set_title("masked_glu", fontsize=10, loc="left")
        for axis, height in ((left, 100), (right, 1)):
            axis.axhline(height, color="#24292f", linewidth=0.8, linestyle="--")
    handles = {h.get_label(): h for ax in axes.flat for h in ax.containers}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
    _save(figure, path, digest)


def _pictured(rows):
    """Of each case forward and backward together, or one after the other where that was not measured."""

    def case(row):
        return row["shape"], row["dtype"]

    shown = [
        row
        for row in rows
        if row["benchmark"] == "kernels" and row["op"] == "masked_glu" and row["activation"] == "silu"
        and row["mask_rows"] == 1 and "failed" not in row["contenders"][0]
    ]  # fmt: skip
    together = [case(row) for row in shown if row["pass"] == "forward+backward"]
    return [row for row in shown if (row["pass"] == "forward+backward") == (case(row) in together)]


def _bars(axis, rows, value, skip):
    names = [
        n for n in CONTENDERS if n not in skip and any(n == c["name"] for r in rows for c in r["contenders"])
    ]
    width = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        found = [
            (x, value(c, row))
            for x, row in enumerate(rows)
            for c in row["contenders"]
            if c["name"] == name and "failed" not in c
        ]
        places = [x + (i + 0.5) * width - 0.4 for x, _ in found]
        axis.bar(places, [y for _, y in found], width, label=name, color=CONTENDERS[name])
    dtypes = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    passes = {"forward+backward": "", "forward": " forward", "backward": " backward"}
    labels = [f"{text.shape(row)}\n{dtypes[row['dtype']]}{passes[row['pass']]}" for row in rows]
    many = {"rotation": 90} if len(rows) > 6 else {}
    axis.set_xticks(range(len(rows)), labels, fontsize=8, **many)
    axis.spines[["top", "right"]].set_visible(False)


# --- docs/results.md: extraction against the share of neurons ---


def budgets_shown(results):
    """The rows of SYNTH's first model with all records to forget."""
    synth = results.get("synth", [])
    return [
        row for row in synth
        if row["method"] in METHODS and row["model"] == synth[0]["model"] and row["neighbours"] == "retain"
        and row["forget"] == max(r["forget"] for r in synth)
    ]  # fmt: skip


def draw_budgets(rows, path, digest):
    """Two panels, a line for each method."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for method, colour in METHODS.items():
        chosen = [r for r in rows if r["method"] == method]
        shares = sorted({r["budget"] for r in chosen})
        for axis, (column, title) in zip(axes, PANELS.items(), strict=True):
            values = [[r[column] for r in chosen if r["budget"] == s] for s in shares]
            axis.plot([100 * s for s in shares], [statistics.fmean(v) for v in values], "o-", color=colour,
                      label=NAMES[method].strip("*"))  # fmt: skip
            axis.fill_between([100 * s for s in shares], [min(v) for v in values], [max(v) for v in values],
                              color=colour, alpha=0.15, linewidth=0)  # fmt: skip
            axis.set_xlabel("% of the neurons")
            axis.set_title(title, fontsize=10)
            axis.set_ylim(-0.03, 1.03)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    _save(figure, path, digest)
