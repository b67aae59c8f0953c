"""What is installed, and which backend each op uses."""

import importlib.metadata
import importlib.util
import platform

import torch

import neumuter_kernels
from neumuter_kernels import _C
from neumuter_kernels.recording import why_not
from neumuter_kernels.registration import OPS, Triton


def version(package: str) -> str:
    """The version of an installed distribution, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def backends() -> dict[str, tuple[str, str]]:
    """What computes each op (backward ops go with theirs) on CPU tensors and on GPU tensors.

    Returns:
        {op: (on the CPU, on a GPU)}; "none: ..." where nothing does.
    """
    with_triton = importlib.util.find_spec("triton") is not None
    with_cuda = bool(_C.build_info()["cuda"])
    found = {}
    for name, op in OPS.items():
        if name.endswith("_backward"):
            continue
        if isinstance(op.gpu, Triton):
            gpu = "Triton" if with_triton else "none: install triton"
        else:
            gpu = "CUDA C++" if with_cuda else f"{op.gpu.fallback_name} (built without nvcc)"
        found[name] = (f"C++ ({_C.cpu_capability()})" if op.vectorised else "C++", gpu)
    return found


def report() -> list[tuple[str, str]]:
    """Pairs of (what, value) about the installation, the machine and the backends, as strings."""
    built = _C.build_info()
    return [
        ("neumuter-kernels", neumuter_kernels.__version__),
        ("Python", platform.python_version()),
        ("torch", f"{torch.__version__} (built with {built['torch']}, stable ABI of 2.10)"),
        ("triton", version("triton")),
        ("transformers", version("transformers")),
        ("compiler", f"{built['compiler']} ({built['flags']})"),
        ("CPU capability", _C.cpu_capability()),
        ("CUDA of torch", torch.version.cuda or "none"),
        ("CUDA code", f"{built['cuda']} for {built['cuda_architectures']}" if built["cuda"] else "not built"),
        ("launches by C++", f"no: {reason}" if (reason := why_not()) else "masked_glu, masked_act"),
        ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
        *((f"op {op}", f"CPU {cpu}; GPU {gpu}") for op, (cpu, gpu) in backends().items()),
    ]
