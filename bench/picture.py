"""The README's picture: what masked_glu reaches of the copy bandwidth, and its speed against others."""

import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

COLOURS = {"ours": "#1f6feb", "torch.compile": "#8b949e", "eager": "#c9d1d9",
           "down-projection pre-hook": "#e6a817", "Liger SwiGLU (no mask)": "#bc4c00"}  # fmt: skip


def draw(machines, path, digest):
    """One line of two panels for each (machine, rows); the picture's metadata hold the results' digest."""
    figure, axes = plt.subplots(
        len(machines), 2, figsize=(11, 3.6 * len(machines)), squeeze=False, layout="constrained"
    )
    for (left, right), (machine, rows) in zip(axes, machines, strict=True):
        where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
        _bars(left, rows, lambda entry, row: 100 * entry["share_of_limit"], skip=())
        left.axhline(100, color="#24292f", linewidth=0.8, linestyle="--")
        left.set_ylabel("% of copy bandwidth")
        left.set_title(f"{where}", fontsize=10, loc="left")
        _bars(
            right, rows, lambda entry, row: entry["median_us"] / row["contenders"][0]["median_us"], ("ours",)
        )
        right.axhline(1, color="#24292f", linewidth=0.8, linestyle="--")
        right.set_ylabel("time over ours")
        right.set_title("masked_glu", fontsize=10, loc="left")
    handles = {h.get_label(): h for ax in axes.flat for h in ax.containers}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130, metadata={"Source": digest})
    plt.close(figure)
    os.replace(temporary, path)


def _bars(axis, rows, value, skip):
    names = [
        n for n in COLOURS if n not in skip and any(n == c["name"] for r in rows for c in r["contenders"])
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
        axis.bar(places, [y for _, y in found], width, label=name, color=COLOURS[name])
    dtypes = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    passes = {"forward+backward": "", "forward": " forward", "backward": " backward"}
    labels = [
        f"{row['shape'][0]}×{row['shape'][1]}\n{dtypes[row['dtype']]}{passes[row['pass']]}" for row in rows
    ]
    many = {"rotation": 90} if len(rows) > 6 else {}
    axis.set_xticks(range(len(rows)), labels, fontsize=8, **many)
    axis.spines[["top", "right"]].set_visible(False)


def digest_of(path):
    """The digest that a picture carries, or None."""
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get("Source")
