"""The tables of docs/results.md: one function for each placeholder of its template.

Each takes the rows of an experiment and the rest of the placeholder, and returns Markdown.
"""

from collections import Counter

from bench import text
from bench.unlearning.cells import COLUMNS, NAMES, by_method, by_share, cell, name_of, relate, table, where

STATES = {
    "int8": "rounded to 8 bits", "int4": "rounded to 4 bits, groups of 32", "half": "half of the answers",
    "relearned 10": "the same, 10 steps on the other half", "relearned 30": "30 steps",
    "relearned 100": "100 steps",
}  # fmt: skip
FORMATS = {
    "none": "as they are", "int8": "8 bits per channel", "q8_0": "GGUF Q8_0",
    "int4": "4 bits, groups of 32", "nf4": "NF4, groups of 64", "q4_0": "GGUF Q4_0",
}  # fmt: skip
KINDS = {
    "retain": "the records to keep", "made up": "made-up records of the same kind",
    "own samples": "the model's own samples",
}  # fmt: skip


def seeds(rows, _=None):
    """As in "3 seeds (0, 1, 2)"."""
    found = sorted({r["seed"] for r in rows})
    return f"{len(found)} seed{'s' * (len(found) > 1)} ({', '.join(map(str, found))})"


def machine(rows, _):
    """What the rows were measured on."""
    found = rows[0]["machine"]
    return f"{text.where(found)}, {found['date']}"


def methods(rows, _):
    """All methods of TDEC."""
    return table(by_method(relate(rows, ("seed",))), COLUMNS)


def people(rows, _):
    """All methods of REAL with 1 % of the neurons."""
    chosen = where(relate(rows, ("seed",)), budget=0.01, neighbours="retain")
    return table(by_method(chosen), _people_columns(chosen))


def people_budgets(rows, _):
    """Our default on REAL with other budgets and other neighbours."""
    ours = where(relate(rows, ("seed",)), method="neumuter, modulate")
    shares = sorted({r["budget"] for r in ours})
    if len(shares) < 2:
        return None
    budgets = [(f"{b:.1%} of the neurons", where(ours, budget=b, neighbours="retain")) for b in shares]
    budgets.append(("1.0%, without anything to keep", where(ours, neighbours="own samples")))
    return table(budgets, _people_columns(rows))


def _people_columns(rows):
    """All but what LOCATION shows, and samples where the first rows do not have them."""
    sampled = all("forget_sampled" in row for row in rows)
    return [c for c in COLUMNS if c != "outside" and (sampled or c != "forget_sampled")]


def robustness(rows, method):
    """What comes back after each change of a model that ``method`` made."""
    of_method = where(rows, method=method)
    groups = [(label, where(of_method, state=state)) for state, label in STATES.items()]
    return table(groups, [c for c in COLUMNS if c != "perplexity"])


def robustness_seeds(rows, method):
    return seeds(where(rows, method=method))


def models(rows, _):
    """All methods on each of SYNTH's models, under a heading for each."""
    parts = []
    for model in _models(rows):
        chosen = where(_synth(rows), model=model, budget=0.05, neighbours="retain", forget=_full(rows))
        parts.append(
            f"### {model}, 5 % of the neurons, {seeds(chosen)}\n\n{table(by_method(chosen), COLUMNS)}"
        )
    return "\n\n".join(parts)


def first_model(rows, _):
    return _models(rows)[0]


def kinds(rows, _):
    """Our default on SYNTH's first model by what the neighbours are."""
    ours = where(_synth(rows), model=_models(rows)[0], method="neumuter, modulate", budget=0.05,
                  forget=_full(rows))  # fmt: skip
    return table([(label, where(ours, neighbours=kind)) for kind, label in KINDS.items()], COLUMNS)


def counts(rows, _):
    """Our default on SYNTH's first model by how many records are to be forgotten."""
    ours = where(_synth(rows), model=_models(rows)[0], method="neumuter, modulate", neighbours="retain")
    groups = [
        (f"{n} record{'s' * (n > 1)}", where(ours, budget=0.02, forget=n))
        for n in sorted({r["forget"] for r in ours})
    ]
    return table(groups, COLUMNS)


def _models(rows):
    return list(dict.fromkeys(r["model"] for r in rows))


def _full(rows):
    return max(r["forget"] for r in rows)


def _synth(rows):
    return relate(rows, ("model", "seed"))


def location(rows, model):
    """Each way to choose neurons."""
    rows = where(relate(rows, ("model", "seed")), model=model)
    columns = [c for c in COLUMNS if c not in ("worded_ma", "worded_loss", "seconds", "peak_mib")]
    return table(by_method(rows), columns) if rows else None


def calibrated(rows, model):
    """With the estimate and without, beside the original and the retrained model."""
    rows = where(relate(rows, ("model", "seed")), model=model)
    columns = ["agree", *(c for c in COLUMNS if c not in ("agree", "forget_ma", "steps"))]
    order = (
        "before", "retrained", "estimate", "base", "both", "plain", "calibrated", "longer", "fewer",
        "distribution",
    )  # fmt: skip
    return table(by_method(rows, order), columns) if rows else None


def model_seeds(rows, model):
    return seeds(where(rows, model=model)) if where(rows, model=model) else None


def capacity(rows, count):
    """What each share of the neurons can hold, beside the methods that tune weights."""
    chosen = relate(where(rows, forget=int(count)), ("seed",))
    return table(by_share(chosen), COLUMNS) if chosen else None


def tried(rows, _):
    """Other ways to fit gains to many texts, with the loss that they end at."""
    names = {
        "before": NAMES["before"], "neumuter, modulate": "our default, 480 steps",
        "fewer": "60 steps, with three times the rate", "faster": "480 steps, with three times the rate",
        "shorter": "240 steps", "longer": "960 steps", "by text": "candidates chosen for each text",
        "groups": "four groups, one after the other", "search": "our default, then 20 steps of line search",
        "search, lower": "the same with harm weighing less",
        "programmes": "our default, then 15 quadratic programmes",
    }  # fmt: skip
    related = relate(rows, ("seed",))
    return table([(label, where(related, method=name)) for name, label in names.items()], COLUMNS)


def books(rows, model):
    """Each method at each size of a request, under a heading for each size."""
    rows = [row for row in where(rows, model=model) if "passages" in row]
    parts = []
    for size in sorted({row["passages"] for row in rows}):
        chosen = relate(where(rows, passages=size), ("seed",))
        parts.append(f"### {model}, {size} passages\n\n{table(by_share(chosen), COLUMNS)}")
    return "\n\n".join(parts) or None


def book_requests(rows, model):
    """Each method after each of several requests."""
    rows = where(rows, model=model)
    asked = [row for row in relate(rows, ("seed",)) if "requests" in row]
    groups = [
        (f"{label}, after {count}", where(some, requests=count))
        for label, some in by_method(asked)
        for count in sorted({row["requests"] for row in some})
    ]
    return table(groups, COLUMNS) if groups else None


def judged(rows, model):
    """What comes out of each model, and what the verdict says with each kind of controls."""
    rows = where(rows, model=model)
    lines, measured = [], ("forget_extraction", "forget_sampled", "others")
    for label, some in by_method(rows):
        for share in sorted({row.get("budget") or 0 for row in some}):
            chosen = [row for row in some if (row.get("budget") or 0) == share]
            cells = [cell([row[c] for row in chosen], COLUMNS[c][1]) for c in measured]
            for kind in ("made", "unseen"):
                cells += [
                    cell([row[f"{kind} {c}"] for row in chosen], "{:.2f}") for c in ("others", "auc_loss")
                ]
                cells.append(_count_kinds([row[f"{kind} verdict"] for row in chosen]))
            lines.append([label + (f", {share:.0%}" if share else ""), *cells])
    of_controls = [
        f"{kind}: {what}" for kind in ("made controls", "unseen texts")
        for what in ("another's text", "AUC of the loss", "verdict")
    ]  # fmt: skip
    return (
        text.table(["", *(COLUMNS[c][0] for c in measured), *of_controls], lines, "---:") if lines else None
    )


def _count_kinds(said):
    """Verdicts on several seeds; how many, if they differ."""
    kinds = Counter(said)
    return ", ".join(kind if len(kinds) == 1 else f"{kind} ({n})" for kind, n in kinds.most_common())


def planted(rows, _):
    """What each method finds of the planted neurons."""
    return table(by_method(relate(rows, ("seed",))), COLUMNS)


def rounded(rows, model):
    """Each method in each format, beside the original in the same format."""
    lines, rows = [], where(rows, model=model)
    for method in ("before", "retrained", "calibrated", "live", "fitted", "npo", "simnpo", "difference"):
        label = name_of(method, where(rows, method=method), rows)
        for name in FORMATS:
            found = where(rows, method=method, format=name)
            originals = {row["seed"]: row for row in where(rows, method="before", format=name)}
            pairs = [(row, originals[row["seed"]]) for row in found]
            cells = (
                cell([row["forget_extraction"] for row in found], "{:.2f}"),
                cell([row["forget_secrets"] for row in found], "{:.2f}"),
                cell(_complete(found, "others"), "{:.2f}"),
                cell([row["retain_extraction"] / o["retain_extraction"] for row, o in pairs], "{:.2f}"),
                cell(_complete(found, "retain_least"), "{:.1f}"),
                cell(
                    [row["heldout_perplexity"] / o["heldout_perplexity"] - 1 for row, o in pairs], "{:+.1%}"
                ),
            )
            if found:
                lines.append([label, FORMATS[name], *cells])
                label = ""
    head = [
        "",
        "weights",
        "forget: extraction ↓",
        "forget: secrets ↓",
        "forget: another's text ↓",
        "keep, over the original's in this format ↑",
        "keep: log-odds of the least likely token",
        "perplexity over the original's in this format",
    ]
    return text.table(head, lines, "---:") if lines else None


def _complete(rows, column):
    """The values of a column that was added later; none unless all rows have it."""
    return [row[column] for row in rows] if all(column in row for row in rows) else []


def relearned(rows, _):
    """What each method leaves of a half of the records, and what comes back of it."""
    names = {
        "before": NAMES["before"], "retrained": NAMES["retrained"],
        "neumuter, modulate": NAMES["neumuter, modulate"], "gains 0 to 1": "gains from 0 to 1",
        "first layer": "the first layer alone", "more steps": "100 steps",
        "in the loop": "100 steps, relearning in the loop",
        "sharp gains": "100 steps, sharpness-aware in gains",
        "sharp weights": "100 steps, sharpness-aware in weights",
        "wide margin": "100 steps, wide margin", "more neurons": "100 steps, 30 % of the neurons",
        "deep": "deep: both of these", "deep, gains 0 to 1": "deep, gains from 0 to 1",
        "deep, in the loop": "deep, relearning in the loop",
        "deep, sharp weights": "deep, sharpness-aware in weights", "npo": NAMES["npo"],
        "npo, gentle": "NPO, gentle", "simnpo": NAMES["simnpo"], "simnpo, gentle": "SimNPO, gentle",
    }  # fmt: skip
    columns = [c for c in COLUMNS if c.startswith(("half", "relearned"))]
    rows = relate(rows, ("seed",))
    groups = [(label, where(rows, method=method)) for method, label in names.items()]
    return table(groups, [*columns, "others", "same_extraction", "retain_extraction", "perplexity"])


def requests(rows, method):
    """MANY, with sets found by ``method``."""
    rows = relate(rows, ("seed",))
    chosen = where(rows, method=method) + where(rows, method="before")
    groups = [
        (f"{n} request{'s' * (n != 1)}", [r for r in chosen if r["requests"] == n and r["undone"] is None])
        for n in sorted({r["requests"] for r in chosen})
    ]
    groups.append(("ten, then the fifth undone", [r for r in chosen if r["undone"] is not None]))
    return table(groups, COLUMNS)


def requests_seeds(rows, method):
    return seeds(where(rows, method=method))


def many(rows, _):
    """SLOPES: requests held down by slopes."""
    chosen = where(rows, what="many")
    if not any(row["requests"] for row in chosen):
        return None
    original = {r["seed"]: r["heldout_perplexity"] for r in chosen if not r["requests"]}
    chosen = [row | {"original_perplexity": original[row["seed"]]} for row in chosen]
    numbers = sorted({row["requests"] for row in chosen})
    return table([(f"{n} requests", where(chosen, requests=n)) for n in numbers], COLUMNS)


def stand_ins(rows, _):
    """NOTHING TO KEEP: what stands in for texts to keep."""
    names = {
        "own samples": KINDS["own samples"], "made up": "answers to made-up names, and samples",
        "retain": "for comparison: the records to keep",
    }  # fmt: skip
    order, groups = [*names], {}
    found = [row for row in relate(rows, ("seed",)) if row["method"] != "before"]
    for row in sorted(found, key=lambda r: (order.index(r["neighbours"]), r["kl_target"], r["budget"])):
        label = f"{names[row['neighbours']]}, {row['budget']:.0%}, KL {row['kl_target']}"
        groups.setdefault(label, []).append(row)
    return table(list(groups.items()), COLUMNS)


def instead(rows, _):
    """INSTEAD: the plain way and the other one by budget."""
    groups = {}
    for row in relate(rows, ("seed", "refuses")):
        if row["method"] != "before":
            label = f"{row['method']}, {row['budget']:.0%}, KL {row['kl_target']}"
            label += "" if row["refuses"] else ", a model that never learned this answer"
            groups.setdefault(label, []).append(row)
    return table(list(groups.items()), COLUMNS)


def given_away(rows, _):
    """SLOPES: how much of the texts was read from files of slopes."""
    found = where(rows, what="read")
    lines = [
        [label, f"{sum(row[name] for row in found):.0f} of {len(found)}"]
        for name, label in (
            ("guessed", "both secrets are the most alike among 100 random pairs"),
            ("read", "the phone number is read off digit by digit, given the mail"),
        )
    ]
    return text.table(["what was tried", "texts"], lines, "---:")


def share(rows, _):
    """Of the neurons, in each set of MANY."""
    return "{:.1%}".format(min(r["share"] for r in rows if r["requests"] == 1))


PARTS = {
    function.__name__: function
    for function in (
        seeds, machine, methods, people, people_budgets, robustness, robustness_seeds, models, first_model,
        kinds, counts, location, calibrated, model_seeds, capacity, tried, books, book_requests, judged,
        planted, rounded, relearned, requests, requests_seeds, share, many, given_away, stand_ins, instead,
    )
}  # fmt: skip
