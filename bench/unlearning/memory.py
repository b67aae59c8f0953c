"""How much memory a piece of work needs in addition to what was there before."""

import ctypes
import gc
import os
import threading
from pathlib import Path

import torch

STATM = Path("/proc/self/statm")
INTERVAL = 0.002  # seconds between looks at the process; a shorter peak goes unseen


class PeakMemory:
    """Context: afterwards ``mib`` is the peak above what was held at its start, MiB.

    Of the GPU where there is one, else of the process, looked at all the time by a thread; None where the
    system does not tell (not Linux).
    """

    def __enter__(self):
        gc.collect()
        self.mib = None
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif STATM.exists():
            ctypes.CDLL(None).malloc_trim(0)  # what others have freed is not held any more
            self.before = self.peak = _resident()
            self.done = threading.Event()
            self.watcher = threading.Thread(target=self._watch, daemon=True)
            self.watcher.start()
        return self

    def __exit__(self, *exception):
        if torch.cuda.is_available():
            self.mib = (torch.cuda.max_memory_allocated() - self.before) / 2**20
        elif STATM.exists():
            self.done.set()
            self.watcher.join()
            self.mib = (self.peak - self.before) / 2**20

    def _watch(self):
        while not self.done.wait(INTERVAL):
            self.peak = max(self.peak, _resident())


def _resident():
    """Bytes that this process holds."""
    return os.sysconf("SC_PAGE_SIZE") * int(STATM.read_text().split()[1])
