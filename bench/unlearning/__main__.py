"""``python -m bench.unlearning``: runs an experiment and writes its rows, or makes the page of results."""

import argparse
import json
import sys
from pathlib import Path

import torch

from bench import machine
from bench.report import replace
from bench.unlearning import page, real, requests, synth

RUNS = {"synth": synth.rows, "real": real.rows, "requests": requests.rows}


def main():
    options = parse()
    if options.experiment == "report":
        return page.write(check=options.check)
    rows = []
    header = machine.describe("cuda" if torch.cuda.is_available() else "cpu")
    path = options.out / f"{options.experiment}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    for row in RUNS[options.experiment](options.quick):
        rows.append(row)
        print(line(row), flush=True)
        found = {"experiment": options.experiment, "machine": header, "rows": rows}
        replace(path, json.dumps(found, indent=1) + "\n")  # what was measured stays, wherever it stops
    print(f"wrote {path}")
    return 0


def line(row):
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())


def parse():
    parser = argparse.ArgumentParser(prog="python -m bench.unlearning", description=__doc__)
    parser.add_argument("experiment", choices=(*RUNS, "report"))
    parser.add_argument("--out", type=Path, default=page.RESULTS, help="folder of the JSON results")
    parser.add_argument("--quick", action="store_true", help="one seed, few methods")
    parser.add_argument("--check", action="store_true", help="with report: only tell whether it is current")
    options = parser.parse_args()
    if options.quick and options.out == page.RESULTS:
        parser.error("--quick needs --out: its rows are no results")
    if options.check and options.experiment != "report":
        parser.error("--check belongs to report")
    return options


if __name__ == "__main__":
    sys.exit(main())
