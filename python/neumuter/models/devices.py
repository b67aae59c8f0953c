"""Copies to a device that the processor does not wait for."""

import torch
from torch import Tensor


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to ``device``; from the CPU without waiting for a GPU."""
    # Only from pinned memory does a GPU copy while the processor goes on.
    source = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return source.to(device, non_blocking=True)
