"""Interleaved timing of contenders for the same work, each checked for correctness first."""

import ctypes
import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
WARM_UP = 3
CPU_SAMPLE_SECONDS = 2e-3  # a sample on the CPU repeats short calls for about this long
LAUNCHING_CYCLES = 4_000_000  # GPU clock cycles, about 2 ms: longer than launching any contender


@dataclass
class Contender:
    """One way to do the work.

    run(state) is timed; prepare() makes its state and is not. check() returns None or says what is
    wrong with the results. counts: whether it does all of the work, so that it may be the best baseline.
    """

    name: str
    run: Callable
    prepare: Callable = lambda: None
    check: Callable = lambda: None
    counts: bool = True


@dataclass
class Effort:
    """How long to measure: rounds over all contenders until ``seconds`` per contender have passed."""

    seconds: float
    least: int
    most: int = 400


FULL = {"cpu": Effort(1.0, 9), "cuda": Effort(0.2, 9)}
QUICK = Effort(0.0, 2)


# torch.compile's backend. The one for tiny sizes traces the whole graph but generates no code.
BACKENDS = {False: "inductor", True: "aot_eager"}


def compiled(function, backend=BACKENDS[False]):
    """``function`` compiled for one shape; its graph is its own, not the ninth recompilation of another's."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def keep_freed_memory():
    """Let malloc keep what is freed, as PyTorch's allocator for GPUs does (blocks below 32 MiB; glibc only).

    Else contenders are timed that wait for the kernel to clear pages which another one has just given back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class _CpuClock:
    def __init__(self, contender):
        self.contender = contender
        seconds = min(self._once(1) for _ in range(WARM_UP))
        self.calls = max(1, math.ceil(CPU_SAMPLE_SECONDS / seconds))

    def _once(self, calls):
        states = [self.contender.prepare() for _ in range(calls)]
        start = time.perf_counter()
        for state in states:
            self.contender.run(state)
        return (time.perf_counter() - start) / calls

    def sample(self):
        return self._once(self.calls)


class _GpuClock:
    """CUDA events around one call on a cold L2 cache.

    The cache is emptied by reading a buffer of four times its size (one float for each of its bytes):
    reading leaves no dirty lines, whose writing back would be timed. Then the GPU waits until the CPU has
    launched everything: what is timed is the GPU's work, not the launching.
    """

    def __init__(self, contender):
        self.contender = contender
        for _ in range(WARM_UP):
            contender.run(contender.prepare())

    def sample(self):
        state = self.contender.prepare()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _larger_than_the_cache().sum()
        torch.cuda._sleep(LAUNCHING_CYCLES)
        start.record()
        self.contender.run(state)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


@functools.cache
def _larger_than_the_cache():
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return torch.zeros(properties.L2_cache_size, device="cuda")


def measure(contenders, device, effort):
    """Samples in seconds by contender name, taken round robin."""
    clocks = {c.name: (_GpuClock if device == "cuda" else _CpuClock)(c) for c in contenders}
    samples = {name: [] for name in clocks}
    start, rounds = time.perf_counter(), 0
    while rounds < effort.least or (
        rounds < effort.most and time.perf_counter() - start < effort.seconds * len(clocks)
    ):
        for name, clock in clocks.items():
            samples[name].append(clock.sample())
        rounds += 1
    return samples


def copying(moved_bytes, device):
    """copy_ that reads and writes ``moved_bytes`` bytes in all."""
    source = torch.rand(max(moved_bytes // 8, 1), device=device)  # some memory is faster with zeros
    target = torch.zeros_like(source)
    return Contender("copy", lambda _: target.copy_(source))


def _peak_mib(contender):
    """Peak device memory of one call above what was there before, in MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.run(contender.prepare())
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def compare(contenders, limit, device, effort, moved_bytes=None, calls=1, plain=None):
    """One row of results: the first contender is ours, the others are its baselines.

    limit: a contender that does the least that the memory allows (or None). moved_bytes: what the
    work must move. calls: how often one run does the work. plain: the name of the contender over which the
    others' cost in percent is the median of what each round says, whose samples are near in time.
    """
    wrong = {c.name: _checked(c) for c in contenders}
    sound = [c for c in contenders if wrong[c.name] is None]
    samples = measure(sound + ([limit] if limit else []), device, effort)
    time_of = {name: _quartiles(s, calls) for name, s in samples.items()}
    entries = []
    for c in contenders:
        entry = {"name": c.name}
        if wrong[c.name] is not None:
            entries.append(entry | {"failed": wrong[c.name]})
            continue
        entry |= time_of[c.name]
        if plain in samples and plain != c.name:
            ratios = (a / b for a, b in zip(samples[c.name], samples[plain], strict=True))
            entry["cost_percent"] = 100 * (statistics.median(ratios) - 1)
        if device == "cuda":
            entry["peak_mib"] = _peak_mib(c)
        if moved_bytes:
            entry["gb_per_s"] = moved_bytes / entry["median_us"] / 1e3
        if limit:
            entry["share_of_limit"] = time_of[limit.name]["median_us"] / entry["median_us"]
        entries.append(entry)
    row = {"bytes": moved_bytes, "limit": limit and {"name": limit.name} | time_of[limit.name]}
    row["contenders"] = entries
    rivals = [c.name for c in sound[1:] if c.counts]
    if wrong[contenders[0].name] is None and rivals:
        best = min(rivals, key=lambda name: time_of[name]["median_us"])
        row["best_baseline"] = best
        row["ratio"] = time_of[best]["median_us"] / entries[0]["median_us"]
    return row


def _checked(contender):
    """None, or what is wrong; a contender that raises is wrong, too, and the others are still measured."""
    try:
        return contender.check()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def _quartiles(samples, calls):
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {f"{name}_us": 1e6 * x / calls for name, x in (("q1", low), ("median", median), ("q3", high))}
