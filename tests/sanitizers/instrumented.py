"""pytest plugin: the extension at $NEUMUTER_INSTRUMENTED takes the place of ``neumuter_kernels._C``."""

import os
import sys
from importlib import util

import torch  # noqa: F401 (brings the libraries that the extension needs)

spec = util.spec_from_file_location("neumuter_kernels._C", os.environ["NEUMUTER_INSTRUMENTED"])
module = sys.modules[spec.name] = util.module_from_spec(spec)
spec.loader.exec_module(module)
