"""``python -m bench``: measures, prints and writes JSON; see the package's docstring."""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

import torch

from bench import machine, report
from bench.timing import FULL, QUICK, keep_freed_memory

# Each module has rows(device, effort, small), which yields one row of results after another.
MEASURED = ("kernels", "step", "select", "decode", "serve")


def main():
    options = parse()
    if options.benchmark == "readme":
        return report.readme(check=options.check)
    subs = (*MEASURED, "static") if options.benchmark == "all" else (options.benchmark,)
    failed = False
    for sub in subs:
        print(f"— {sub} —", flush=True)
        failed |= static(options.out) if sub == "static" else measured(sub, options.out, options.quick)
    return int(failed)


def parse():
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure, or renew the README.")
    parser.add_argument("benchmark", choices=(*MEASURED, "static", "all", "readme"))
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the JSON results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds: does it run at all?")
    parser.add_argument(
        "--check", action="store_true", help="with readme: only tell whether it is up to date"
    )
    options = parser.parse_args()
    if options.check and options.benchmark != "readme":
        parser.error("--check belongs to readme")
    if options.quick and options.out == report.RESULTS and options.benchmark in (*MEASURED, "all"):
        parser.error("--quick needs --out: its times are no results")
    return options


def measured(sub, folder, quick):
    """Runs one benchmark and writes its results; returns whether a contender was wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    header = machine.describe(device)
    print(report.machine_line(header))
    if report.is_busy(header):
        print(f"The load was {header['load']} before this began: wait until nothing else runs here.")
    keep_freed_memory()
    rows = []
    for row in importlib.import_module(f"bench.{sub}").rows(device, QUICK if quick else FULL[device], quick):
        print(report.row_text(row), flush=True)
        rows.append(row)
        path = write(folder, machine.slug(header), sub, header, rows)  # so far: it may be interrupted
    print(f"wrote {path}")
    return any("failed" in c for row in rows for c in row["contenders"])


def static(folder):
    """Compiles all kernels and writes the table; returns whether one breaks the rules."""
    from bench import static as module

    table = module.rows()
    module.print_table(table)
    broken = [v for row in table for v in module.violations(row)]
    print("\n".join(broken) or "No kernel breaks the rules.")
    print(f"wrote {write(folder, 'compiled', 'static', module.compilers(), table)}")
    return bool(broken)


def write(folder, name, sub, header, rows):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{sub}.json"
    report.replace(path, json.dumps({"benchmark": sub, "machine": header, "rows": rows}, indent=1) + "\n")
    return path


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # kernels are compiled here
    sys.exit(main())
