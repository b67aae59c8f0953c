"""What the figures were measured on and with."""

import datetime
import hashlib
import os
import platform
import re
import shutil
import subprocess

import torch

from bench import ROOT
from neumuter.cli.diagnosis import cpu_name
from neumuter_kernels import _C
from neumuter_kernels.info import version

LOAD = os.getloadavg()[0]  # before this process adds to it: other processes make CPU times too long
PACKAGES = ("neumuter-kernels", "torch", "triton", "liger-kernel", "quack-kernels", "peft")
# The code that figures depend on: of the kernels alone, and of whole models.
KERNELS = ("csrc/**/*", "neumuter_kernels/**/*.py")
LIBRARY = (*KERNELS, "python/neumuter/**/*.py")


def describe(device, code):
    """The machine record of a row. ``code``: patterns of the files that its figures depend on."""
    on_gpu = device == "cuda"
    return {
        "device": device,
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "driver": driver() if on_gpu else None,
        "cpu": cpu_name(),
        "capability": _C.cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": round(LOAD, 1),
        "python": platform.python_version(),
        "versions": {p: v for p in PACKAGES if (v := version(p)) != "not installed"},
        "cuda": torch.version.cuda if on_gpu else None,
        "commit": commit(),
        "code": digest(*code),
        "date": datetime.date.today().isoformat(),
    }


def driver():
    """The version of NVIDIA's driver, or None without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return found[0] if found else None


def commit():
    """NEUMUTER_COMMIT, for copies without a history, else git's commit with "+" if files differ."""
    if given := os.environ.get("NEUMUTER_COMMIT"):
        return given
    found = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!docs")
    return found + "+" * bool(changed) if found else "unknown"


def _git(*arguments):
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def digest(*patterns):
    """Of the contents of the files: rows of different code do not belong in one table."""
    paths = sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()})
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def slug(machine):
    """The machine as a file name."""
    name = machine["gpu"] or f"{machine['cpu']} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")
