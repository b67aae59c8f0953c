"""The Triton kernels compile for NVIDIA and AMD GPUs, spill nothing and access memory in vectors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(scope="module")
def kernels():
    import os

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_ahead_of_time.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_target_compiles(kernels):
    assert {k["target"] for k in kernels} == {"80", "90", "100", "gfx942"}


def test_nothing_spills(kernels):
    assert [k for k in kernels if k["spilled"]] == []


def test_accesses_to_activations_are_16_bytes_wide(kernels):
    """8 bytes (the indices of the ragged backward, an AMD lane's share of a bf16 tile) at least."""
    for k in kernels:
        if k["kernel"].startswith(("forward", "backward")) and k["dtype"] != "fp64":
            assert max(k["widths"]) == 16, k
            assert min(k["widths"]) >= (8 if "row ids" in k["kernel"] or k["target"] == "gfx942" else 16), k
