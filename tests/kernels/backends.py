"""The backends of the ops, so that every test runs on all of them through the public functions.

"cpp" is what CPU tensors use. "triton" is what GPU tensors use; without a GPU, the same Python and
Triton code takes the place of the C++ kernels for the time of a test and runs in Triton's
interpreter, on CPU tensors.
"""

import contextlib

import torch

from neumuter_kernels.registration import OPS, Triton
from neumuter_kernels.selftest import relative_error

HAVE_GPU = torch.cuda.is_available()
DEVICES = ["cpu"] + ["cuda"] * HAVE_GPU


@contextlib.contextmanager
def use(name):
    """Lets the public functions use that backend; the value is the device to put tensors on."""
    if name == "cpp" or HAVE_GPU:
        yield "cuda" if name == "triton" else "cpu"
        return
    library = torch.library.Library("neumuter", "IMPL", "CPU")
    try:
        for name, op in OPS.items():
            if isinstance(op.gpu, Triton):
                library.impl(name, op.gpu)
        yield "cpu"
    finally:
        library._destroy()


def assert_as_accurate(actual, plain, exact, name=""):
    """``actual`` is as close to the float64 result as plain PyTorch in the same dtype, or nearly."""
    assert actual.shape == exact.shape, name
    assert actual.dtype == plain.dtype, name
    if exact.numel():
        assert not actual.isnan().any(), name
        ours, theirs = relative_error(actual, exact), relative_error(plain, exact)
        assert ours <= 1.5 * theirs + 3e-7 * (plain.dtype != torch.float64) + 1e-15, (name, ours, theirs)
