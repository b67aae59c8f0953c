"""Copies to a device that the processor does not wait for."""

import torch
from torch import Tensor


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to ``device``; from the CPU without waiting for a GPU."""
    return _pinned(tensor, device).to(device, non_blocking=True)


def overwrite(place: Tensor, tensor: Tensor) -> None:
    """Copy a tensor to where ``place`` is; from the CPU without waiting for a GPU."""
    place.copy_(_pinned(tensor, place.device), non_blocking=True)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    # Only from pinned memory does a GPU copy while the processor goes on.
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
