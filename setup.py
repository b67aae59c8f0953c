"""Builds neumuter_kernels._C with CMake. Sources and flags are in CMakeLists.txt alone."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NEEDED = ("torch", "cmake", "ninja", "pybind11")


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        missing = [m for m in NEEDED if importlib.util.find_spec(m) is None and shutil.which(m) is None]
        if missing:
            sys.exit(
                f"neumuter-kernels builds against the torch that is installed, but {', '.join(missing)} "
                f"cannot be imported here; run: pip install {' '.join(NEEDED)} 'setuptools>=77' && "
                "pip install --no-build-isolation ."
            )
        destination = Path(self.get_ext_fullpath(ext.name)).parent.parent.resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        # cmake and ninja may be there for this Python only, whose environment nobody has activated.
        path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))
        environment = os.environ | {"PATH": path}
        for arguments in (
            configure,
            ["--build", str(build), "--parallel", jobs],
            ["--install", str(build), "--prefix", str(destination)],
        ):
            subprocess.run(["cmake", *arguments], check=True, env=environment)


setup(ext_modules=[Extension("neumuter_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
