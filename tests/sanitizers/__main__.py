"""Runs the tests of the CPU ops under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

The extension is built twice more, in build/sanitizers, and takes the place of the ordinary one in a Python
that has the sanitizer's runtime preloaded. Each defect of defects.cpp must raise its alarm there.
"""

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.kernels.test_capabilities import SUPPORTED

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX", "c++")
FILES = ("masked_ffn", "hard_concrete", "select_muted", "mute", "token_losses", "threads")
# Python's own work, and large tensors, whose stores past the caches no sanitizer sees.
LEFT_OUT = ("triton", "compile", "opcheck", "gradcheck", "schema", "too_large")
PYTEST = ["-m", "pytest", "-p", "tests.sanitizers.instrumented", "-p", "no:cacheprovider", "-q"]
PYTEST += ["--capture=sys", "-k", " and ".join(f"not {word}" for word in LEFT_OUT)]
PYTEST += [f"tests/kernels/test_{name}.py" for name in FILES]
OPTIONS = {
    "OMP_NUM_THREADS": "1",
    "ASAN_OPTIONS": "detect_leaks=0",  # Python leaks
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",  # torch's OpenMP loops
}


def run(command, **environment):
    """The finished process; its stdout holds stderr, too."""
    environment = os.environ | OPTIONS | environment
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, cwd=ROOT, env=environment, **output)


@dataclass
class Sanitizer:
    flags: str  # of -fsanitize
    library: str
    capabilities: list[str]  # each goes through the tests
    alarms: dict[str, str]  # by defect

    @property
    def folder(self):
        return ROOT / "build" / "sanitizers" / self.flags

    @cached_property
    def runtime(self):
        """The path of the library; without folders if the compiler has none."""
        return run([COMPILER, f"-print-file-name={self.library}"]).stdout.strip()

    def obstacle(self):
        """Why it cannot run on this machine; empty if it can."""
        if not Path(self.runtime).is_file():
            return f"{COMPILER} has no {self.library}: it takes GCC with its sanitizer libraries"
        tried = run([sys.executable, "-c", ""], LD_PRELOAD=self.runtime)
        return f"{self.runtime} does not work here: {tried.stdout.strip()}" if tried.returncode else ""

    def build(self):
        definitions = [f"-DPython_EXECUTABLE={sys.executable}", f"-DNEUMUTER_SANITIZE={self.flags}"]
        for arguments in (
            ["-S", ROOT, "-B", self.folder, "-G", "Ninja", *definitions],
            ["--build", self.folder, "--parallel", os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)],
        ):
            path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))
            done = run(["cmake", *arguments], PATH=path, NEUMUTER_WITH_CUDA="0")
            if done.returncode:
                sys.exit(f"{self.flags} does not build\n{done.stdout}")

    def python(self, capability, *arguments):
        (extension,) = self.folder.glob("_C*.so")
        return run(
            [sys.executable, *arguments],
            LD_PRELOAD=f"{self.runtime} {self.folder / 'libparallel_for.so'}",
            NEUMUTER_INSTRUMENTED=str(extension),
            NEUMUTER_CPU_CAPABILITY=capability,
        )

    def hears(self, defect):
        library = str(self.folder / "libdefects.so")
        code = f"import ctypes, torch; ctypes.CDLL({library!r}).{defect}(ctypes.c_int64(40))"
        done = self.python(SUPPORTED[0], "-c", code)
        heard = done.returncode != 0 and self.alarms[defect] in done.stdout
        print(f"{self.flags}: {defect} raises {'the' if heard else 'NO'} alarm {done.stdout * (not heard)}")
        return heard

    def passes(self, capability):
        done = self.python(capability, *PYTEST)
        passed = done.returncode == 0
        print(f"{self.flags}, {capability}: {done.stdout.splitlines()[-1] if passed else done.stdout}")
        return passed

    def check(self):
        """Whether all is well, or cannot be told here."""
        if obstacle := self.obstacle():
            print(f"{self.flags}: skipped, {obstacle}")
            return True
        self.build()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = [*pool.map(self.hears, self.alarms), *pool.map(self.passes, self.capabilities)]
        return all(results)


SANITIZERS = (
    Sanitizer(
        "address,undefined,float-cast-overflow",
        "libasan.so",
        SUPPORTED,
        {
            "out_of_bounds": "heap-buffer-overflow",
            "outside_the_vector": "Assertion",
            "signed_overflow": "signed integer overflow",
            "misaligned": "misaligned address",
            "float_too_large": "outside the range of representable values",
        },
    ),
    Sanitizer("thread", "libtsan.so", SUPPORTED[-1:], {"race": "data race"}),
)


if __name__ == "__main__":
    with ThreadPoolExecutor() as pool:
        sys.exit(not all(list(pool.map(Sanitizer.check, SANITIZERS))))
