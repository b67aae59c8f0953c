"""Why the compiled part of the package does not load, and what to do."""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def reason(error: ImportError) -> str:
    """Explain ``error``, which importing ``neumuter_kernels._C`` raised."""
    if any(HERE.glob("_C.*.so")) or not (HERE.parent / "pyproject.toml").exists():
        return (
            f"the compiled part of neumuter-kernels does not load with torch {torch.__version__} (it needs "
            f"2.10 or newer): {error}. Build it for this Python and torch with: pip install "
            "--no-build-isolation --force-reinstall --no-deps neumuter-kernels (or '.' in a checkout)"
        )
    sources = f"{HERE} holds sources that are not compiled"
    homes = [Path(path, HERE.name) for path in sys.path]
    installed = next((home for home in homes if any(home.glob("_C.*.so"))), None)
    if installed is None:
        return f"{sources}. To use them, run in {HERE.parent}: pip install --no-build-isolation --editable ."
    return (
        f"{sources}, and hides the package that is installed in {installed}: Python looks in the current "
        "folder first. Start it in another folder, use the command neumuter, or set PYTHONSAFEPATH=1 (Python "
        "3.11 or newer)"
    )
