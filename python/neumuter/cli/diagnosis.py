"""What this machine and installation are, whether the kernels compute what they should, and how fast."""

import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import neumuter_kernels as nk
from neumuter_kernels import reference, selftest
from neumuter_kernels.info import backends, report, version

PACKAGES = ("peft", "accelerate", "tokenizers", "safetensors", "numpy", "bitsandbytes", "torchao")
VARIABLES = (  # of the environment; none that holds a path
    "NEUMUTER_CPU_CAPABILITY", "NEUMUTER_DEBUG", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
    "TRITON_INTERPRET",
)  # fmt: skip
# Tokens, intermediate size and dtype of the speed check.
PROBLEM = {"cpu": (512, 8192, torch.float32), "cuda": (4096, 14336, torch.bfloat16)}
# The time of the speed check, shared by all devices.
SECONDS = 5.0
# Calls timed together on a GPU, which begins the first while the CPU launches the others.
IN_A_ROW = 10
_PATH = re.compile(r"(?<![\w/.:\\…])(?:[A-Za-z]:)?(?:[/\\][^\s/\\:'\"<>,;)]+)*[/\\]([^\s/\\:'\"<>,;)]+)")


class Verdict(NamedTuple):
    """The self-test of ``op`` by ``backend`` on ``device``: right, or what is wrong."""

    device: str
    op: str
    backend: str
    error: str | None


class Speed(NamedTuple):
    """Medians in seconds: masked_glu forward and backward, eager PyTorch, a copy of as many bytes."""

    device: str
    problem: str
    ours: float
    eager: float
    copy: float

    @property
    def ratio(self) -> float:
        """How many times faster than eager."""
        return self.eager / self.ours

    @property
    def share(self) -> float:
        """Of the bandwidth that the copy reaches."""
        return self.copy / self.ours


def devices() -> list[str]:
    """ "cpu" and every GPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{i}" for i in range(gpus))]


def environment() -> list[tuple[str, str]]:
    """Pairs of (what, value): versions, hardware, and which backend each op uses."""
    gpus = [torch.cuda.get_device_properties(device) for device in devices()[1:]]
    named = [
        f"{i}: {gpu.name}, {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        for i, gpu in enumerate(gpus)
    ]
    known = dict(report()) | {"GPU": "; ".join(named) or "none"}
    ops = {what: known.pop(what) for what in list(known) if what.startswith("op ")}
    return [
        *known.items(),
        ("ROCm of torch", torch.version.hip or "none"),
        ("NVIDIA driver", _found(r"Kernel Module.*?\s(\d+\.[\d.]+)", _text("/proc/driver/nvidia/version"))),
        ("nvcc", _nvcc()),
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        ("CPU", cpu_name()),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"),
        ("load average", f"{os.getloadavg()[0]:.1f}"),
        ("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"),
        *((package, version(package)) for package in PACKAGES),
        *((name, os.environ[name]) for name in VARIABLES if name in os.environ),
        *ops.items(),
    ]


def self_test() -> Iterator[Verdict]:
    """Every backend that is there against the reference."""
    known = backends()
    for device in devices():
        for found in selftest.run(device):
            backend = known[found.op][device != "cpu"]
            if not backend.startswith("none"):
                yield Verdict(device, found.op, backend, found.error)


def speed_check() -> Iterator[Speed]:
    """Measure each device, all of them in about SECONDS, with the contenders taking turns."""
    for device in devices():
        yield _speed(device, SECONDS / len(devices()), *PROBLEM[device.split(":")[0]])


def bug_report(pairs: list[tuple[str, str]], tests: list[Verdict], speeds: list[Speed]) -> str:
    """All of it as plain text, without paths and without the names of the user and the machine."""
    lines = [f"{what:24} {value}" for what, value in pairs]
    lines += [f"test {t.device:8} {t.op:16} {t.error or 'passed'} ({t.backend})" for t in tests]
    lines += [
        f"speed {s.device:7} {s.ratio:.2f} x eager, {s.share:.0%} of copy bandwidth; {1e3 * s.ours:.3g}, "
        f"{1e3 * s.eager:.3g} and {1e3 * s.copy:.3g} ms; {s.problem}"
        for s in speeds
    ]
    return without_names("\n".join(lines))


def cpu_name() -> str:
    """What the CPU says it is, else its architecture."""
    found = re.search(r"model name\s*:\s*(.+)", _text("/proc/cpuinfo"))
    return found[1].strip() if found else platform.machine()


def without_names(text: str) -> str:
    """``text`` with paths cut to their last part, and without the names of the user and the machine."""
    home = re.escape(str(Path.home()))
    # Folders in a home folder may have spaces in their names.
    text = re.sub(rf"{home}(?:[/\\][^/\\\n'\"]+)*[/\\]", "…/", text)
    text = re.sub(rf"\b{re.escape(socket.gethostname())}\b", "HOST", text)
    return _PATH.sub(r"…/\1", text)


def _speed(device: str, seconds: float, tokens: int, width: int, dtype: torch.dtype) -> Speed:
    gate, up, grad = (torch.randn(tokens, width, device=device).to(dtype) for _ in range(3))
    mask = torch.rand(1, width, device=device).requires_grad_()
    leaves = [gate.requires_grad_(), up.requires_grad_(), mask]
    # The forward pass moves three tensors of that size, the backward pass five.
    moved = 8 * gate.numel() * gate.element_size()
    # Each byte is read once and written once.
    source = torch.rand(moved // 8, device=device)
    target = torch.zeros_like(source)

    def both(forward: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(gate, up, mask), leaves, grad)

    contenders: dict[str, Callable[[], object]] = {
        "ours": both(lambda g, u, m: nk.masked_glu(g, u, m, activation="silu")),
        "eager": both(lambda g, u, m: reference.activate(g, "silu") * u * m.to(g.dtype)),
        "copy": lambda: target.copy_(source),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        # The first call compiles, and touches memory for the first time.
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 3:
        for name, call in contenders.items():
            times[name].append(_timed(call, device))
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    problem = f"masked_glu forward and backward, {tokens}×{width} {str(dtype).removeprefix('torch.')}"
    return Speed(device, problem, **medians)


def _timed(call: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(IN_A_ROW):
        call()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / IN_A_ROW


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1].strip() if found else "none"


def _nvcc() -> str:
    compiler = shutil.which("nvcc") or shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "") + "/bin")
    if compiler is None:
        return "none"
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    return _found(r"release ([\d.]+)", done.stdout)
