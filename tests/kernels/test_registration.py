"""One list of ops: torch has registered these, reports name them, and the self-test tests them."""

import importlib.metadata
import subprocess
import sys

import pytest
import torch

import neumuter_kernels as nk
from neumuter_kernels import selftest
from neumuter_kernels.info import backends
from neumuter_kernels.registration import OPS

# Those that begin with an underscore are parts of others: csrc/launch calls them.
REGISTERED = {
    name.removeprefix("neumuter::").partition(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("neumuter::") and not name.startswith("neumuter::_")
}


def test_every_op_with_a_schema_is_listed():
    assert set(OPS) == REGISTERED
    assert {"masked_ffn", "masked_ffn_backward", "mute_"} <= REGISTERED


def test_every_op_is_reported_and_tested():
    forward = {op for op in REGISTERED if not op.endswith("_backward")}
    assert set(backends()) == set(selftest.CHECKS) == forward


@pytest.mark.parametrize("op", sorted(REGISTERED))
@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta"])
def test_every_op_has_code_for_every_device(op, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"neumuter::{op}", key)


@pytest.mark.parametrize("op", sorted(op for op in REGISTERED if op.endswith("_backward")))
def test_an_op_with_a_backward_has_a_gradient(op):
    forward = op.removesuffix("_backward")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"neumuter::{forward}", "Autograd")


def test_the_version_is_that_of_the_installed_package():
    assert nk.__version__ == importlib.metadata.version("neumuter-kernels")


def test_a_checkout_that_is_not_installed_has_a_version_too():
    script = """
import importlib.metadata

def not_installed(name):
    raise importlib.metadata.PackageNotFoundError(name)

importlib.metadata.version = not_installed
import neumuter_kernels
print(neumuter_kernels.__version__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "0+unknown\n"
