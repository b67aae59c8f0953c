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


FIRST = [
    "import neumuter_kernels.{name}",
    "from neumuter_kernels.{name} import {name}",
    "import importlib; importlib.import_module('neumuter_kernels.{name}')",
    "from neumuter_kernels import selftest",
]
# One process imports torch, and each statement runs in a fork of it.
FORKS = """
import os, sys, torch
for statement in sys.argv[1:]:
    if not (pid := os.fork()):
        exec(statement, {})
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(pid, 0)
"""


def run(script, *arguments):
    """What a new Python prints."""
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cost(statement, before, limit):
    """(CPU seconds of a statement in a new process, the packages that it imports beside Python's own)."""
    fastest = float("inf")
    for _ in range(RUNS):
        seconds, packages = json.loads(run(SCRIPT.format(statement=statement, before=before)))
        fastest = min(fastest, seconds)
        if fastest < limit:
            break
    return fastest, set(packages)


def test_functions_are_not_replaced_by_the_modules_of_their_names():
    """Whatever is imported first: the package imports all its modules before it binds the functions."""
    names = ["select_muted", "hard_concrete"]
    told = "; import neumuter_kernels as nk; print(nk.{name})"
    cases = [(statement + told).format(name=name) for statement in FIRST for name in names]
    printed = run(FORKS, *cases).splitlines()
    assert [line.split(" at ")[0] for line in printed] == [f"<function {name}" for name in names] * len(FIRST)


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
    seconds, packages = cost(statement, before, limit)
    assert "neumuter" in {name.removesuffix("_kernels") for name in packages}
    assert forbidden.isdisjoint(packages)
    assert seconds < limit
