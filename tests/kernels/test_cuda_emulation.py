"""The CUDA sources on the CPU: csrc/cuda/select_muted.cuh, compiled by g++ with tests/cuda_emulation."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from neumuter_kernels import reference
from tests.kernels.test_mute import mute_sets

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests" / "cuda_emulation"
SCHEDULES = ("forward", "reverse", "random")
STRETCH = (-0.1, 1.1)
ASAN = ("-g", "-fsanitize=address", "-fsanitize-sections=cuda_shared")
# A failed launch abandons its fibers, and with them what they had allocated.
ENVIRONMENT = os.environ | {"ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=1"}

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++, or another C++20 compiler in CXX")


def build(folder, main, *flags, csrc=ROOT / "csrc"):
    program = folder / Path(main).stem
    command = [COMPILER, "-std=c++20", "-O2", "-ffp-contract=off", *flags]
    command += [f"-I{csrc / 'cuda'}", f"-I{EMULATION}"]
    subprocess.run([*command, str(EMULATION / main), "-o", str(program)], check=True)
    return program


def edited_sources(folder, edit):
    """A copy of csrc in which select_muted.cuh went through ``edit``."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    header = folder / "csrc" / "cuda" / "select_muted.cuh"
    header.write_text(edit(header.read_text()))
    return folder / "csrc"


def with_three_blocks(source):
    """The same kernels where three blocks take all tiles: loops over tiles with few scores."""
    source, replaced = re.subn(r"MAX_BLOCKS = \d+", "MAX_BLOCKS = 3", source)
    assert replaced == 1
    return source


def with_breakable_barriers(source):
    """Barrier number $BROKEN_BARRIER is skipped, by thread 0 alone if $BY_ONE_THREAD is set."""
    numbers = iter(range(100))
    source = re.sub(
        r"__syncthreads\(\);", lambda _: f"if (reached({next(numbers)})) __syncthreads();", source
    )
    reached = """
#include <cstdlib>
static bool reached(int barrier) {
  static const int broken = atoi(getenv("BROKEN_BARRIER"));
  static const bool by_one_thread = getenv("BY_ONE_THREAD");
  return barrier != broken || (by_one_thread && threadIdx.x != 0);
}
"""
    return with_three_blocks(
        source.replace("#pragma once", "#pragma once\n#include <launch.cuh>" + reached, 1)
    )


BARRIERS = (ROOT / "csrc" / "cuda" / "select_muted.cuh").read_text().count("__syncthreads();")


@pytest.fixture(scope="session")
def select_program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("select"), "select_muted_main.cpp")


@pytest.fixture(scope="session")
def checked_program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checked")
    csrc = edited_sources(folder, with_three_blocks)
    return build(folder, "select_muted_main.cpp", *ASAN, csrc=csrc)


@pytest.fixture(scope="session")
def breakable_program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("breakable")
    csrc = edited_sources(folder, with_breakable_barriers)
    return build(folder, "select_muted_main.cpp", csrc=csrc)


@pytest.fixture(scope="session")
def emulator_programs(tmp_path_factory):
    return {
        flags: build(tmp_path_factory.mktemp("emulator"), "emulator_main.cpp", *flags) for flags in ((), ASAN)
    }


# --- select_muted against the reference --------------------------------------------------------


def encode(scores, widths, budget=None, threshold=None, capacity=None):
    """One case as the program reads it."""
    if capacity is None:
        capacity = len(scores) if budget is None else min(budget, len(scores))
    sizes = (len(scores), len(widths), -1 if budget is None else budget, capacity)
    constants = (0 if threshold is None else threshold, *STRETCH)
    return b"".join(
        np.asarray(part, dtype).tobytes()
        for part, dtype in (
            (sizes, np.int64),
            (constants, np.float32),
            (widths, np.int64),
            (scores, np.float32),
        )
    )


def expected(scores, widths, budget=None, threshold=None):
    """The result of a case as the program writes it."""
    result = reference.select_muted(torch.from_numpy(scores), widths, budget, threshold, STRETCH)
    return np.int32(0).tobytes() + b"".join(part.numpy().tobytes() for part in result)


def run(program, schedule, data, **environment):
    return subprocess.run(
        [str(program), schedule], input=data, capture_output=True, env=ENVIRONMENT | environment
    )


def widths_of(n, layers, generator):
    """Unequal widths, zero ones included, that add up to n."""
    cuts = np.sort(generator.integers(0, n + 1, layers - 1))
    return np.diff(np.concatenate([[0], cuts, [n]])).tolist()


def cases():
    """name -> (scores, widths, {"budget": ...} or {"threshold": ...})."""
    generator = np.random.default_rng(0)
    found = {}

    def add(name, scores, widths=None, **selection):
        scores = np.asarray(scores, np.float32)
        found[name] = (scores, widths or widths_of(len(scores), 5, generator), selection)

    for n in (1, 31, 32, 33, 1000, 1024, 1025, 7001):
        scores = generator.normal(2.4, 1.5, n)
        for budget in sorted({0, 1, n // 100, n // 2, n - 1, n, n + 7}):
            add(f"{n} scores, budget {budget}", scores, budget=budget)
        for threshold in (-100.0, -1.7346, 2.4, 100.0, np.inf, -np.inf, np.nan):
            add(f"{n} scores, threshold {threshold}", scores, threshold=threshold)

    few = generator.integers(-3, 3, 5000) / 4
    for budget in (1, 777, 2500, 4999):
        add(f"few distinct scores, budget {budget}", few, budget=budget)
        add(f"equal scores, budget {budget}", np.full(5000, 2.398), budget=budget)
    add("few distinct scores, threshold", few, threshold=0.25)

    zeros = np.where(generator.random(2100) < 0.5, -0.0, 0.0)
    add("signed zeros, budget", zeros, budget=900)
    add("signed zeros below +0", zeros, threshold=0.0)
    add("signed zeros below -0", zeros, threshold=-0.0)

    denormals = generator.integers(-40, 40, 2100) * np.float32(2.0**-149)
    add("denormals, budget", denormals, budget=900)
    add("denormals, threshold", denormals, threshold=3 * 2.0**-149)

    special = generator.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -87.5, 88.0, 3e38, -3e38], 3000)
    for budget in (1, 500, 2000, 3000):
        add(f"special scores, budget {budget}", special, budget=budget)
    for threshold in (0.5, np.inf, -np.inf):
        add(f"special scores, threshold {threshold}", special, threshold=threshold)
    # All NaN payloads and signs, and every exponent.
    bits = generator.integers(0, 2**32, 6000, dtype=np.uint32)
    add("random bits, budget", bits.view(np.float32), budget=2987)
    nans = (bits | 0x7F800001).view(np.float32)
    add("only NaN, budget", nans, budget=17)
    add("only NaN, threshold", nans, threshold=np.inf)

    add("no layers", [], [], budget=3)
    add("empty layers", [], [0, 0, 0], threshold=1.0)
    add("layers around empty ones", generator.normal(size=12), [0, 0, 5, 0, 0, 7, 0, 0], budget=6)
    add("layers of one neuron", generator.normal(size=1300), [1] * 1300, budget=130)
    for layers in (511, 512, 513, 1500):  # a launch carries the starts of 512 layers
        add(f"{layers} layers", generator.normal(size=2000), widths_of(2000, layers, generator), budget=200)
    return found


CASES = cases()


@pytest.fixture(scope="session")
def expectations():
    return {name: expected(scores, widths, **how) for name, (scores, widths, how) in CASES.items()}


def assert_all_as_expected(program, schedule, expectations):
    data = b"".join(encode(scores, widths, **how) for scores, widths, how in CASES.values())
    done = run(program, schedule, data)
    assert done.returncode == 0, done.stderr.decode()
    offset = 0
    for name, result in expectations.items():
        assert done.stdout[offset : offset + len(result)] == result, name
        offset += len(result)
    assert offset == len(done.stdout)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_select_muted_returns_the_bits_of_the_reference(select_program, expectations, schedule):
    assert_all_as_expected(select_program, schedule, expectations)


def test_select_muted_under_address_sanitizer(checked_program, expectations):
    assert_all_as_expected(checked_program, "random", expectations)


def test_select_muted_with_many_blocks(select_program):
    generator = np.random.default_rng(1)
    scores = generator.normal(2.4, 1.5, 70001).astype(np.float32)
    widths = widths_of(len(scores), 40, generator)
    done = run(select_program, "random", encode(scores, widths, budget=700))
    assert done.stdout == expected(scores, widths, budget=700), done.stderr.decode()


def test_other_capacities(checked_program):
    """indptr counts what was selected; what exceeds the capacity is dropped."""
    scores = np.random.default_rng(2).normal(size=3000).astype(np.float32)
    indptr, indices, gains = reference.select_muted(torch.from_numpy(scores), [1000, 2000], budget=50)
    for capacity in (0, 20, 50, 2500):
        data = encode(scores, [1000, 2000], budget=50, capacity=capacity)
        result = np.frombuffer(run(checked_program, "forward", data).stdout, np.int32)
        kept = min(capacity, 50)
        assert result[1:4].tolist() == indptr.tolist()
        assert result[4 : 4 + kept].tolist() == indices[:kept].tolist()
        assert (result[4 + kept : 4 + capacity] == -1).all()
        assert result[4 + capacity :].view(np.float32).tolist() == gains[:kept].tolist() + [1.0] * (
            capacity - kept
        )


@pytest.mark.parametrize("widths", [[4, 5], [4, 7], [11, -1], [-1, 11]])
def test_widths_that_do_not_fit_are_an_error(checked_program, widths):
    result = run(checked_program, "forward", encode(np.zeros(10, np.float32), widths, budget=1)).stdout
    error = np.frombuffer(result, np.int32)[0]
    assert error == 1  # cudaErrorInvalidValue


# --- What the emulator finds -------------------------------------------------------------------


def breakable_case():
    """A case that needs every barrier: several tiles for each of three blocks, all digits in use."""
    generator = np.random.default_rng(3)
    scores = generator.normal(2.4, 1.5, 7000).astype(np.float32)
    return scores, widths_of(len(scores), 300, generator), 3333


def test_no_barrier_is_broken(breakable_program):
    scores, widths, budget = breakable_case()
    done = run(breakable_program, "random", encode(scores, widths, budget), BROKEN_BARRIER="-1")
    assert done.stdout == expected(scores, widths, budget), done.stderr.decode()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("barrier", range(BARRIERS))
def test_every_missing_barrier_shows(breakable_program, barrier, schedule):
    scores, widths, budget = breakable_case()
    done = run(breakable_program, schedule, encode(scores, widths, budget), BROKEN_BARRIER=str(barrier))
    assert done.returncode != 0 or done.stdout != expected(scores, widths, budget)


@pytest.mark.parametrize("barrier", range(BARRIERS))
def test_every_diverged_barrier_is_reported(breakable_program, barrier):
    data = encode(*breakable_case())
    done = run(breakable_program, "forward", data, BROKEN_BARRIER=str(barrier), BY_ONE_THREAD="1")
    assert done.returncode == 1
    assert re.match(rb"CUDA emulation: deadlock, .*255 threads at __syncthreads \(line \d+\)", done.stderr)


def emulate(programs, kernel, flags=()):
    return subprocess.run(
        [str(programs[flags]), kernel], capture_output=True, env=ENVIRONMENT, text=True, check=False
    )


def shuffled(thread):
    lane, warp = thread % 32, thread - thread % 32
    value = 100 * (warp + (lane ^ 1)) + max(lane - 1, 0)
    return 100 * (100 * value + (lane + 2 if lane < 30 else lane)) + 5


KERNELS = {
    "reversed_by_shared_memory": [*range(95, -1, -1), *range(191, 95, -1)],
    "stale_shared_memory": [0] * 192,
    "shuffles": [shuffled(thread) for thread in range(96)] * 2,
    "ballots_of_diverged_halves": ([0xAAAA] * 16 + [0x4924] * 16) * 6,
    "sum_by_atomics": [2208, 2256, 2304, 2352] + [0] * 188,
}


@pytest.mark.parametrize("flags", [(), ASAN], ids=("plain", "asan"))
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_has_the_result_that_cuda_defines(emulator_programs, kernel, flags):
    done = emulate(emulator_programs, kernel, flags)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert [int(value) for value in line.split()] == KERNELS[kernel]
    assert len(done.stdout.splitlines()) == len(SCHEDULES)


@pytest.mark.parametrize(
    ("kernel", "message"),
    {
        "barrier_in_a_branch": "46 threads at the end of the kernel",
        "two_barriers": "deadlock, 32 threads at __syncthreads",
        "lane_not_in_mask": "does not name the calling lane",
        "lane_returned": "names a lane that has returned",
        "lanes_disagree": "waits for it with another mask or at __ballot_sync",
        "source_not_in_mask": "reads a lane that is not in the mask",
        "different_operations": "waits for it with another mask or at __syncwarp",
    }.items(),
)
def test_what_a_gpu_leaves_undefined_is_an_error(emulator_programs, kernel, message):
    done = emulate(emulator_programs, kernel)
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("kernel", "message"),
    {
        "beyond_static_shared_memory": "global-buffer-overflow",
        "beyond_dynamic_shared_memory": "heap-buffer-overflow",
    }.items(),
)
def test_address_sanitizer_knows_the_bounds_of_shared_memory(emulator_programs, kernel, message):
    done = emulate(emulator_programs, kernel, ASAN)
    assert done.returncode != 0
    assert message in done.stderr


# --- mute_ against the reference ---------------------------------------------------------------


@pytest.fixture(scope="session")
def mute_program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("mute"), "mute_main.cpp", *ASAN)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("with_rows", [True, False])
def test_mute_in_the_emulator(mute_program, schedule, with_rows):
    tokens, width, stride, sets, layers, layer = 12, 300, 310, 4, 2, 1
    indptr, indices, gains = mute_sets(sets, layers, width, share=0.6)  # more than one round of threads
    rows = torch.randint(-1, sets, (tokens,), generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(tokens, stride, generator=torch.Generator().manual_seed(1))
    expected = hidden.clone()
    expected[:, :width] = reference.mute(
        hidden[:, :width], indptr, indices, gains, rows if with_rows else None, layer
    )
    if with_rows:  # what lies outside is skipped
        rows = torch.where(rows < 0, torch.tensor([-5, sets] * (tokens // 2)), rows)
    outside = (indices.numpy(), [width, -1])
    sizes = (tokens, width, stride, sets, layers, layer, len(indices) + 2, int(with_rows))
    parts = (np.int64(sizes), indptr.numpy(), np.int32(np.concatenate(outside)), gains.numpy())
    data = b"".join(x.tobytes() for x in (*parts, np.float32([9, 9]), rows.numpy(), hidden.numpy()))
    found = run(mute_program, schedule, data)
    assert found.returncode == 0, found.stderr.decode()
    assert found.stdout == expected.numpy().tobytes()
