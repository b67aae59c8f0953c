"""Every op against its reference: the self-test of neumuter_kernels, one row for each op.

``python -m bench.kernels.check`` runs it without results, for compute-sanitizer.
"""

import functools
import sys

import torch

from bench import unbuilt


def cases(device, effort, small=False):
    """Yields (what a row is about, how it is found)."""
    from neumuter_kernels import selftest

    # The self-test runs once, when the first row is asked for.
    errors = functools.cache(lambda: {result.op: result.error for result in selftest.run(device)})
    for op in selftest.CHECKS:
        if not unbuilt.is_built() and op in unbuilt.LEFT_OUT:
            print(f"{op} is left out: the extension is not built.")
            continue

        def find(op=op):
            return {"error": errors()[op]}

        yield {"op": op, "pass": "against the reference"}, find


def main():
    if not unbuilt.is_built():
        unbuilt.define()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    errors = {about["op"]: find()["error"] for about, find in cases(device, None)}
    print("\n".join(f"{op:16} {error or 'right'}" for op, error in errors.items()))
    return int(any(errors.values()))


if __name__ == "__main__":
    sys.exit(main())
