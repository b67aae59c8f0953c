"""The energy that the machine used meanwhile, where it counts it: for the cost in a report."""

import contextlib
from collections.abc import Callable
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")  # Intel's and AMD's counters, of the Linux kernel


def meter() -> Callable[[], float | None]:
    """A function that gives the joules since now, None where nothing counts them.

    Of the CPU's packages (RAPL through powercap, mostly readable by root alone) and the visible NVIDIA GPUs
    (NVML, where nvidia-ml-py is installed): of all that runs on them, not of this process alone.
    """
    before = _counters()

    def joules() -> float | None:
        after = _counters()
        used = [(after[name][0] - start) % size for name, (start, size) in before.items() if name in after]
        return sum(used) if used else None

    return joules


def _counters() -> dict[str, tuple[float, float]]:
    """{name: (joules on the counter, joules at which it starts again)}."""
    found = {}
    for package in POWERCAP.glob("intel-rapl:?"):  # its parts, intel-rapl:0:0, are in it
        with contextlib.suppress(OSError, ValueError):
            counted, most = (
                int((package / name).read_text()) / 1e6 for name in ("energy_uj", "max_energy_range_uj")
            )
            found[package.name] = counted, most
    return found | _gpus()


def _gpus() -> dict[str, tuple[float, float]]:
    import torch

    found = {}
    if torch.cuda.is_available() and torch.version.hip is None:
        with contextlib.suppress(ImportError):
            import pynvml

            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlInit()
                for index in range(torch.cuda.device_count()):
                    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
                    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                    found[uuid] = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, float("inf")
    return found
