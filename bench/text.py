"""Results as text: lines on the terminal, and the pieces that tables share."""


def table(head, rows, align="---"):
    """A Markdown table. ``align``: how the columns after the first are aligned, as Markdown writes it."""
    rule = ["---", *[align] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])


def machine_line(machine):
    """The machine and the versions of a row in one line."""
    versions = ", ".join(f"{p} {v}" for p, v in machine["versions"].items())
    cuda = f", CUDA {machine['cuda']}" if machine["cuda"] else ""
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    commit = f"commit {machine['commit']}" if "commit" in machine else "commit not recorded"
    return (
        f"{where(machine)}; Python {machine['python']}, {versions}{cuda}{driver}; {commit}, {machine['date']}"
    )


def where(machine):
    """The card, or the processor and its threads."""
    if machine["gpu"]:
        return machine["gpu"]
    capability = f", {machine['capability']}" if "capability" in machine else ""
    return f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}{capability}"


def is_busy(machine):
    """Whether other processes kept the CPU busy before the measurement, so that its times are too long."""
    return machine["device"] == "cpu" and machine["load"] > 0.3 * machine["threads"]


def time(entry):
    """Median and quartiles in µs."""
    return f"{us(entry['median_us'])} ({us(entry['q1_us'])}–{us(entry['q3_us'])})"


def us(x):
    """A number of µs, to three digits."""
    return f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}"


def shape(row):
    return "×".join(map(str, row["shape"]))


def row_text(row):
    """One row of results in lines: what it is, then each contender."""
    if "error" in row:
        return f"{row['op']:16} {row['error'] or 'right'}"
    if "traced" in row:
        what = f"{row['model']}, {row['layout']} on {row['devices']}" + ", recomputed" * row["recompute"]
        return f"{what}: {row['traced'] / 1e9:.2f} GB traced, {row['planned'] / 1e9:.2f} GB planned"
    if "texts" in row:
        about = f"{row['op']}, {row['model']}, {row['texts']} texts"
        return f"{about}: {row['seconds']:.1f} s, peak {row['peak_mib']:.0f} MiB"
    what = [row["op"], row["pass"], shape(row), *(row.get(key) for key in ("dtype", "activation", "scores"))]
    if "mask_rows" in row:
        what.append(f"{row['mask_rows']} mask row" + "s" * (row["mask_rows"] > 1))
    lines = [", ".join(str(w) for w in what if w)]
    for entry in row["contenders"]:
        if "failed" in entry:
            lines.append(f"    {entry['name']:26} WRONG: {entry['failed']}")
            continue
        parts = [f"{entry['name']:26} {time(entry)} µs"]
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
        lines.append(f"    {row['limit']['name']:26} {time(row['limit'])} µs")
    if "ratio" in row:
        lines.append(f"    ours is {row['ratio']:.2f} times as fast as {row['best_baseline']}")
    if "overhead_percent" in row:
        lines.append(f"    the mask costs {row['overhead_percent']:+.1f} %")
    return "\n".join(lines)
