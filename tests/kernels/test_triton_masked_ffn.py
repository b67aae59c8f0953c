"""How the Triton kernels of masked_ffn divide their work: chunks, grids, and what they are compiled for."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.kernels import backends, test_masked_ffn

kernels = pytest.importorskip("neumuter_kernels.triton.masked_ffn", reason="triton is not installed")
from neumuter_kernels.triton import row_ids  # noqa: E402


@pytest.fixture
def device():
    with backends.use("triton") as place:
        yield place


def check(device, layout, T, G, ids=None, dtype=torch.float32, F=140):
    leaves, ids, grad = test_masked_ffn.make_case(layout, (T,), F, G, dtype, device, ids)
    test_masked_ffn.check(layout, leaves, ids, grad, "silu")


# --- Chunks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["separate", "interleaved"])
@pytest.mark.parametrize("at_once", [1, 6, 1024])
@pytest.mark.parametrize("T", [36, 45])
def test_mask_rows_in_several_chunks(device, layout, at_once, T, monkeypatch):
    """Of one or more tiles, with and without tokens that fill none."""
    monkeypatch.setattr(kernels, "FEW", 0)
    monkeypatch.setattr(kernels, "INTERPRETED_AT_ONCE", at_once)
    check(device, layout, T, 1)
    check(device, layout, T, 3)
    check(device, layout, T, 4, torch.randint(-1, 4, (T,), device=device))


def test_many_tokens_are_cut_into_chunks(device):
    check(device, "plain", kernels.FEW + 30, 1, F=9)


@pytest.mark.parametrize("length", [1, 3, 8, 100, 5001])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("looks", [row_ids.MOST_LOOKS, 0])
def test_chunks_of_row_ids(device, length, dtype, looks, monkeypatch):
    """Of more row ids than a program looks at at a time, some outside of the mask; or sorted by torch."""
    monkeypatch.setattr(row_ids, "MOST_LOOKS", looks)
    T, G = 5000, 7
    ids = torch.randint(-2, G + 2, (T,), dtype=dtype, device=device)
    ids[ids == 4] = 5  # a row without tokens
    order, rows, starts, ends, first_chunks = (x.cpu() for x in row_ids.chunks_of(ids, G, length))
    expected = torch.where((ids >= 0) & (ids < G), ids, G).cpu()
    assert torch.equal(order.long(), expected.sort(stable=True).indices)
    assert len(rows) == T // length + G + 1 == first_chunks[-1]
    assert ((ends - starts) <= length).all()
    reached = 0
    for g in range(G + 1):
        for chunk in range(first_chunks[g], first_chunks[g + 1]):
            assert rows[chunk] == g
            assert starts[chunk] == reached
            assert (expected[order[starts[chunk] : ends[chunk]].long()] == g).all()
            reached = int(ends[chunk])
    assert reached == T
    if length > T:
        assert torch.equal(first_chunks, torch.arange(G + 2, dtype=torch.int32))


H100 = types.SimpleNamespace(
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    multi_processor_count=132,
)


@pytest.mark.parametrize(("registers", "resident"), [(32, 16), (56, 9), (64, 8), (65, 7), (72, 7), (255, 2)])
def test_registers_tell_how_many_programs_run_at_once(registers, resident):
    assert kernels.programs_at_once(registers, 4, H100) == 132 * resident
    assert kernels.programs_at_once(255, 16, H100) == 132


def test_each_compiled_kernel_is_asked_once(monkeypatch):
    """Also those that differ only in what Triton sees of their arguments: bits depend on no earlier call."""
    asked = []

    class Compiled:
        n_regs = 56

        def __getitem__(self, grid):
            return None

    def warmup(*arguments, grid, **constants):
        asked.append(arguments)
        return Compiled()

    monkeypatch.setattr(kernels, "masked_ffn_backward_kernel", types.SimpleNamespace(warmup=warmup))
    monkeypatch.setattr(kernels, "_at_once", {})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H100)
    gpu, x = torch.device("cuda", 0), torch.empty(64)
    for memory, stride, activation in ((x, 16, 0), (x[1:], 16, 0), (x, 17, 0), (x, 16, 1)):
        constants = {"ACTIVATION": activation, "num_warps": 4}
        for _ in range(2):
            assert kernels._backward_at_once(gpu, (memory, None, stride), constants) == 132 * 9
    assert len(asked) == 4


@pytest.mark.parametrize("blocks", [1, 2, 14, 2000])
@pytest.mark.parametrize("G", [1, 3, 8])
@pytest.mark.parametrize("at_once", [132 * 7, 132 * 8])
def test_all_programs_of_a_backward_run_at_once(G, blocks, at_once):
    rows = kernels.MANY_CHUNKS.rows
    for tokens in (1, 400, 8192, 2**20):
        length = kernels.tokens_per_chunk(tokens, G, blocks, at_once)
        chunks = -(-tokens // length)
        assert length % rows == 0
        assert G * chunks * blocks <= max(at_once, G * blocks)
        if length > rows:  # as many as there is room for, up to a chunk and what whole tiles cost
            assert (chunks + 1) * G * blocks * (1 + rows / (length - rows)) > at_once


# --- Grids -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "G"), [(90, 1), (90, 2), (12, 6)])
def test_more_programs_than_an_axis_of_a_grid_has_room_for(device, T, G, monkeypatch):
    monkeypatch.setattr(kernels, "MOST_PROGRAMS", 3)
    for few in (kernels.FEW, 0):
        monkeypatch.setattr(kernels, "FEW", few)
        check(device, "separate", T, G, F=20)
        check(device, "separate", T, G, torch.randint(-1, G, (T,), device=device), F=20)


def test_rows_that_lie_far_apart(device, monkeypatch):
    """Their distance in a tile would not fit in 31 bits, so they are copied."""
    monkeypatch.setattr(kernels, "FARTHEST", 30)
    leaves, ids, grad = test_masked_ffn.make_case("halves", (9,), 40, 1, torch.float32, device)
    assert leaves[0].stride(0) > 30
    test_masked_ffn.check("halves", leaves, ids, grad, "silu")


# --- What is compiled ------------------------------------------------------------------------

SPECIALISED = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from neumuter_kernels.triton import masked_ffn, masked_ffn_kernels, row_ids

backend = make_backend(GPUTarget("cuda", 90, 32))
found = {}

class Recorder:
    def __init__(self, kernel):
        self.kernel = kernel
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **options):
        _, specialised, _ = self.bind(*arguments, debug=False, **options)
        found.setdefault(self.kernel.__name__, set()).add(str(specialised))

for module in (masked_ffn, row_ids):
    for name, value in list(vars(module).items()):
        if name.endswith("_kernel"):
            setattr(module, name, Recorder(value))
F = 1536
for ids in (False, True):
    for T in (1, 2, 3, 16, 17, 64, 100, 1000):
        for G in ((1, 2, 16, 17) if ids else (1,)):
            x, mask = torch.zeros(T, F, dtype=torch.bfloat16), torch.zeros(G, F)
            row = torch.zeros(T, dtype=torch.int64) if ids else None
            masked_ffn.forward(x, x, mask, row, 0, 1)
            masked_ffn.backward(x, x, x, mask, row, 0, 1, True, True)
print({name: len(kinds) for name, kinds in found.items()})
"""


def test_no_number_of_tokens_or_mask_rows_compiles_a_kernel_anew():
    """Two kinds of the kernels that know row ids from one mask row; one of the one that sorts row ids."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SPECIALISED], capture_output=True, text=True, env=environment,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = {"masked_ffn_forward_kernel": 2, "masked_ffn_backward_kernel": 2, "chunk_kernel": 1}
    assert eval(done.stdout) == expected
