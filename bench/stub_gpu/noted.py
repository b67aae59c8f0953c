"""What a process with the stub driver has launched."""

import ctypes
from dataclasses import dataclass

MOST_PARAMETERS, MOST_NOTED = 64, 64  # as in driver.c


class _Launch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("kernel", "stream", "device")),
        *((name, ctypes.c_uint32 * 3) for name in ("grid", "block")),
        *((name, ctypes.c_uint32) for name in ("shared", "parameters")),
        ("values", ctypes.c_uint64 * MOST_PARAMETERS),
    )


@dataclass(frozen=True)
class Launch:
    kernel: int
    stream: int
    device: int
    grid: tuple
    block: tuple
    shared: int
    values: tuple


class Driver:
    """The stub driver of this process; ``since()`` returns the launches since its last call."""

    def __init__(self):
        self._library = ctypes.CDLL("libcuda.so.1")
        self._noted = (_Launch * MOST_NOTED).in_dll(self._library, "stub_noted")
        self._seen = self._count.value

    @property
    def _count(self):
        return ctypes.c_uint64.in_dll(self._library, "stub_count")

    def set(self, name, value):
        """A variable of driver.c."""
        ctypes.c_int.in_dll(self._library, name).value = value

    def since(self):
        first, self._seen = self._seen, self._count.value
        assert self._seen - first <= MOST_NOTED
        noted = [self._noted[n % MOST_NOTED] for n in range(first, self._seen)]
        return [
            Launch(x.kernel, x.stream, x.device, tuple(x.grid), tuple(x.block), x.shared,
                   tuple(x.values[: x.parameters]))
            for x in noted
        ]  # fmt: skip
