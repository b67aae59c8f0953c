"""Results as text: lines on the terminal, the README's performance section, and its picture."""

import hashlib
import json
from pathlib import Path

from bench import picture
from bench.rows import read as rows_of
from bench.rows import replace

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
README = ROOT / "README.md"
PICTURE = ROOT / "docs/performance.png"
BEGIN = "<!-- performance: made by `python -m bench readme` from bench/results; do not edit -->"
END = "<!-- end of performance -->"


# --- On the terminal -------------------------------------------------------------------------


def machine_line(header):
    """The machine and the versions of a result file in one line."""
    threads = f"{header['threads']} thread" + "s" * (header["threads"] != 1)
    where = header["gpu"] or f"{header['cpu']}, {threads}, {header['capability']}"
    versions = ", ".join(f"{p} {v}" for p, v in header["versions"].items())
    cuda = f", CUDA {header['cuda']}" if header["cuda"] else ""
    return f"{where}; Python {header['python']}, {versions}{cuda}; {header['date']}"


def is_busy(header):
    """Whether other processes kept the CPU busy before the measurement, so that its times are too long."""
    return header["device"] == "cpu" and header["load"] > 0.3 * header["threads"]


def _time(entry):
    return f"{_us(entry['median_us'])} ({_us(entry['q1_us'])}–{_us(entry['q3_us'])})"


def _us(x):
    return f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}"


def _shape(row):
    return "×".join(map(str, row.get("shape", ())))


def row_text(row):
    """One row of results in lines: what it is, then each contender."""
    what = [row["op"], row["pass"], _shape(row), row.get("dtype"), row.get("activation"), row.get("scores")]
    if "mask_rows" in row:
        what.append(f"{row['mask_rows']} mask row" + "s" * (row["mask_rows"] > 1))
    lines = [", ".join(str(w) for w in what if w)]
    if "error" in row:
        return f"{row['op']:16} {row['error'] or 'right'}"
    for entry in row["contenders"]:
        if "failed" in entry:
            lines.append(f"    {entry['name']:26} WRONG: {entry['failed']}")
            continue
        parts = [f"{entry['name']:26} {_time(entry)} µs"]
        if "gb_per_s" in entry:
            parts.append(f"{entry['gb_per_s']:.1f} GB/s")
        if "share_of_limit" in entry:
            parts.append(f"{entry['share_of_limit']:.0%} of {row['limit']['name']}")
        if "tokens_per_s" in entry:
            parts.append(f"{entry['tokens_per_s']:.0f} tokens/s")
        if "peak_mib" in entry:
            parts.append(f"peak {entry['peak_mib']:.1f} MiB")
        if "cost_percent" in entry:
            parts.append(f"costs {entry['cost_percent']:+.1f} %")
        lines.append("    " + ", ".join(parts))
    if row["limit"]:
        lines.append(f"    {row['limit']['name']:26} {_time(row['limit'])} µs")
    if "ratio" in row:
        lines.append(f"    ours is {row['ratio']:.2f} times as fast as {row['best_baseline']}")
    if "overhead_percent" in row:
        lines.append(f"    the mask costs {row['overhead_percent']:+.1f} %")
    return "\n".join(lines)


# --- In the README ---------------------------------------------------------------------------


def load():
    """All results: [(benchmark, machine, rows)], of rows that were measured on one day."""
    groups = {}
    for path in sorted(RESULTS.glob("*.jsonl")):
        for row in rows_of(path):
            groups.setdefault((row["benchmark"], json.dumps(row["machine"])), []).append(row)
    return [(benchmark, rows[0]["machine"], rows) for (benchmark, _), rows in groups.items()]


def digest():
    """Of all result files; the picture carries that of the results it shows."""
    paths = sorted(RESULTS.glob("*.jsonl"))
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in paths)).hexdigest()


def _table(head, rows):
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _cells(row, first):
    """Cells common to all tables: ours, its baselines, the best one's ratio."""
    ours, *others = row["contenders"]
    if "failed" in ours:
        return [*first, "wrong", "", "", ""]
    share = f"{ours['share_of_limit']:.0%}" if "share_of_limit" in ours else ""
    named = [f"{c['name']} {_us(c['median_us']) if 'median_us' in c else 'wrong'}" for c in others]
    ratio = f"{row['ratio']:.2f}×" if "ratio" in row else ""
    return [*first, _time(ours), share, "; ".join(named), ratio]


def _kernels(rows):
    head = ["op", "pass", "T×F", "dtype", "mask rows", "ours, µs", "GB/s", "of copy", "copy, µs",
            "with relu, µs", "others, µs", "to the best"]  # fmt: skip
    table = []
    for row in passes_shown([row for row in rows if row["limit"] and "mask_rows" in row]):
        first = [f"`{row['op']}`", row["pass"], _shape(row), row["dtype"], str(row["mask_rows"])]
        *cells, share, others, ratio = _cells(row, first)
        speed = row["contenders"][0].get("gb_per_s")
        relu = _us(row["relu_us"]) if "relu_us" in row else ""
        limits = _us(row["limit"]["median_us"]), relu
        table.append([*cells, f"{speed:.1f}" if speed else "", share, *limits, others, ratio])
    projections = [
        _cells(row, [_shape(row), row["dtype"]]) for row in rows if row["op"].endswith("down projection")
    ]
    projections = [[*cells[:3], *cells[4:]] for cells in projections]
    return [
        "The masked activation and its gradients: median (quartiles). GB/s counts what must move. "
        "Two times show what binds: a copy of as many bytes, which is memory alone, and ours with relu, "
        "which moves the same without an exponential or a division.",
        _table(head, table),
        "The same with the down projection in every contender, which weight masking and IA3 work on:",
        _table(["T×F×H", "dtype", "ours, µs", "others, µs", "to the best"], projections),
    ]


def passes_shown(rows):
    """Of each case forward and backward together, or one after the other where that was not measured."""

    def case(row):
        return row["op"], *row["shape"], row["dtype"], row["mask_rows"]

    together = {case(row) for row in rows if row["pass"] == "forward+backward"}
    return [row for row in rows if (row["pass"] == "forward+backward") == (case(row) in together)]


def _pictured(rows):
    return [
        row
        for row in rows
        if row["op"] == "masked_glu" and row["mask_rows"] == 1 and "failed" not in row["contenders"][0]
    ]


def _losses(rows):
    table = []
    for row in rows:
        *cells, _, others, ratio = _cells(row, [f"`{row['op']}`", _shape(row), row["dtype"]])
        table.append([*cells, others, ratio])
    return [
        "Losses of tokens and their gradients with respect to the logits:",
        _table(["op", "N×V", "dtype", "ours, µs", "others, µs", "to the best"], table),
    ]


def _step(rows):
    table = []
    for row in rows:
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
    return [
        f"A mask-training step on a forget and a neighbour sample of {rows[0]['shape'][1]} tokens each. The "
        "floor is one forward and one input-gradient backward of the frozen model by plain PyTorch; ours is "
        "below it where its losses cost less than PyTorch's. Peaks are without the libraries.",
        _table(head, table),
    ]


def _select(rows):
    cells = [_cells(row, [row["scores"], row["pass"]]) for row in rows]
    reading = [_us(row["limit"]["median_us"]) for row in rows]
    table = [[*c[:3], r, *c[4:]] for c, r in zip(cells, reading, strict=True)]
    head = ["scores", "by", "ours, µs", "reading once, µs", "others, µs", "to the best"]
    return ["`select_muted`:", _table(head, table)]


def _decode(rows):
    table = []
    for row in rows:
        *cells, _, others, _ = _cells(row, [_shape(row), row["dtype"]])
        overhead = f"{row['overhead_percent']:+.1f} %" if "overhead_percent" in row else ""
        table.append([*cells, others, overhead])
    head = ["T×F", "dtype", "ours, µs", "others, µs", "cost of the mask"]
    return ["Decoding: the masked activation against the same without a mask.", _table(head, table)]


def _serve(rows):
    table = []
    for row in rows:
        for entry in row["contenders"]:
            speed = f"{entry['tokens_per_s']:.1f}" if "tokens_per_s" in entry else "wrong"
            cost = f"{entry['cost_percent']:+.1f} %" if "cost_percent" in entry else ""
            table.append([row["op"], str(row["shape"][0]), row["dtype"], entry["name"], speed, cost])
    return [
        "Generation with mute sets of 1 % of the neurons, by Llamas of the shapes of SmolLM2-135M and Llama "
        "3.2 1B: 32 tokens of prompt, 16 new. Costs are medians over the rounds of what each took longer "
        "than the untouched model next to it. Of many tenants each row of the batch has another set:",
        _table(["what", "rows", "dtype", "how", "tokens/s", "cost"], table),
    ]


def _static(header, rows):
    """What compiling ahead of time says, in one paragraph and a table of predictions."""
    ours = [r for r in rows if r["kernel"] in ("forward silu split", "backward silu split")]
    table = [
        [r["kernel"].split()[0], r["dtype"], r["card"], str(r["registers"]), f"{r['occupancy']:.0%}",
         f"{r['predicted_us']:.0f}"]
        for r in ours if r["dtype"] == "bf16"
    ]  # fmt: skip
    spills = sum(bool(r["spilled"]) for r in rows)
    nvcc = f" and nvcc {header['nvcc']}" if header["nvcc"] else ""
    return [
        f"Compiled ahead of time with Triton {header['triton']}{nvcc}: {len(rows)} pairs of kernel and "
        f"target (sm_80, sm_90, sm_100, gfx942), of which {spills or 'none'} spill registers. "
        "`python -m bench static` prints them all. The times below are **predictions** of `masked_glu` "
        "(silu, 4096×14336) at the roofline of the data sheets' bandwidths, not measurements:",
        _table(["pass", "dtype", "card", "registers", "occupancy", "predicted, µs"], table),
    ]


PARTS = {"kernels": _kernels, "losses": _losses, "step": _step, "select": _select, "decode": _decode, "serve": _serve}


def section(results):
    """The README's performance section, in Markdown."""
    parts = ["## Performance"]
    measured = [r for r in results if r[0] != "static"]
    if any(m["gpu"] for _, m, _ in measured):
        cards = ", ".join(sorted({m["gpu"] for _, m, _ in measured if m["gpu"]}))
        parts.append(f"GPU figures are measured on {cards}; no other GPU has confirmed them yet.")
    else:
        parts.append(
            "No GPU has confirmed the speed of the GPU kernels yet: all figures for GPUs are predictions, "
            "and `make gpu` on a GPU machine replaces them by measurements."
        )
    parts.append(
        "`make bench` measures all of this anew. All contenders of a row are checked against the reference "
        "in float64, then timed in turn in one process that keeps freed memory; the copy is torch's, of as "
        "many bytes."
    )
    if any(sub == "kernels" for sub, _, _ in measured):
        parts.append("![Speed-up and share of copy bandwidth](docs/performance.png)")
    machines = sorted({machine_line(m) for _, m, _ in measured})
    for line in machines:
        parts.append(f"### {line.split(';')[0]}")
        parts.append(line.split("; ", 1)[1] + ".")
        if any(is_busy(m) for _, m, _ in measured if machine_line(m) == line):
            parts.append("Other processes were running: these times are too long.")
        for sub, m, rows in measured:
            if machine_line(m) == line and sub in PARTS:
                parts += PARTS[sub](rows)
    for sub, m, rows in results:
        if sub == "static":
            parts += ["### GPUs that were not there", *_static(m, rows)]
    return "\n\n".join(parts)


def readme(check=False):
    """Renews the section and the picture, or tells whether they are up to date; returns the exit status."""
    text = README.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        print(f"README.md must have the lines {BEGIN} and {END} once each")
        return 1
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    results = load()
    renewed = f"{before}{BEGIN}\n\n{section(results)}\n\n{END}{after}"
    has_picture = any(sub == "kernels" for sub, _, _ in results)
    if check:
        fresh = renewed == text and (not has_picture or picture.digest_of(PICTURE) == digest())
        if not fresh:
            print("The README's performance section is out of date: run python -m bench readme")
        return int(not fresh)
    if has_picture:
        drawn = [(m, passes_shown(_pictured(rows))) for sub, m, rows in results if sub == "kernels"]
        picture.draw(drawn, PICTURE, digest())
    replace(README, renewed)
    return 0
