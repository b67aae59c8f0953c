"""``python -m bench``: measures, prints and writes rows of results; see the package's docstring."""

import argparse
import importlib
import os
import sys
from pathlib import Path

import torch

from bench import RESULTS, rows, unbuilt

# Of each benchmark: the module with its cases(device, effort, small), and whether it runs whole models.
BENCHMARKS = {
    "check": ("bench.kernels.check", False),
    "kernels": ("bench.kernels.activations", False),
    "losses": ("bench.kernels.token_losses", False),
    "step": ("bench.models.step", True),
    "decode": ("bench.kernels.decode", False),
    "serve": ("bench.models.serve", True),
    "launch": ("bench.kernels.launch", False),
    "select": ("bench.kernels.select", False),
    "scale": ("bench.models.scale", True),
}


def main():
    options = parse()
    if options.benchmark == "report":
        from bench import report

        return report.main(check=options.check)
    if not unbuilt.is_built() and torch.cuda.is_available():
        print("The extension is not built: only what Triton computes is measured.")
        unbuilt.define()
    names = (*BENCHMARKS, "static") if options.benchmark == "all" else (options.benchmark,)
    failed = False
    for name in names:
        print(f"— {name} —", flush=True)
        apart = {"static": static, "plans": plans}.get(name)
        failed |= apart(options) if apart else measured(name, options)
    return int(failed)


def parse():
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure, or make the pages of results."
    )
    parser.add_argument("benchmark", choices=(*BENCHMARKS, "static", "plans", "all", "report"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds: does it run at all?")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the results already")
    parser.add_argument(
        "--check", action="store_true", help="with report: only tell whether it is up to date"
    )
    options = parser.parse_args()
    if options.quick and options.out == RESULTS:
        parser.error("--quick needs --out: its times are no results")
    return options


def measured(name, options):
    """Runs one benchmark, each row into the file of this machine; returns whether something was wrong."""
    from bench import machine, text
    from bench.timing import FULL, QUICK, keep_freed_memory

    if options.quick:
        torch.set_num_threads(1)  # tiny tensors need no more, which would wait for one another
    module, whole_models = BENCHMARKS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = machine.describe(device, machine.LIBRARY if whole_models else machine.KERNELS)
    print(text.machine_line(record))
    if text.is_busy(record):
        print(f"The load was {record['load']} before this began: wait until nothing else runs here.")
    keep_freed_memory()
    effort = QUICK if options.quick else FULL[device]
    cases = importlib.import_module(module).cases(device, effort, options.quick)
    cases = (({"benchmark": name} | about, find) for about, find in cases)
    path = options.out / f"{machine.slug(record)}.jsonl"
    failed = False
    for row in rows.measure(cases, path, record, options.fresh):
        failed |= row is None or rows.is_wrong(row)
        if row:
            print(text.row_text(row), flush=True)
    print(f"{path} has all that was measured")
    return failed


def plans(options):
    """Holds the plans of large models to traces of them; returns whether one failed."""
    from bench import text
    from bench.models import plans

    cases = ((about | {"benchmark": "plans"}, find) for about, find in plans.cases())
    failed = False
    for row in rows.measure(cases, options.out / "plans.jsonl", plans.describe(), options.fresh):
        failed |= row is None
        if row:
            print(text.row_text(row), flush=True)
    return failed


def static(options):
    """Compiles all kernels and writes the table; returns whether one breaks the rules."""
    from bench.static import table

    found = table.rows()
    table.print_table(found)
    broken = [v for row in found for v in table.violations(row)]
    print("\n".join(broken) or "No kernel breaks the rules.")
    compilers = table.compilers()
    named = [{"benchmark": "static"} | row | {"machine": compilers} for row in table.by_kernel(found)]
    rows.write(options.out / "compiled.jsonl", named)
    return bool(broken)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # kernels are compiled here
    sys.exit(main())
