"""The tables of docs/performance.md: one function for each placeholder of its template.

Each takes the rows of a results file and the rest of the placeholder, and returns Markdown, or None where
those rows have nothing for it.
"""

from bench import text
from bench.devices import DEVICES


def _cells(row, first):
    """Cells common to all tables: ours, its share of the limit, its baselines, the best one's ratio."""
    ours, *others = row["contenders"]
    if "failed" in ours:
        return [*first, "wrong", "", "", ""]
    share = f"{ours['share_of_limit']:.0%}" if "share_of_limit" in ours else ""
    named = [f"{c['name']} {text.us(c['median_us']) if 'median_us' in c else 'wrong'}" for c in others]
    ratio = f"{row['ratio']:.2f}×" if "ratio" in row else ""
    return [*first, text.time(ours), share, "; ".join(named), ratio]


def _table(head, table):
    return text.table(head, table) if table else None


def _of(rows, benchmark):
    return [row for row in rows if row["benchmark"] == benchmark]


def machines(rows, _):
    """What the rows were measured on and with, by benchmark."""
    known = {}
    for row in rows:
        names = known.setdefault(text.machine_line(row["machine"]), {"busy": text.is_busy(row["machine"])})
        names[row["benchmark"]] = None
    lines = []
    for line, names in known.items():
        busy = " Other processes were running, so these times are too long." * names.pop("busy")
        lines.append(f"- {', '.join(names)}: {line}.{busy}")
    return "\n".join(lines) or None


def checks(rows, _):
    """What the self-test of the ops said."""
    found = [[f"`{row['op']}`", row["error"] or "right"] for row in _of(rows, "check")]
    return _table(["op", "against the reference"], found)


def activations(rows, which):
    """The masked activation of one pass: "forward", "backward" or "forward+backward"."""
    head = ["op", "T×F", "dtype", "mask rows", "ours, µs", "GB/s", "of copy", "copy, µs", "others, µs",
            "to the best"]  # fmt: skip
    relu = which == "forward+backward"
    table = []
    for row in _of(rows, "kernels"):
        if row["pass"] != which or not row["limit"]:
            continue
        first = [f"`{row['op']}` {row['activation']}", text.shape(row), row["dtype"], str(row["mask_rows"])]
        *cells, share, others, ratio = _cells(row, first)
        speed = row["contenders"][0].get("gb_per_s")
        limits = [text.us(row["limit"]["median_us"])]
        limits += [text.us(row["relu_us"]) if "relu_us" in row else ""] if relu else []
        table.append([*cells, f"{speed:.1f}" if speed else "", share, *limits, others, ratio])
    return _table([*head[:8], *["with relu, µs"] * relu, *head[8:]], table)


def projections(rows, _):
    """The masked activation with the down projection."""
    found = [row for row in _of(rows, "kernels") if row["op"].endswith("down projection")]
    cells = [_cells(row, [text.shape(row), row["dtype"]]) for row in found]
    return _table(["T×F×H", "dtype", "ours, µs", "others, µs", "to the best"], [c[:3] + c[4:] for c in cells])


def losses(rows, _):
    cells = [_cells(row, [f"`{row['op']}`", text.shape(row), row["dtype"]]) for row in _of(rows, "losses")]
    return _table(
        ["op", "N×V", "dtype", "ours, µs", "others, µs", "to the best"], [c[:4] + c[5:] for c in cells]
    )


def steps(rows, _):
    table = []
    for row in _of(rows, "step"):
        ours = row["contenders"][0]
        for entry in [*row["contenders"], row["limit"]]:
            cells = [row["op"].removeprefix("training step, "), row["dtype"], entry["name"]]
            if "failed" in entry:
                table.append([*cells, "wrong", "", "", "", ""])
                continue
            slower, larger = (entry[k] / ours[k] if k in ours else None for k in ("median_us", "peak_mib"))
            table.append([
                *cells, f"{entry['median_us'] / 1000:.0f}", f"{entry['tokens_per_s']:.0f}",
                f"{entry['peak_mib']:.0f}", *(f"{x:.2f}×" if x else "" for x in (slower, larger)),
            ])  # fmt: skip
    head = ["model", "base", "step", "ms", "tokens/s", "peak, MiB", "time to ours", "peak to ours"]
    return _table(head, table)


def selection(rows, _):
    found = _of(rows, "select")
    cells = [_cells(row, [row["scores"], row["pass"]]) for row in found]
    reading = [text.us(row["limit"]["median_us"]) for row in found]
    head = ["scores", "by", "ours, µs", "reading once, µs", "others, µs", "to the best"]
    return _table(head, [[*c[:3], r, *c[4:]] for c, r in zip(cells, reading, strict=True)])


def decoding(rows, _):
    table = []
    for row in _of(rows, "decode"):
        *cells, _, others, _ = _cells(row, [text.shape(row), row["dtype"]])
        overhead = f"{row['overhead_percent']:+.1f} %" if "overhead_percent" in row else ""
        table.append([*cells, others, overhead])
    return _table(["T×F", "dtype", "ours, µs", "others, µs", "cost of the mask"], table)


def launching(rows, _):
    cells = [_cells(row, [f"`{row['op']}`", row["pass"]]) for row in _of(rows, "launch")]
    return _table(["op", "pass", "ours, µs", "others, µs", "to the best"], [c[:3] + c[4:] for c in cells])


def serving(rows, _):
    table = []
    for row in _of(rows, "serve"):
        for entry in row["contenders"]:
            speed = f"{entry['tokens_per_s']:.1f}" if "tokens_per_s" in entry else "wrong"
            cost = f"{entry['cost_percent']:+.1f} %" if "cost_percent" in entry else ""
            table.append([row["op"], str(row["shape"][0]), row["dtype"], entry["name"], speed, cost])
    return _table(["what", "rows", "dtype", "how", "tokens/s", "cost"], table)


# --- Compiled ahead of time ------------------------------------------------------------------

CODE = {
    "instructions": "instructions per element", "xu": "XU operations per element", "registers": "registers",
    "programs": "programs on a multiprocessor", "last_load": "cycles to the last load",
}  # fmt: skip


def compilers(rows, _):
    """As in "Triton 3.8.0 and nvcc 13.0"."""
    versions = rows[0]["machine"]
    return f"Triton {versions['triton']}" + (f" and nvcc {versions['nvcc']}" if versions["nvcc"] else "")


def compiled(rows):
    """The rows of the compiled kernels, one for each target."""
    return [
        {"kernel": row["kernel"], "dtype": row["dtype"], "target": target} | found
        for row in _of(rows, "static") for target, found in row["targets"].items()
    ]  # fmt: skip


def count(rows, _):
    return f"{len(compiled(rows)):,}"


def spills(rows, _):
    return str(sum(bool(row["spilled"]) for row in compiled(rows)) or "none")


def machine_code(rows, names):
    """What these kernels, separated by semicolons, take in bfloat16 on NVIDIA's GPUs, over all targets."""
    table = []
    for name in names.split("; "):
        found = [row for row in compiled(rows) if row["kernel"] == name and row["dtype"] == "bf16"]
        found = [row for row in found if "instructions" in row]
        if found:
            ranges = (_range([row[what] for row in found]) for what in CODE)
            table.append([name, *ranges])
    return _table(["kernel", *CODE.values()], table)


def _range(numbers):
    least, most = min(numbers), max(numbers)
    return f"{least:g}" if least == most else f"{least:g}–{most:g}"


def predictions(rows, _):
    table = [
        [row["kernel"].split()[0], row["dtype"], DEVICES[row["target"]].card, str(row["registers"]),
         f"{row['occupancy']:.0%}", f"{row['predicted_us']:.0f}"]
        for row in compiled(rows) if row["dtype"] == "bf16" and "predicted_us" in row
    ]  # fmt: skip
    return _table(["pass", "dtype", "card", "registers", "occupancy", "predicted, µs"], table)


def scale(rows, what):
    """What a text costs where there are many: "read" or "unlearn", and the model."""
    table, (op, model) = [], what.split()
    for row in _of(rows, "scale"):
        if (row["op"], row["model"]) != (op, model):
            continue
        count, visits = row["texts"], row["visits_per_text"]
        each = 1e3 * row["seconds"] / count
        cells = [f"{count:,}", f"{row['seconds']:.0f}", f"{each:,.0f}" if each >= 100 else f"{each:.3g}"]
        cells += [f"{visits:.2f}"] if op == "unlearn" else []
        table.append([*cells, f"{row['before_mib']:.0f}", f"{row['peak_mib']:.0f}"])
    visited = ["visits per text"] * (op == "unlearn")
    return _table(["texts", "s", "ms per text", *visited, "MiB before", "peak MiB"], table)


def plans(rows, _):
    """Peaks of a device, traced and planned."""
    table = []
    for row in _of(rows, "plans"):
        gb = [f"{row[what] / 1e9:.1f}" for what in ("traced", "planned")]
        table.append([
            row["model"], f"{row['parameters'] / 1e9:.0f}", row["layout"], str(row["devices"]),
            "yes" if row["recompute"] else "no", *gb, f"{row['planned'] / row['traced'] - 1:+.1%}",
        ])  # fmt: skip
    head = ["model", "10^9 parameters", "layout", "devices", "recomputed", "traced, GB", "planned, GB", ""]
    return _table(head, table)


PARTS = {
    function.__name__: function
    for function in (
        machines, checks, activations, projections, losses, steps, selection, decoding, launching, serving,
        compilers, count, spills, machine_code, predictions, scale, plans,
    )
}  # fmt: skip
