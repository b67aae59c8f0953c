"""The GPU kernels compile, spill nothing, access memory in vectors and keep to their budgets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(scope="module")
def table():
    """The rows of bench.static, from a process that does not interpret the kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.static"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def triton_rows(table):
    return [row for row in table if row["budget"]]


def test_every_kernel_compiles_for_every_target(triton_rows):
    targets = {}
    for row in triton_rows:
        if row["dtype"] != "fp64":
            targets.setdefault((row["kernel"], row["dtype"]), set()).add(row["target"])
    assert len(targets) > 30
    assert all(found == {"80", "90", "100", "gfx942"} for found in targets.values())


def test_nothing_spills(table):
    assert [row for row in table if row["spilled"]] == []


def test_accesses_to_activations_are_16_bytes_wide(triton_rows):
    """8 bytes (an AMD lane's share of a 16-bit tile) at least."""
    for row in triton_rows:
        logits = row["kernel"] in ("cross-entropy", "KL divergence") and row["target"] != "gfx942"
        if logits or row["kernel"].startswith(("forward", "backward")):
            narrow = row["target"] == "gfx942" and row["dtype"] in ("bf16", "fp16")
            assert row["widths"][0] >= (8 if narrow else 16), row


def test_traffic_is_exactly_the_budget(triton_rows):
    """Less would mean that accesses were not found, more that something moves twice."""
    for row in triton_rows:
        for moved, budget in zip(row["bytes"], row["budget"], strict=True):
            assert budget is None or moved == budget, row


def test_the_table_breaks_no_rule(table):
    assert [v for row in table for v in row["violations"]] == []


def test_rows_can_be_resident_at_all(table):
    assert all(0 < row["occupancy"] <= 1 for row in table)


def test_cuda_kernels_are_in_the_table_where_nvcc_is(table):
    from bench.static.cuda import nvcc

    names = {row["kernel"].split()[1] for row in table if row["kernel"].startswith("select_muted")}
    assert names == ({"prepare", "histogram", "count", "emit"} if nvcc() else set())
