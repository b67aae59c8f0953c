"""What the figures were measured on and with."""

import datetime
import os
import platform
import re

import torch
from neumuter.doctor import cpu_name

from neumuter_kernels import _C
from neumuter_kernels.info import version

LOAD = os.getloadavg()[0]  # before this process adds to it: other processes make CPU times too long
PACKAGES = ("neumuter-kernels", "torch", "triton", "liger-kernel", "peft")


def describe(device):
    """The header of a result file."""
    return {
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cpu": cpu_name(),
        "capability": _C.cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": round(LOAD, 1),
        "python": platform.python_version(),
        "versions": {p: v for p in PACKAGES if (v := version(p)) != "not installed"},
        "cuda": torch.version.cuda if device == "cuda" else None,
        "date": datetime.date.today().isoformat(),
    }


def slug(header):
    """The machine as part of a file name."""
    name = header["gpu"] or f"{header['cpu']} {header['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")
