"""Builds neumuter_kernels._C with CMake. Sources and flags are in CMakeLists.txt alone."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NEEDED = ("torch", "cmake", "ninja", "pybind11")
SETUPTOOLS = 77  # reads the licence field of pyproject.toml
HELP = """
With --no-build-isolation, neumuter-kernels is built with what is installed, and this is missing: {missing}.
Run:

    pip install {needed} 'setuptools>={setuptools}'
    pip install --no-build-isolation .
"""


def refuse_missing():
    """Stop before pip downloads what the package depends on, and before setuptools reads pyproject.toml."""
    # cmake and ninja may be packages of Python or programs of the system.
    missing = [name for name in NEEDED if not (importlib.util.find_spec(name) or shutil.which(name))]
    if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS:
        missing.append(f"setuptools {SETUPTOOLS} or newer (found {setuptools.__version__})")
    if missing:
        sys.exit(HELP.format(missing=", ".join(missing), needed=" ".join(NEEDED), setuptools=SETUPTOOLS))


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        build = Path(self.build_temp).resolve() / "cmake"
        prefix = Path(self.get_ext_fullpath(ext.name)).parent.parent.resolve()
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        self.cmake("-S", ROOT, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}")
        self.cmake("--build", build, "--parallel", jobs)
        self.cmake("--install", build, "--prefix", prefix)

    def cmake(self, *arguments):
        # The programs of this Python's environment are not on the PATH if nobody has activated it.
        path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))
        subprocess.run(["cmake", *map(str, arguments)], check=True, env=os.environ | {"PATH": path})


refuse_missing()
setup(ext_modules=[Extension("neumuter_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
