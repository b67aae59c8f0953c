"""``python -m bench``: measures, prints and writes rows of results; see the package's docstring."""

import argparse
import importlib
import os
import sys
from pathlib import Path

import torch

from bench import unbuilt

# Of each benchmark: the module with its cases(device, effort, small), and whether it runs whole models.
BENCHMARKS = {
    "check": ("bench.check", False),
    "kernels": ("bench.kernels", False),
    "losses": ("bench.token_losses", False),
    "step": ("bench.step", True),
    "decode": ("bench.decode", False),
    "serve": ("bench.serve", True),
    "launch": ("bench.launch", False),
    "select": ("bench.select", False),
}


def main():
    os.environ.pop("TRITON_INTERPRET", None)  # kernels are compiled here
    options = parse()
    if not unbuilt.is_built() and torch.cuda.is_available():
        print("The extension is not built: only what Triton computes is measured.")
        unbuilt.define()
    from bench import report

    if options.benchmark == "readme":
        return report.readme(check=options.check)
    if options.quick and options.out == report.RESULTS:
        sys.exit("--quick needs --out: its times are no results")
    names = (*BENCHMARKS, "static") if options.benchmark == "all" else (options.benchmark,)
    failed = False
    for name in names:
        print(f"— {name} —", flush=True)
        failed |= static(options.out) if name == "static" else measured(name, options)
    return int(failed)


def parse():
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure, or renew the README.")
    parser.add_argument("benchmark", choices=(*BENCHMARKS, "static", "all", "readme"))
    parser.add_argument(
        "--out", type=Path, default=unbuilt.ROOT / "bench/results", help="folder of the results"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds: does it run at all?")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the results already")
    parser.add_argument(
        "--check", action="store_true", help="with readme: only tell whether it is up to date"
    )
    return parser.parse_args()


def measured(name, options):
    """Runs one benchmark, each row into the file of this machine; returns whether something was wrong."""
    from bench import machine, report, rows
    from bench.timing import FULL, QUICK, keep_freed_memory

    module, whole_models = BENCHMARKS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = machine.describe(device, machine.LIBRARY if whole_models else machine.KERNELS)
    print(report.machine_line(record))
    if report.is_busy(record):
        print(f"The load was {record['load']} before this began: wait until nothing else runs here.")
    keep_freed_memory()
    effort = QUICK if options.quick else FULL[device]
    cases = importlib.import_module(module).cases(device, effort, options.quick)
    cases = (({"benchmark": name} | about, find) for about, find in cases)
    path = options.out / f"{machine.slug(record)}.jsonl"
    failed = False
    for row in rows.measure(cases, path, record, options.fresh):
        failed |= row is None or is_wrong(row)
        if row:
            print(report.row_text(row), flush=True)
    print(f"{path} has all that was measured")
    return failed


def is_wrong(row):
    return bool(row.get("error")) or any("failed" in c for c in row.get("contenders", ()))


def static(folder):
    """Compiles all kernels and writes the table; returns whether one breaks the rules."""
    from bench import rows
    from bench import static as module

    table = module.rows()
    module.print_table(table)
    broken = [v for row in table for v in module.violations(row)]
    print("\n".join(broken) or "No kernel breaks the rules.")
    compilers = module.compilers()
    found = [{"benchmark": "static"} | row | {"machine": compilers} for row in table]
    rows.write(folder / "compiled.jsonl", found)
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
