"""Compiles the CUDA sources with nvcc, if it is there, for the table of bench/static/table.py."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from bench import ROOT
from bench.devices import DEVICES

HEADER = ROOT / "csrc/cuda/select_muted.cuh"
SOURCE = f"""#include "{HEADER}"
auto* entry = &neumuter::cuda::select_muted;
"""
THREADS = int(re.search(r"constexpr int THREADS = (\d+)", HEADER.read_text())[1])
FLAGS = ["-std=c++20", "--fmad=false"]
NAME = re.compile(r"_ZN8neumuter4cuda\d+([a-z_]+)(?:ILi(\d+)E)?")


def nvcc():
    """The path of nvcc, or None; found as CMakeLists.txt finds it."""
    places = [Path(p) / "bin" for p in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if p]
    return shutil.which("nvcc") or next((str(p / "nvcc") for p in places if (p / "nvcc").exists()), None)


def nvcc_version():
    """As in "13.0", or None without nvcc."""
    if nvcc() is None:
        return None
    text = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text)[1]


def cuda_rows():
    """Rows as those of bench.static.table, without bytes per element.

    nvcc peels and unrolls their loops, so these cannot be told from the code; by construction each of the
    three histograms, count and emit reads the scores once, 4 bytes a thread, adjacent threads side by side.
    """
    if nvcc() is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "entry.cu"
        source.write_text(SOURCE)
        known = subprocess.run([nvcc(), "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        devices = [d for d in DEVICES.values() if f"compute_{d.target}" in known]
        return [row for device in devices for row in _rows(source, device)]


def _compile(source, *options):
    command = [nvcc(), *FLAGS, *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stderr


def _rows(source, device):
    output = source.with_suffix(".out")
    arch = f"-arch=sm_{device.target}"
    report = _compile(source, arch, "-Xptxas", "-v", "-cubin", "-o", str(output))
    entries = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        report,
        re.DOTALL,
    )
    for symbol, stores, loads, registers, rest in sorted(entries):
        shared = int((re.search(r"(\d+) bytes smem", rest) or [0, 0])[1])
        name, number = NAME.match(symbol).groups()
        programs, limit = device.resident(THREADS, int(registers), shared)
        yield {
            "kernel": f"select_muted {name}" + (f" {number}" if number else ""),
            "dtype": "fp32", "target": device.target, "registers": int(registers),
            "spilled": int(stores) + int(loads), "shared": shared, "bytes": None, "budget": None,
            "programs": programs, "limit": limit, "occupancy": programs * THREADS / device.threads,
        }  # fmt: skip
