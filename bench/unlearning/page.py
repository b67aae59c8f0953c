# ruff: noqa: E501 (the page's own prose)
"""docs/results.md and its pictures, made from the JSON of the experiments."""

import hashlib
import os
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.rows import read, replace

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results/unlearning"
PAGE = ROOT / "docs/results.md"
COLUMNS = {
    "forget_extraction": ("forget: extraction ↓", "{:.2f}"),
    "forget_sampled": ("forget: extraction in 100 samples ↓", "{:.2f}"),
    "forget_ma": ("forget: MA ↓", "{:.2f}"),
    "forget_el": ("forget: EL_10 ↓", "{:.2f}"),
    "paraphrased_ma": ("forget, asked otherwise: MA ↓", "{:.2f}"),
    "same_extraction": ("keep, same template: extraction ↑", "{:.2f}"),
    "waiting_extraction": ("not yet asked: extraction ↑", "{:.2f}"),
    "retain_extraction": ("keep: extraction ↑", "{:.2f}"),
    "perplexity": ("perplexity over original", "{:+.1%}"),
    "share": ("neurons", "{:.2%}"),
    "seconds": ("s", "{:.0f}"),
    "peak_mib": ("peak, MiB", "{:.0f}"),
}
NAMES = {
    "random": "random neurons", "attribution": "one-shot attribution", "activation": "activation ratio",
    "fisher": "g²/F, silenced", "paper": "the paper's recipe", "neumuter, mute": "ours, mute",
    "neumuter, trained support": "ours, modulate, trained support",
    "neumuter, modulate": "**ours, modulate**", "ascent": "gradient ascent", "difference": "GradDiff",
    "npo": "NPO", "simnpo": "SimNPO", "before": "the original", "retrained": "retrained without them",
}  # fmt: skip

COLOURS = {
    "neumuter, mute": "#8b949e",
    "neumuter, trained support": "#e6a817",
    "neumuter, modulate": "#1f6feb",
}


def load():
    """{experiment: its rows}, and a digest of all."""
    paths = sorted(RESULTS.glob("*.jsonl"))
    found = {p.stem: read(p) for p in paths}
    inputs = [*paths, Path(__file__)]
    return found, hashlib.sha256(b"".join(p.read_bytes() for p in inputs)).hexdigest()[:16]


def write(check=False):
    """Writes the page; ``check``: only tells whether it is current, by the digest in its first line."""
    experiments, digest = load()
    first = f"<!-- made by `python -m bench.unlearning report` from results {digest}; do not edit -->"
    if check:
        current = PAGE.exists() and PAGE.read_text().startswith(first)
        print("docs/results.md is current" if current else "renew it: python -m bench.unlearning report")
        return int(not current)
    parts = [first, INTRODUCTION]
    sections = {"real": _real, "tdec": _tdec, "robust": _robust, "synth": _synth, "requests": _requests}
    for name, section in sections.items():
        if name in experiments:
            parts.append(section(experiments[name], experiments[name][0]["machine"]))
    replace(PAGE, "\n\n".join(parts) + "\n")
    print(f"wrote {PAGE}")
    return 0


INTRODUCTION = """# Does it forget?

Every figure is the mean over seeds, followed by the lowest and the highest where they differ; arrows say which
direction is good. *Extraction* is the share of texts that greedy decoding reproduces exactly, *in 100 samples* the
share expected to come back at least once in 100 samples at temperature 1, *MA* the share of tokens that are the most
likely one. Good is what the model *retrained without the texts* shows. Perplexity is that of held-out text on which no model here was
tuned. Seconds include all that a method does once it has the model and the batches, and ran beside other work on the
same machine: they tell orders of magnitude. Peak memory is what the process held beyond the loaded model; methods that
tune weights hold a float32 copy of it, as they would with a bfloat16 checkpoint. Their learning rates (REAL 2e-5,
SYNTH 1e-3) and numbers of steps (those of ours) were not tuned. Ours was chosen on other seeds of REAL and of the
first model of SYNTH; only its loss was chosen while looking at seed 0 of REAL, with twice as many people, and seed
11 of SYNTH. What suppresses a text does not prove that no trace of it is left.

Where ours falls short: **without anything to keep**, what resembles the forgotten texts is lost with them (REAL).
**Small models** (SYNTH) say another secret instead of none, so MA stays far above the retrained model's, and 5 % of
their neurons are needed; a few of what should stay is lost, as KL, a mean over tokens, hides damage to few of them.
There a trained support is better than the default. **Many requests** (MANY): sets found apart ruin the rest within
a few requests; found beside one another they keep it, but bring back part of what was forgotten before; one set
found anew for all who have asked brings back less and keeps more, but needs all their texts. **Learning half of the
answers again** brings back half or more of the others within ten steps (ROBUST): they are suppressed, not erased.

Rerun an experiment with `python -m bench.unlearning synth`, `real`, `tdec`, `robust` or `requests`, then make this
page with `python -m bench.unlearning report`. `python -m bench.unlearning paper` is for the paper's own models."""


def table(groups, columns):
    """A Markdown table: one line per (label, rows), a column per metric that some row has."""
    present = [c for c in columns if any(_value(row, c) is not None for _, rows in groups for row in rows)]
    lines = ["| | " + " | ".join(COLUMNS[c][0] for c in present) + " |", "|---|" + "---:|" * len(present)]
    for label, rows in groups:
        cells = [
            _cell([v for row in rows if (v := _value(row, c)) is not None], COLUMNS[c][1]) for c in present
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values, pattern):
    if not values:
        return ""
    extremes = (statistics.fmean(values), min(values), max(values))
    mean, low, high = (f"×{1 + x:.2g}" if x > 1 and "%" in pattern else pattern.format(x) for x in extremes)
    return mean if low == high else f"{mean} ({low} … {high})"


def _value(row, column):
    if column == "perplexity":
        return row["heldout_perplexity"] / row["original_perplexity"] - 1
    return row.get(column)


def _related(rows, keys):
    """The rows with the perplexity of the original model of the same ``keys`` beside their own."""
    original = {tuple(r[k] for k in keys): r["heldout_perplexity"] for r in rows if r["method"] == "before"}
    return [row | {"original_perplexity": original[tuple(row[k] for k in keys)]} for row in rows]


def _methods(rows):
    """(name, rows) of each method; fewer seeds than the others have are in the name."""
    order = ["before", "retrained", *(name for name in NAMES if name not in ("before", "retrained"))]
    seeds = len({row["seed"] for row in rows})
    found = [(m, [r for r in rows if r["method"] == m]) for m in order]
    return [
        (NAMES[m] + (f" ({len(some)} seed{'s' * (len(some) > 1)})" if len(some) < seeds else ""), some)
        for m, some in found
        if some
    ]


def _where(rows, **wanted):
    return [r for r in rows if all(r.get(k, v) == v for k, v in wanted.items())]


def _seeds(rows):
    seeds = sorted({r["seed"] for r in rows})
    return f"{len(seeds)} seed{'s' * (len(seeds) > 1)} ({', '.join(map(str, seeds))})"


def _on(machine):
    return machine["gpu"] or f"{machine['cpu']}, {machine['threads']} thread" + "s" * (machine["threads"] > 1)


def _real(rows, machine):
    rows = _related(rows, ("seed",))
    columns = [c for c in COLUMNS if c != "forget_sampled"]  # which the first rows do not have
    main = table(_methods(_where(rows, budget=0.01, neighbours="retain")), columns)
    ours = [r for r in rows if r["method"] == "neumuter, modulate"]
    budgets = [
        (f"{b:.1%} of the neurons", _where(ours, budget=b, neighbours="retain"))
        for b in sorted({r["budget"] for r in ours})
    ]
    budgets.append(("1.0%, without anything to keep", _where(ours, neighbours="own samples")))
    return f"""## REAL: SmolLM2-135M

A pretrained model (46,080 neurons, bfloat16) fine-tuned on questions about people who do not exist until greedy
decoding gives back the answers; half of the people are to be forgotten, the others to stay. {_seeds(rows)}, on
{_on(machine)}; a method with fewer says so. Neighbours of the mask methods, and what the weight methods retain: the
questions to keep, and 16 texts that the model made up. The paper's recipe has its own constants but 3 epochs instead
of 200: a truncated run.

{main}

Ours, modulate, with other budgets and other neighbours:

{table([(label, found) for label, found in budgets if found], columns)}"""


def _tdec(rows, machine):
    rows = _related(rows, ("seed",))
    return f"""## TDEC: source code learned by heart

The same model, fine-tuned on 16 texts of 128 tokens from the Training Data Extraction Challenge; 8 are to be
forgotten. Extraction starts from 32 tokens, MA and EL_10 are of whole texts. 4 texts of each kind per step, else
as above. {_seeds(rows)}, on {_on(machine)}.

{table(_methods(rows), COLUMNS)}"""


def _robust(rows, machine):
    states = {
        "int8": "rounded to 8 bits", "int4": "rounded to 4 bits, groups of 32", "half": "half of the answers",
        "relearned 10": "the same, 10 steps on the other half", "relearned 30": "30 steps",
        "relearned 100": "100 steps",
    }  # fmt: skip
    parts = []
    for method in dict.fromkeys(r["method"] for r in rows):
        of_method = _where(rows, method=method)
        groups = [(text, _where(of_method, state=state)) for state, text in states.items()]
        columns = [c for c in COLUMNS if c != "perplexity"]
        name = f"{NAMES[method].strip('*')}, {_seeds(of_method)}"
        parts.append(f"{name}:\n\n{table([g for g in groups if g[1]], columns)}")
    found = "\n\n".join(parts)
    return f"""## ROBUST: what comes back

REAL's models after they have forgotten, quantised by torchao, or trained (AdamW, 5e-5, 8 answers a step) on a random
half of the answers that they forgot and asked for the other half, all in float32. On {_on(machine)}.

{found}"""


def _synth(rows, machine):
    rows = _related(rows, ("model", "seed"))
    models = list(dict.fromkeys(r["model"] for r in rows))
    full = max(r["forget"] for r in rows)
    parts = [
        f"""## SYNTH: the demo's records

Small models learn made-up customers and catalogue items among ordinary text; 12 customers are to be forgotten.
Neighbours: the records to keep and 8 windows of text. MA is that of the secret tokens. On {_on(machine)}."""
    ]
    for model in models:
        found = _where(rows, model=model, budget=0.05, neighbours="retain", forget=full)
        parts.append(f"### {model}, 5 % of the neurons, {_seeds(found)}\n\n{table(_methods(found), COLUMNS)}")
    first = _where(rows, model=models[0], forget=full)
    curve = [r for r in _where(first, neighbours="retain") if r["method"].startswith("neumuter")]
    _draw(curve, PAGE.parent / "results-budgets.png")
    parts.append(
        f"### Budgets, {models[0]}\n\n![Extraction against the share of neurons](results-budgets.png)"
    )
    ours = _where(rows, model=models[0], method="neumuter, modulate")
    kinds = [
        (name, found)
        for name, kind in (
            ("the records to keep", "retain"), ("made-up records of the same kind", "made up"),
            ("the model's own samples", "own samples"),
        )
        if (found := _where(ours, neighbours=kind, budget=0.05, forget=full))
    ]  # fmt: skip
    parts.append(f"### What the neighbours are: ours, modulate, 5 %\n\n{table(kinds, COLUMNS)}")
    counts = [
        (f"{n} record{'s' * (n > 1)}", _where(ours, neighbours="retain", budget=0.02, forget=n))
        for n in sorted({r["forget"] for r in ours})
    ]
    parts.append(f"### How many are to be forgotten: the same, 2 %\n\n{table(counts, COLUMNS)}")
    return "\n\n".join(parts)


def _requests(rows, machine):
    rows = _related(rows, ("seed",))
    titles = {
        "beside": "Each set found beside the former ones, which its KL budget includes",
        "alone": "Each set found alone, on the untouched model",
        "anew": "After each request one set found anew for all who have asked, on the untouched model; it takes "
        "their texts, which must be kept for that",
    }
    parts = []
    for method, title in titles.items():
        found = _where(rows, method=method) + _where(rows, method="before")
        groups = [
            (f"{n} request{'s' * (n != 1)}", [r for r in found if r["requests"] == n and r["undone"] is None])
            for n in sorted({r["requests"] for r in found})
        ]
        groups.append(("ten, then the fifth undone", [r for r in found if r["undone"] is not None]))
        parts.append(f"{title}:\n\n{table([g for g in groups if g[1]], COLUMNS)}")
    found = "\n\n".join(parts)
    return f"""## MANY: one request after another

Ten customers of the demo's model ask one by one; each gets a mute set of {_share(rows)} of the neurons, and the
union is applied (a neuron in several sets gets the lower gain). {_seeds(rows)}, on {_on(machine)}.

{found}"""


def _share(rows):
    return "{:.1%}".format(min(r["share"] for r in rows if r["requests"] == 1))


def _draw(rows, path):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for method, colour in COLOURS.items():
        chosen = [r for r in rows if r["method"] == method]
        shares = sorted({r["budget"] for r in chosen})
        for axis, column in zip(axes, ("forget_extraction", "same_extraction"), strict=True):
            values = [[r[column] for r in chosen if r["budget"] == s] for s in shares]
            axis.plot([100 * s for s in shares], [statistics.fmean(v) for v in values], "o-", color=colour,
                      label=NAMES[method].strip("*"))  # fmt: skip
            axis.fill_between([100 * s for s in shares], [min(v) for v in values], [max(v) for v in values],
                              color=colour, alpha=0.15, linewidth=0)  # fmt: skip
            axis.set_xlabel("% of the neurons")
            axis.set_title({"forget_extraction": "extraction of what is forgotten",
                            "same_extraction": "of what stays, same template"}[column], fontsize=10)  # fmt: skip
            axis.set_ylim(-0.03, 1.03)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130)
    plt.close(figure)
    os.replace(temporary, path)
