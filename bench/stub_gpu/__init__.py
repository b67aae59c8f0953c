"""GPUs that are not there: CUDA's runtime and driver for torch and Triton on a machine without one.

torch's dispatcher, allocator and autograd, and Triton with its compiler, are the real ones. Memory is the
processor's, and kernels are noted instead of run. So results are rubbish, but it shows what is launched, and
what launching costs the processor, except for the time in the driver itself.
"""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from bench import ROOT

HERE = Path(__file__).parent
BUILT = ROOT / "build/stub-gpu"


def why_not():
    """Why there are no such GPUs in this environment; None: there are, in processes with ``environment``."""
    import torch

    if torch.version.cuda is None or torch.cuda.is_available():
        return "needs a torch for CUDA and no GPU"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, whose folder has the headers of CUDA"
    return None if _compiler() else "needs gcc, or another C compiler in CC"


def environment():
    """The environment of a process that has two of them, after compiling what it needs."""
    BUILT.mkdir(parents=True, exist_ok=True)
    _compile("libstubcudart.so", "runtime.c")
    _compile("libcuda.so.1", "driver.c", "absent.c")
    (BUILT / "libcuda.so").unlink(missing_ok=True)
    (BUILT / "libcuda.so").symlink_to("libcuda.so.1")
    paths = [str(BUILT), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return inherited | {
        "LD_LIBRARY_PATH": os.pathsep.join(paths),
        "LD_PRELOAD": str(BUILT / "libstubcudart.so"),
        "TRITON_LIBCUDA_PATH": str(BUILT),
    }


def _compiler():
    return shutil.which(os.environ.get("CC", "gcc"))


def _compile(library, *sources):
    headers = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/include"
    made = BUILT / f"{library}.{os.getpid()}"
    command = [_compiler(), "-O2", "-shared", "-fPIC", f"-I{headers}", f"-Wl,-soname,{library}"]
    subprocess.run([*command, *(str(HERE / s) for s in sources), "-o", str(made), "-ldl"], check=True)
    made.replace(BUILT / library)
