"""Where tensors are: copies that the processor does not wait for, and parameters in parts or elsewhere."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to ``device``; from the CPU without waiting for a GPU."""
    return _pinned(tensor, device).to(device, non_blocking=True)


def overwrite(place: Tensor, tensor: Tensor) -> None:
    """Copy a tensor to where ``place`` is; from the CPU without waiting for a GPU."""
    place.copy_(_pinned(tensor, place.device), non_blocking=True)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP, tensor parallelism or DeepSpeed's ZeRO-3 has split a parameter of ``module``."""
    return any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in module.parameters())


def is_offloaded(module: nn.Module) -> bool:
    """Whether Accelerate keeps the parameters of ``module`` elsewhere while it does not run."""
    return getattr(getattr(module, "_hf_hook", None), "weights_map", None) is not None


def load_offloaded(module: nn.Module, name: str) -> Tensor:
    """Load a parameter of a module that is offloaded."""
    hook: Any = module._hf_hook
    found: Tensor = hook.weights_map[name]
    return found


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor, or this process's part of it, has a shape and no values."""
    return isinstance(getattr(tensor, "_local_tensor", tensor), FakeTensor)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    # Only from pinned memory does a GPU copy while the processor goes on.
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
