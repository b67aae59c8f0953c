"""Without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors."""

import importlib.util
import os

import pytest
import torch

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # or the threads of one wait for those of the others, here and in child processes
    threads = max(1, (os.cpu_count() or 1) // WORKERS)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)

HAVE_GPU = torch.cuda.is_available()
HAVE_TRITON = importlib.util.find_spec("triton") is not None
if not HAVE_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported


# Files that take a minute or more come first, so that none runs alone at the end.
LONG = (
    "test_docs", "test_processes", "test_plan", "test_experiments", "test_examples", "test_cli",
    "test_interrupted", "test_packaging", "test_masked_ffn",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Files that take long come first; then the rest of repo and bench."""
    order = {name: place for place, name in enumerate(LONG)}
    rest = len(LONG)
    items.sort(
        key=lambda item: order.get(item.path.stem, rest + (item.path.parent.name not in ("repo", "bench")))
    )


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["cpp"] + ["triton"] * HAVE_TRITON)
def device(request):
    """Runs the test on each backend; the value is the device to put tensors on."""
    from tests.kernels.backends import use

    with use(request.param) as place:
        yield place


@pytest.fixture
def interpreted(request, device):
    """Whether Triton's interpreter runs the test, a thousand times as slow as a kernel."""
    return request.node.callspec.params["device"] == "triton" and not HAVE_GPU


@pytest.fixture
def poisoned():
    """Fills what torch.empty returns with NaN, so that an element that was not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def _interpreter_rounds_bfloat16_to_nearest():
    """Triton's interpreter truncates float32 to bfloat16 where its compiler rounds to nearest."""
    if HAVE_GPU or not HAVE_TRITON:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    truncating = interpreter._convert_float

    def convert(x, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16:
            bits = x.view(np.uint32)
            return (
                (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            ).astype(np.uint16)
        return truncating(x, source, target, rounding)

    interpreter._convert_float = convert
