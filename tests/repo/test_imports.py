"""Importing the packages costs little: no module that is not needed, and no time to speak of."""

import json
import subprocess
import sys

import pytest

RUNS = 3  # the fastest counts: other processes can only make it slower
HEAVY = {"triton", "transformers", "numpy", "matplotlib"}

SCRIPT = """
import contextlib, io, json, sys, time
{before}
known, start = set(sys.modules), time.process_time()
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    {statement}
seconds = time.process_time() - start
roots = {{name.split(".")[0] for name in set(sys.modules) - known}}
print(json.dumps([seconds, sorted(roots - sys.stdlib_module_names)]))
"""


def cost(statement, before):
    """(CPU seconds of a statement in a new process, the packages that it imports beside Python's own)."""
    script, found = SCRIPT.format(statement=statement, before=before), []
    for _ in range(RUNS):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    return min(seconds for seconds, _ in found), set(found[0][1])


@pytest.mark.parametrize("name", ["select_muted", "hard_concrete"])
@pytest.mark.parametrize(
    "statement",
    [
        "import neumuter_kernels.{name}",
        "from neumuter_kernels.{name} import {name}",
        "import importlib; importlib.import_module('neumuter_kernels.{name}')",
        "from neumuter_kernels import selftest",
    ],
)
def test_functions_are_not_replaced_by_the_modules_of_their_names(name, statement):
    """Whatever is imported first: the package imports all its modules before it binds the functions."""
    script = f"{statement.format(name=name)}; import neumuter_kernels as nk; print(type(nk.{name}).__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "function\n"


@pytest.mark.parametrize(
    ("statement", "before", "forbidden", "limit"),
    [
        ("import neumuter_kernels", "import torch", HEAVY | {"neumuter"}, 0.3),
        ("import neumuter", "", HEAVY | {"torch", "neumuter_kernels", "rich"}, 0.1),
        (
            "from neumuter.cli.app import main; main(['--help'])",
            "",
            HEAVY | {"torch", "neumuter_kernels"},
            1.0,
        ),
    ],
)
def test_importing_is_cheap(statement, before, forbidden, limit):
    seconds, packages = cost(statement, before)
    assert "neumuter" in {name.removesuffix("_kernels") for name in packages}
    assert forbidden.isdisjoint(packages)
    assert seconds < limit
