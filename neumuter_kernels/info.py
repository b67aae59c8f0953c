"""``python -m neumuter_kernels``: what is installed, and which backend each op will use."""

import importlib.metadata
import importlib.util
import platform

import torch

from neumuter_kernels import _C


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def backends() -> dict[str, tuple[str, str]]:
    """{op: (what computes it on CPU tensors, what on GPU tensors)}; "none: ..." where nothing does."""
    cuda = bool(_C.build_info()["cuda"])
    cpu = f"C++ ({_C.cpu_capability()})"
    fused = "Triton" if importlib.util.find_spec("triton") else "none: install triton"
    fused_ops = ("masked_ffn", "hard_concrete", "cross_entropy_", "kl_divergence_")
    return {
        **{op: (cpu, fused) for op in fused_ops},
        "select_muted": (cpu, "CUDA C++" if cuda else "C++ on the CPU (built without nvcc)"),
        "mute_": ("C++", "CUDA C++" if cuda else "plain PyTorch (built without nvcc)"),
    }


def report() -> list[tuple[str, str]]:
    """Pairs of (what, value) about the installation, the machine and the backends, as strings."""
    built = _C.build_info()
    return [
        ("neumuter-kernels", version("neumuter-kernels")),
        ("Python", platform.python_version()),
        ("torch", f"{torch.__version__} (built with {built['torch']}, stable ABI of 2.10)"),
        ("triton", version("triton")),
        ("transformers", version("transformers")),
        ("compiler", f"{built['compiler']} ({built['flags']})"),
        ("CPU capability", _C.cpu_capability()),
        ("CUDA of torch", torch.version.cuda or "none"),
        ("CUDA code", f"{built['cuda']} for {built['cuda_architectures']}" if built["cuda"] else "not built"),
        ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
        *((f"op {op}", f"CPU {cpu}; GPU {gpu}") for op, (cpu, gpu) in backends().items()),
    ]


if __name__ == "__main__":
    for what, value in report():
        print(f"{what:18} {value}")
