"""``python -m neumuter_kernels``: what is installed, and which backend each op will use."""

import importlib.metadata
import importlib.util
import platform

import torch

from neumuter_kernels import _C


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> list[tuple[str, str]]:
    """Pairs of (what, value) about the installation, the machine and the backends, as strings."""
    built = _C.build_info()
    cuda_code = f"{built['cuda']} for {built['cuda_architectures']}" if built["cuda"] else "not built"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    has_triton = importlib.util.find_spec("triton") is not None
    fused = "Triton" if has_triton else "none: install triton"
    selection = "CUDA C++" if built["cuda"] else "C++ on the CPU (built without nvcc)"
    cpu = f"C++ ({_C.cpu_capability()})"
    fused_ops = ("masked_glu", "masked_act", "hard_concrete", "cross_entropy_", "kl_divergence_")
    backends = [(op, f"CPU {cpu}; GPU {fused}") for op in fused_ops]
    backends.append(("select_muted", f"CPU {cpu}; GPU {selection}"))
    backends.append(
        ("mute_", f"CPU C++; GPU {'CUDA C++' if built['cuda'] else 'plain PyTorch (built without nvcc)'}")
    )
    return [
        ("neumuter-kernels", _version("neumuter-kernels")),
        ("Python", platform.python_version()),
        ("torch", f"{torch.__version__} (built with {built['torch']}, stable ABI of 2.10)"),
        ("triton", _version("triton")),
        ("transformers", _version("transformers")),
        ("compiler", f"{built['compiler']} ({built['flags']})"),
        ("CPU capability", _C.cpu_capability()),
        ("CUDA of torch", torch.version.cuda or "none"),
        ("CUDA code", cuda_code),
        ("GPU", gpu),
        *((f"op {op}", backend) for op, backend in backends),
    ]


if __name__ == "__main__":
    for what, value in report():
        print(f"{what:18} {value}")
