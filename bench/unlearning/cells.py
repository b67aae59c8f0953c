"""What a table of docs/results.md is made of: its columns, the names of its lines, and its cells."""

import math
import statistics

from bench import text

COLUMNS = {
    "verbatim": ("forget: verbatim ↓", "{:.2f}"),
    "knowledge": ("forget: knowledge ↓", "{:.2f}"),
    "forget_extraction": ("forget: extraction ↓", "{:.2f}"),
    "forget_secrets": ("forget: secrets ↓", "{:.2f}"),
    "forget_sampled": ("forget: extraction in 100 samples ↓", "{:.2f}"),
    "forget_ma": ("forget: MA ↓", "{:.2f}"),
    "forget_el": ("forget: EL_10 ↓", "{:.2f}"),
    "paraphrased_ma": ("forget, asked otherwise: MA ↓", "{:.2f}"),
    "leakage": ("leakage, % (0 is best)", "{:+.0f}"),
    "instead": ("forget: answered so ↑", "{:.2f}"),
    "others": ("forget: another's text ↓", "{:.2f}"),
    "same_refused": ("keep, same template: answered so ↓", "{:.2f}"),
    "made_up_refused": ("made-up names: answered so ↓", "{:.2f}"),
    "agree": ("agrees with retrained", "{:.2f}"),
    "worded_ma": ("forget, wording too: MA", "{:.2f}"),
    "worded_loss": ("forget, wording too: loss", "{:.2f}"),
    "same_extraction": ("keep, same template: extraction ↑", "{:.2f}"),
    "waiting": ("not yet asked: verbatim ↑", "{:.2f}"),
    "retain_verbatim": ("keep: verbatim ↑", "{:.2f}"),
    "retain_knowledge": ("keep: knowledge ↑", "{:.2f}"),
    "waiting_extraction": ("not yet asked: extraction ↑", "{:.2f}"),
    "retain_extraction": ("keep: extraction ↑", "{:.2f}"),
    "perplexity": ("perplexity over original", "{:+.1%}"),
    "half extraction": ("half: extraction ↓", "{:.2f}"),
    "half secrets": ("half: secrets ↓", "{:.2f}"),
    "relearned 10 secrets": ("10 steps: secrets ↓", "{:.2f}"),
    "relearned 30 secrets": ("30 steps: secrets ↓", "{:.2f}"),
    "relearned 100 secrets": ("100 steps: secrets ↓", "{:.2f}"),
    "relearned 100 ma": ("100 steps: MA ↓", "{:.2f}"),
    "relearned 100 extraction": ("100 steps: extraction ↓", "{:.2f}"),
    "share": ("neurons", "{:.2%}"),
    "precision": ("precision", "{:.2f}"),
    "recall": ("recall", "{:.2f}"),
    "outside": ("gains below 0 or above 1", "{:.0%}"),
    "loss": ("loss of all texts ↓", "{:.2f}"),
    "steps": ("steps", "{:.0f}"),
    "seconds": ("s", "{:.0f}"),
    "peak_mib": ("peak, MiB", "{:.0f}"),
}
NAMES = {
    "random": "random neurons", "attribution": "one-shot attribution", "activation": "activation ratio",
    "fisher": "g²/F, silenced", "paper": "the paper's recipe", "neumuter, mute": "ours, mute",
    "neumuter, trained support": "ours, modulate, trained support",
    "neumuter, modulate": "**ours, modulate**", "ascent": "gradient ascent", "difference": "GradDiff",
    "npo": "NPO", "simnpo": "SimNPO", "before": "the original", "retrained": "retrained without them",
    "plain": "ours, all tokens alike", "calibrated": "**our default**", "live": "ours, gains after rounding",
    "fitted": "ours, found on the rounded model",
    "estimate": "the estimate", "base": "the model before fine-tuning", "both": "the lower of both",
    "fewer": "in 20 steps, with three times the rate", "distribution": "towards a whole distribution",
    "few samples": "ours, 10%, with 16 texts of its own, at a rate of 0.1", "longer": "in twice the steps",
    "clamped": "ours, gains from 0 to 1",
    "random, fitted": "random neurons, fitted", "candidates, fitted": "random candidates, fitted",
}  # fmt: skip


def table(groups, columns):
    """A Markdown table: one line per (label, rows), a column per metric that some row has."""
    groups = [(label, rows) for label, rows in groups if rows]
    present = [c for c in columns if any(_value(row, c) is not None for _, rows in groups for row in rows)]
    lines = [
        [label]
        + [cell([v for row in rows if (v := _value(row, c)) is not None], COLUMNS[c][1]) for c in present]
        for label, rows in groups
    ]
    return text.table(["", *(COLUMNS[c][0] for c in present)], lines, "---:")


def cell(values, pattern):
    if not values:
        return ""
    extremes = (statistics.fmean(values), min(values), max(values))
    mean, low, high = (f"×{1 + x:.2g}" if x > 1 and "%" in pattern else pattern.format(x) for x in extremes)
    return mean if low == high else f"{mean} ({low} … {high})"


def _value(row, column):
    if column == "perplexity":
        measured = row.get("heldout_perplexity")
        return measured and measured / row["original_perplexity"] - 1
    return row.get(column)


def relate(rows, keys):
    """The rows with the perplexity of the original model of the same ``keys`` added.

    Raises:
        ValueError: two originals of the same keys differ, so a row's own is not known.
    """
    original = {}
    for row in rows:
        if row["method"] == "before":
            about, found = tuple(row[k] for k in keys), row["heldout_perplexity"]
            if not math.isclose(original.setdefault(about, found), found, rel_tol=1e-3):
                raise ValueError(f"two originals of {keys} = {about} differ: tell them apart by another key")
    return [row | {"original_perplexity": original[tuple(row[k] for k in keys)]} for row in rows]


def by_method(rows, order=("before", "retrained", *(n for n in NAMES if n not in ("before", "retrained")))):
    """(name, rows) of each method; fewer seeds than the others have are in the name."""
    found = [(m, [r for r in rows if r["method"] == m]) for m in order]
    return [(name_of(m, some, rows), some) for m, some in found if some]


def name_of(method, some, rows, share=""):
    """What a method is called, and how many seeds its rows have, if these are fewer than all."""
    count, every = (len({row["seed"] for row in found}) for found in (some, rows))
    return NAMES[method] + share + (f" ({count} seed{'s' * (count > 1)})" if count < every else "")


def where(rows, **wanted):
    return [r for r in rows if all(r.get(k, v) == v for k, v in wanted.items())]


def by_share(rows):
    """(name, rows) of each method, ours with each share of the neurons."""
    ours = [row for row in rows if "budget" in row]
    chosen = [(share, where(ours, budget=share)) for share in sorted({row["budget"] for row in ours})]
    groups = [(name_of("neumuter, modulate", some, rows, f", {share:.0%}"), some) for share, some in chosen]
    others = by_method([row for row in rows if "budget" not in row])
    first = [pair for pair in others if pair[0] in (NAMES["before"], NAMES["retrained"])]
    return first + groups + [pair for pair in others if pair not in first]
