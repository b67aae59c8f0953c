"""The ops without the compiled extension: its schemas alone, so that the Triton kernels run on a GPU.

A machine without a C++ compiler or pybind11 can then still check and measure them. There is nothing for CPU
tensors, and the ops in LEFT_OUT are missing.
"""

import importlib.machinery
import re
import sys
import types

import torch

from bench import ROOT

LEFT_OUT = ("select_muted", "mute_")  # select_muted is C++ everywhere, and the check of mute_ calls it
_libraries = []  # a library's definitions go with it


def is_built():
    """Whether the extension is there for this Python."""
    folder = ROOT / "neumuter_kernels"
    return any((folder / f"_C{suffix}").exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES)


def schemas():
    """The schemas in csrc/bindings.cpp."""
    text = (ROOT / "csrc/bindings.cpp").read_text()
    calls = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', text)
    return ["".join(re.findall(r'"([^"]*)"', call)) for call in calls]


def define():
    """Takes the place of neumuter_kernels._C in this process; to be called before the package is imported."""
    library = torch.library.Library("neumuter", "DEF")
    for schema in schemas():
        library.define(schema)
    _libraries.append(library)
    module = types.ModuleType("neumuter_kernels._C")
    nothing = {"cuda": "", "cuda_architectures": "", "compiler": "none", "flags": "not built"}
    module.build_info = lambda: {"torch": torch.__version__, **nothing}
    module.cpu_capability = lambda: "not built"
    module.why_no_driver = lambda: "the extension is not built"
    sys.modules["neumuter_kernels._C"] = module
