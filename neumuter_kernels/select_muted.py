"""The selection of the neurons to mute, and its compaction."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neumuter_kernels.reference import logit
from neumuter_kernels.registration import Cuda, register

_select: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.neumuter.select_muted.default


class MutedNeurons(NamedTuple):
    """Selected neurons in compressed-row form.

    indptr: int32 [L + 1]; the neurons of layer l are slots indptr[l] … indptr[l + 1] − 1.
    indices: int32 [capacity]; ascending within a layer; −1 in the slots from indptr[L] on.
    gains: float32 [capacity]; the evaluation gate of each neuron; 1 in the slots from indptr[L] on.
    """

    indptr: Tensor
    indices: Tensor
    gains: Tensor


def select_muted(
    scores: Tensor | Sequence[Tensor],
    budget: int | float | None = None,
    threshold: float | None = None,
    stretch: tuple[float, float] = (-0.1, 1.1),
) -> MutedNeurons:
    """Select the neurons to mute and compact them: exact and stable.

    Nothing waits for a GPU, unless the extension was built without nvcc: then it selects on the CPU.

    Args:
        scores: float32 [L, F], or a sequence of float32 [F_l] for layers of unequal width; on one device.
        budget: how many neurons: an int, or a float in (0, 1] as a share of all (rounded down). The
            lowest scores are taken; ties go to the lower layer, then the lower neuron.
        threshold: instead of a budget, r in (0, 1): all neurons with σ(s) < r.
        stretch: (γ, ζ) with γ < 0 and ζ > 1, of the evaluation gate clamp(σ(s)·(ζ − γ) + γ, 0, 1), which
            becomes the gain.

    Returns:
        MutedNeurons(indptr, indices, gains) on the device of the scores. The capacity is the
        budget (at most L·F), or L·F for a threshold. NaN scores are never selected, so there may be fewer
        neurons than the budget; the true count is indptr[L]. −0.0 equals 0.0.

    Raises:
        TypeError: not exactly one of budget and threshold, or a wrong type.
        ValueError: a wrong shape or value; with NEUMUTER_DEBUG=1 in the environment (which makes
            the call wait for the device) also a NaN among the scores.

    Source: Hou et al., Findings of ACL 2025 (NeuMuter), which mutes by the threshold 0.15.
    """
    if isinstance(scores, torch.Tensor):
        if scores.dim() != 2:
            raise ValueError(f"scores must be [L, F] or a sequence of [F_l], got {tuple(scores.shape)}")
        layers = [scores]
        widths = [scores.shape[1]] * scores.shape[0]
    else:
        layers = list(scores) if isinstance(scores, Iterable) else []
        if not layers or any(not isinstance(x, torch.Tensor) or x.dim() != 1 for x in layers):
            raise ValueError("scores must be [L, F] or a non-empty sequence of tensors [F_l]")
        widths = [layer.numel() for layer in layers]
    for layer in layers:
        if layer.dtype != torch.float32:
            raise TypeError(f"scores must be float32, got {layer.dtype}")
        if layer.device != layers[0].device:
            raise ValueError(f"scores must be on one device, got {layers[0].device} and {layer.device}")
    flat = layers[0].detach().reshape(-1) if len(layers) == 1 else torch.cat([x.detach() for x in layers])
    if not (stretch[0] < 0 and stretch[1] > 1):
        raise ValueError(f"stretch must be (γ, ζ) with γ < 0 and ζ > 1, got {stretch}")
    if os.environ.get("NEUMUTER_DEBUG") == "1" and flat.isnan().any():
        raise ValueError("scores contain NaN")
    if (budget is None) == (threshold is None):
        raise TypeError("select_muted needs exactly one of budget and threshold")
    if budget is not None:
        budget, cut = min(neuron_budget(budget, flat.numel()), flat.numel()), 0.0
    elif isinstance(threshold, float) and 0 < threshold < 1:
        cut = logit(threshold)
    else:
        raise ValueError(f"threshold must be a float in (0, 1), got {threshold!r}")
    return MutedNeurons(*_select(flat, widths, budget, cut, *stretch))


def neuron_budget(budget: int | float, neurons: int) -> int:
    """The number of neurons that a budget means.

    Args:
        budget: a number of neurons (int), or a share of them in (0, 1] (float), which is rounded down.
        neurons: how many there are.

    Returns:
        The number, which may exceed ``neurons`` if ``budget`` is an int.

    Raises:
        TypeError: budget is neither an int nor a float.
        ValueError: budget is negative, or a share outside (0, 1].
    """
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ValueError(f"budget as a share must lie in (0, 1], got {budget}")
        return int(budget * neurons + 1e-9)
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"budget must be an int (a count) or a float (a share), got {budget!r}")
    if budget < 0:
        raise ValueError(f"budget must not be negative, got {budget}")
    return budget


def _fake(
    scores: Tensor, widths: Sequence[int], budget: int | None, threshold: float, gamma: float, zeta: float
) -> tuple[Tensor, Tensor, Tensor]:
    n = scores.shape[0]
    capacity = n if budget is None else min(budget, n)
    return (
        scores.new_empty((len(widths) + 1,), dtype=torch.int32),
        scores.new_empty((capacity,), dtype=torch.int32),
        scores.new_empty((capacity,)),
    )


def _on_the_cpu(scores: Tensor, *options: object) -> tuple[Tensor, ...]:
    """Waits for the device, which the CUDA code does not."""
    return tuple(x.to(scores.device) for x in _select(scores.cpu(), *options))


register("select_muted", fake=_fake, gpu=Cuda(_on_the_cpu, "C++ on the CPU"))
