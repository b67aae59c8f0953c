"""``python -m bench.unlearning``: runs an experiment and writes its rows, or makes the page of results.

An experiment is a list of cases: what a case is about, and how its metrics are found. A case whose row is in
the file already is not run again, so that a run that was stopped goes on.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch

from bench import machine
from bench.report import replace
from bench.unlearning import page, paper, real, requests, robust, synth, tdec

CASES = {
    "synth": lambda options: synth.cases(options.quick),
    "real": lambda options: real.cases(options.quick),
    "tdec": lambda options: tdec.cases(options.data, options.quick),
    "robust": lambda options: robust.cases(options.quick),
    "requests": lambda options: requests.cases(options.quick),
    "paper": paper.cases,
}
NEEDS = {"tdec": ("data",), "paper": ("model", "data")}  # options
SAME = ("gpu", "cpu", "threads", "code")  # in all rows of a file
CODE = ("python/neumuter/recipes/*.py", "python/neumuter/losses.py", "bench/unlearning/methods.py")


def main():
    options = parse()
    if options.experiment == "report":
        return page.write(check=options.check)
    path = options.out / f"{options.experiment}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    for row in run(CASES[options.experiment](options), path, options.fresh):
        print(line(row), flush=True)
    print(f"{path} is complete")
    return 0


def run(cases, path, fresh=False):
    """Yields the row of every case that is not in the file yet, once it is written there."""
    header = machine.describe("cuda" if torch.cuda.is_available() else "cpu") | {"code": digest()}
    known = json.loads(path.read_text()) if path.exists() and not fresh else {"rows": [], "machine": header}
    differ = [name for name in SAME if known["machine"].get(name) != header[name]]
    if known["rows"] and differ:
        raise ValueError(
            f"{path} was measured with other {', '.join(differ)}: choose another --out, or --fresh"
        )
    rows = known["rows"]
    for about, find in cases:
        if not any(about.items() <= row.items() for row in rows):
            rows.append(about | find())
            replace(path, json.dumps({"machine": header, "rows": rows}, indent=1) + "\n")
            yield rows[-1]


def digest():
    """Of what the methods do: rows of different code do not belong in one table."""
    paths = sorted(path for pattern in CODE for path in page.ROOT.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def line(row):
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())


def parse():
    parser = argparse.ArgumentParser(prog="python -m bench.unlearning", description=__doc__)
    parser.add_argument("experiment", choices=(*CASES, "report"))
    parser.add_argument("--out", type=Path, default=page.RESULTS, help="folder of the JSON results")
    parser.add_argument("--model", help="with paper: the model, a folder or a name on the Hub")
    parser.add_argument("--retrained", help="with paper: that model trained without the forget texts")
    parser.add_argument("--tasks", help="with paper: tasks of lm-evaluation-harness, separated by commas")
    parser.add_argument("--rewrite-with", help="with paper: a masked language model, bert-base-uncased there")
    parser.add_argument("--data", type=Path, help="with tdec and paper: the folder of the texts")
    parser.add_argument("--quick", action="store_true", help="one seed, few methods")
    parser.add_argument("--fresh", action="store_true", help="start over instead of going on")
    parser.add_argument("--check", action="store_true", help="with report: only tell whether it is current")
    options = parser.parse_args()
    if options.quick and options.out == page.RESULTS:
        parser.error("--quick needs --out: its rows are no results")
    for name in NEEDS.get(options.experiment, ()):
        if getattr(options, name) is None:
            parser.error(f"{options.experiment} needs --{name}")
    if options.check and options.experiment != "report":
        parser.error("--check belongs to report")
    return options


if __name__ == "__main__":
    sys.exit(main())
