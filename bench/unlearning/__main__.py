"""``python -m bench.unlearning``: runs an experiment and writes its rows.

An experiment is a list of cases: what a case is about, and how its metrics are found. A case whose row is in
the file already is not run again, so that a run that was stopped goes on.
"""

import argparse
import sys
from pathlib import Path

import torch

from bench import RESULTS as ALL_RESULTS
from bench import machine, rows
from bench.unlearning import (
    books,
    calibrated,
    capacity,
    hundreds,
    instead,
    judged,
    location,
    nothing_to_keep,
    paper,
    planted,
    real,
    relearned,
    requests,
    robust,
    rounded,
    slopes,
    synth,
    tdec,
    tried,
)

CASES = {
    "synth": lambda options: synth.cases(options.quick),
    "real": lambda options: real.cases(options.quick),
    "tdec": lambda options: tdec.cases(options.data, options.quick),
    "robust": lambda options: robust.cases(options.quick),
    "location": lambda options: location.cases(options.quick),
    "calibrated": lambda options: calibrated.cases(options.quick),
    "capacity": lambda options: capacity.cases(options.quick),
    "hundreds": lambda options: hundreds.cases(options.quick),
    "tried": lambda options: tried.cases(options.quick),
    "books": lambda options: books.cases(options.quick),
    "planted": lambda options: planted.cases(options.quick),
    "relearned": lambda options: relearned.cases(options.quick),
    "rounded": lambda options: rounded.cases(options.quick),
    "requests": lambda options: requests.cases(options.quick),
    "slopes": lambda options: slopes.cases(options.quick),
    "nothing_to_keep": lambda options: nothing_to_keep.cases(options.quick),
    "instead": lambda options: instead.cases(options.quick),
    "judged": lambda options: judged.cases(options.quick),
    "paper": paper.cases,
}
NEEDS = {"tdec": ("data",), "paper": ("model", "data")}  # options
RESULTS = ALL_RESULTS / "unlearning"
CODE = (
    "python/neumuter/recipes/*.py", "python/neumuter/training/*.py", "python/neumuter/unlearning.py",
    "python/neumuter/job.py", "python/neumuter/calibrating.py", "python/neumuter/evaluation/unseen.py",
    "python/neumuter/evaluation/made_up.py", "bench/unlearning/methods.py",
)  # fmt: skip


def main():
    options = parse()
    path = options.out / f"{options.experiment}.jsonl"
    if options.fresh:
        path.unlink(missing_ok=True)
    complete = True
    for row in run(CASES[options.experiment](options), path):
        complete &= row is not None
        if row:
            print(line(row), flush=True)
    print(f"{path} is {'complete' if complete else 'not complete: a case failed'}")
    if options.check:
        missed = synth.missed(rows.read(path))
        print("\n".join(missed) or "SYNTH meets all its bars")
        return int(bool(missed))
    return int(not complete)


def run(cases, path):
    """Yields the row of every case that is not in the file yet, once it is written there."""
    record = machine.describe("cuda" if torch.cuda.is_available() else "cpu", CODE)
    for row in rows.read(path):
        if differ := rows.differences(row["machine"], record):
            raise ValueError(
                f"{path} was measured with other {', '.join(differ)}: choose another --out, or --fresh"
            )
    yield from rows.measure(cases, path, record)


def line(row):
    shown = {k: v for k, v in row.items() if k != "machine"}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())


def parse():
    parser = argparse.ArgumentParser(prog="python -m bench.unlearning", description=__doc__)
    parser.add_argument("experiment", choices=CASES)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--model", help="with paper: the model, a folder or a name on the Hub")
    parser.add_argument("--retrained", help="with paper: that model trained without the forget texts")
    parser.add_argument("--tasks", help="with paper: tasks of lm-evaluation-harness, separated by commas")
    parser.add_argument("--rewrite-with", help="with paper: a masked language model, bert-base-uncased there")
    parser.add_argument("--data", type=Path, help="with tdec and paper: the folder of the texts")
    parser.add_argument("--quick", action="store_true", help="one seed, few methods")
    parser.add_argument("--fresh", action="store_true", help="start over instead of going on")
    parser.add_argument("--check", action="store_true", help="with synth: hold the rows to their bars")
    options = parser.parse_args()
    if options.quick and options.out == RESULTS:
        parser.error("--quick needs --out: its rows are no results")
    for name in NEEDS.get(options.experiment, ()):
        if getattr(options, name) is None:
            parser.error(f"{options.experiment} needs --{name}")
    if options.check and options.experiment != "synth":
        parser.error("--check belongs to synth")
    return options


if __name__ == "__main__":
    sys.exit(main())
