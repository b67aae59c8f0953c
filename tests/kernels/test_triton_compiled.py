"""The GPU kernels compile, spill nothing, access memory in 16 bytes and keep to their budgets.

A few of them are compiled here. bench/results/compiled.jsonl has what ``python -m bench static`` found.
"""

import json
import os
import subprocess
import sys

import pytest

from bench import RESULTS, rows
from bench.tables import compiled

pytest.importorskip("triton", reason="triton is not installed")
ROOT = RESULTS.parents[1]


@pytest.fixture(scope="module")
def fresh():
    """What bench.static gives, from a process that does not interpret the kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.static"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def committed():
    return rows.read(RESULTS / "compiled.jsonl")


@pytest.fixture(params=["compiled here", "committed"])
def table(request, fresh, committed):
    return fresh["rows"] + fresh["cuda"] if request.param == "compiled here" else compiled(committed)


def about(row):
    return row["kernel"], row["dtype"], row["target"]


def test_the_committed_table_is_of_these_kernels(fresh, committed):
    """Where the compiler is the same one: run python -m bench static after a change of a kernel."""
    if fresh["compilers"]["triton"] != committed[0]["machine"]["triton"]:
        pytest.skip("another version of Triton")
    known = {about(row): row for row in compiled(committed)}
    assert [row for row in fresh["rows"] if row != known.get(about(row))] == []


def test_the_committed_table_is_whole(committed):
    """It has every variant that the public functions can reach."""
    from bench.static.cases import all_cases

    known = {about(row) for row in compiled(committed)}
    wanted = {(case.name, case.dtype, str(case.target.arch)) for case in all_cases()}
    assert len(wanted) > 3000
    assert wanted - known == set()


def test_the_table_breaks_no_rule(table):
    """No spill; the whole traffic in accesses of 16 bytes, no more and no less of it than the budget."""
    from bench.static.table import violations

    assert [v for row in table for v in violations(row)] == []


def test_budgets_are_held_where_they_were_set(fresh):
    """The bfloat16 backward takes at most 26 instructions and 2 operations of the XU per element."""
    held = [
        row for row in fresh["rows"] if row["kernel"].startswith("backward") and row["target"] != "gfx942"
    ]
    assert len(held) == 2 * (6 + 2)
    for row in held:
        assert row["instructions"] <= (26 if row["target"] != "100" else 28), row
        assert row["xu"] <= 2, row


def test_cases_are_all_that_the_public_functions_reach(fresh):
    """Activations × layouts × masks, and two tiles for each backward, on every target."""
    cases = [tuple(case) for case in fresh["cases"]]
    assert len(set(cases)) == len(cases)
    for target in ("80", "86", "89", "90", "100", "120", "gfx942"):
        for dtype in ("fp32", "bf16", "fp16"):
            names = [name for name, *rest in cases if rest == [dtype, target]]
            assert sum(name.startswith("forward") for name in names) == 6 * 3 * 3
            kept = [name for name in names if not name.endswith(("alone", "any F"))]
            assert sum(name.startswith("backward") for name in kept) == 6 * 3 * 2 * 2


def test_programs_can_be_resident_at_all(table):
    assert all(row["programs"] > 0 and 0 < row["occupancy"] <= 1 for row in table)


def test_cuda_kernels_are_in_the_table_where_nvcc_is(fresh):
    from bench.static.cuda import nvcc

    names = {row["kernel"].split()[1] for row in fresh["cuda"]}
    assert names == ({"prepare", "histogram", "count", "emit"} if nvcc() else set())
