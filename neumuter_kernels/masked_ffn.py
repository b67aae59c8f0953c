"""The public functions. Everything that a user can get wrong is checked here, by the checks of ``checks``.

The ops behind them (torch.ops.neumuter) have their schemas in csrc/bindings.cpp, and their backends
in csrc/cpu, csrc/cuda and neumuter_kernels/triton; these check what memory safety needs.

Shapes: ``...`` stands for any leading dimensions with T tokens in all, F is the intermediate size,
G the number of mask rows.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version  # after a change in place: autograd may need the former

from neumuter_kernels.checks import (
    activation_number,
    check_activations,
    check_apart,
    check_int,
    check_logits,
    check_mask,
    check_not_negated,
    describe,
)
from neumuter_kernels.reference import Layout, logit

_ops = torch.ops.neumuter
_masked_ffn: Callable[..., Tensor] = _ops.masked_ffn.default


class MutedNeurons(NamedTuple):
    """Selected neurons in compressed-row form.

    indptr: int32 [L + 1]; the neurons of layer l are slots indptr[l] … indptr[l + 1] − 1.
    indices: int32 [capacity]; ascending within a layer; −1 in the slots from indptr[L] on.
    gains: float32 [capacity]; the evaluation gate of each neuron; 1 in the slots from indptr[L] on.
    """

    indptr: Tensor
    indices: Tensor
    gains: Tensor


def masked_glu(
    gate: Tensor | None = None,
    up: Tensor | None = None,
    mask: Tensor | None = None,
    row_ids: Tensor | None = None,
    activation: str = "silu",
    *,
    gate_up: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """The gated FFN activation times the neuron mask: h[t, f] = φ(gate[t, f]) · up[t, f] · mask[r(t), f].

    One pass forward and one backward, which gives the gradients of gate, up and mask. Only the
    inputs are saved. Computed in float32; φ(gate) is rounded to the input dtype before the
    product, as Hugging Face's eager MLP does, so a mask of ones reproduces eager's rounding.
    Source of masked neurons: Hou et al., Findings of ACL 2025 (NeuMuter).

    Args:
        gate, up: [..., F], float32, bfloat16, float16 (or float64), the same dtype; any row stride.
        mask: [G, F] or [F] (one row), float32 (float64 for float64 activations).
        row_ids: None: the T tokens are G equal consecutive runs, run g under mask row g (so G = 1
            is one mask for all and G = B one row per sample of a [B, S, F] batch). Otherwise
            int32 or int64 with one id in [−1, G) per token; a token with id −1 is unmasked. On the
            CPU other ids raise; on a GPU, where a check would wait for the device, they count as −1.
        activation: "silu", "gelu" (erf), "gelu_tanh", "relu", "relu2" or "identity" (of activations that
            somebody else has computed).
        gate_up: [..., 2F] instead of gate and up: both in one tensor, read without a copy.
        interleaved: gate_up holds gate in its even and up in its odd columns (else in its halves).

    Returns:
        h: [..., F] in the dtype of the input.

    Raises:
        TypeError: a dtype is not one of those above, or an argument is missing.
        ValueError: shapes, devices or the activation do not fit; the message names the argument.
    """
    if (gate_up is None) == (gate is None or up is None):
        raise TypeError("masked_glu needs gate and up, or gate_up alone")
    number = activation_number(activation)
    if gate_up is not None:
        if gate is not None or up is not None:
            raise TypeError("masked_glu needs gate and up, or gate_up alone")
        check_activations("gate_up", gate_up)
        if gate_up.shape[-1] % 2:
            raise ValueError(f"gate_up must have an even last dimension, got shape {tuple(gate_up.shape)}")
        mask = check_mask(mask, gate_up, gate_up.shape[-1] // 2, row_ids)
        layout = Layout.INTERLEAVED if interleaved else Layout.HALVES
        return _masked_ffn(gate_up, None, mask, row_ids, number, layout)
    if interleaved:
        raise TypeError("interleaved describes gate_up; gate and up were given")
    gate = check_activations("gate", gate)
    if not isinstance(up, torch.Tensor):
        raise TypeError(f"up must be a tensor like gate, got {describe(up)}")
    if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
        raise ValueError(f"up must match gate, {describe(gate)}, got {describe(up)}")
    mask = check_mask(mask, gate, gate.shape[-1], row_ids)
    return _masked_ffn(gate, up, mask, row_ids, number, Layout.SEPARATE)


def masked_act(
    hidden: Tensor,
    mask: Tensor,
    row_ids: Tensor | None = None,
    activation: str = "gelu_tanh",
) -> Tensor:
    """The plain FFN activation times the neuron mask: h[t, f] = φ(hidden[t, f]) · mask[r(t), f].

    Args, rounding and errors as for ``masked_glu``; hidden is [..., F].

    Returns:
        h: [..., F] in the dtype of hidden.
    """
    number = activation_number(activation)
    check_activations("hidden", hidden)
    mask = check_mask(mask, hidden, hidden.shape[-1], row_ids)
    return _masked_ffn(hidden, None, mask, row_ids, number, Layout.PLAIN)


def hard_concrete(
    scores: Tensor,
    rows: int,
    seed: int,
    step: int | Tensor,
    layer: int,
    sample_ids: Tensor | None = None,
    temperature: float = 1 / 3,
    stretch: tuple[float, float] = (-0.1, 1.1),
    training: bool = True,
) -> Tensor:
    """Hard-concrete gates of FFN neurons: samples in training, noiseless otherwise.

    Training: z = clamp(σ((logit ν + s)/β)·(ζ − γ) + γ, 0, 1), ν uniform in (1e-4, 1 − 1e-4);
    otherwise z = clamp(σ(s)·(ζ − γ) + γ, 0, 1). Source: Louizos et al. 2018, *Learning Sparse
    Neural Networks through L0 Regularization*, eq. 10–12. The noise is Philox 4x32-10 of (seed,
    step, layer, sample id, neuron) and nothing else: the same bits on every device and for any
    split of a batch. It is computed again in the backward, not stored.

    Args:
        scores: float32 [F] (or float64), the log-odds s.
        rows: the number of gate rows, usually one per sample of the batch.
        seed: int in [0, 2^63). layer: int in [0, 2^32).
        step: int in [0, 2^32), or an int64 tensor of one element on the device of scores, which neither
            torch.compile nor a CUDA graph takes for a constant.
        sample_ids: int64 [rows], the global index of each sample (taken modulo 2^32); None: 0 … rows − 1.
        temperature: β > 0. stretch: (γ, ζ) with γ < 0 and ζ > 1.
        training: whether to add noise; without it all rows are equal.

    Returns:
        z: [rows, F] in the dtype of scores, differentiable with respect to scores.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    if not isinstance(scores, torch.Tensor) or scores.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"scores must be a float32 (or float64) tensor, got {describe(scores)}")
    if scores.dim() != 1:
        raise ValueError(f"scores must have shape [F], got {tuple(scores.shape)}")
    check_int("rows", rows, 2**31)
    check_int("seed", seed, 2**63)
    check_int("layer", layer, 2**32)
    if isinstance(step, torch.Tensor):
        if step.numel() != 1 or step.dtype != torch.int64 or step.device != scores.device:
            raise ValueError(f"step must be an int or one int64 on {scores.device}, got {describe(step)}")
    else:
        check_int("step", step, 2**32)
        step = torch.full((), step, dtype=torch.int64, device=scores.device)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if not (stretch[0] < 0 and stretch[1] > 1):
        raise ValueError(f"stretch must be (γ, ζ) with γ < 0 and ζ > 1, got {stretch}")
    if sample_ids is None:
        sample_ids = torch.arange(rows, device=scores.device)
    elif not isinstance(sample_ids, torch.Tensor) or sample_ids.dtype != torch.int64:
        raise TypeError(f"sample_ids must be an int64 tensor, got {describe(sample_ids)}")
    elif sample_ids.shape != (rows,):
        raise ValueError(f"sample_ids must have shape [{rows}], one per row, got {tuple(sample_ids.shape)}")
    elif sample_ids.is_meta and not scores.is_meta:
        raise ValueError(f"sample_ids must hold values for scores on {scores.device}, got a meta tensor")
    sample_ids = sample_ids.to(scores.device)
    gates: Tensor = _ops.hard_concrete(scores, sample_ids, step, seed, layer, temperature, *stretch, training)
    return gates


def select_muted(
    scores: Tensor | Sequence[Tensor],
    budget: int | float | None = None,
    threshold: float | None = None,
    stretch: tuple[float, float] = (-0.1, 1.1),
) -> MutedNeurons:
    """Select the neurons to mute and compact them: exact, stable, without waiting for the device.

    Args:
        scores: float32 [L, F], or a sequence of float32 [F_l] for layers of unequal width; on one device.
        budget: how many neurons: an int, or a float in (0, 1] as a share of all (rounded down). The
            lowest scores are taken; ties go to the lower layer, then the lower neuron.
        threshold: instead of a budget, r in (0, 1): all neurons with σ(s) < r (Hou et al.: 0.15).
        stretch: (γ, ζ) of the evaluation gate clamp(σ(s)·(ζ − γ) + γ, 0, 1), which becomes the gain.

    Returns:
        MutedNeurons(indptr, indices, gains) on the device of the scores. The capacity is the
        budget (at most L·F), or L·F for a threshold. NaN scores are never selected, so fewer than the
        budget may be; the true count is indptr[L]. −0.0 equals 0.0.

    Raises:
        TypeError: not exactly one of budget and threshold, or a wrong type.
        ValueError: a wrong shape or value; with NEUMUTER_DEBUG=1 in the environment (which makes
            the call wait for the device) also a NaN among the scores.
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
    return MutedNeurons(*_ops.select_muted(flat, widths, budget, cut, *stretch))


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy in nats of each token; its gradients with respect to the logits replace the logits.

    One read and one write of the logits, where log_softmax, gather and their backward make several
    tensors of their size. The chain to the loss is the caller's: multiply row n by the gradient of loss n.

    Args:
        logits: [N, V], contiguous; float32, bfloat16, float16 (or float64). Overwritten by
            softmax(logits) − one-hot(targets), computed in float32 and rounded once.
        targets: int64 [N] in [0, V). On the CPU others raise; on a GPU their loss is NaN.

    Returns:
        losses: [N], float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an argument is not as above, or logits are part of an autograd graph that
            would not see the change.
    """
    check_logits(logits)
    if not isinstance(targets, torch.Tensor) or targets.dtype != torch.int64:
        raise TypeError(f"targets must be an int64 tensor, got {describe(targets)}")
    if targets.shape != logits.shape[:1] or targets.device != logits.device:
        raise ValueError(
            f"targets must be [{logits.shape[0]}] on {logits.device}, one per row of logits, "
            f"got {describe(targets)}"
        )
    check_apart("logits", logits, "targets", targets)
    losses: Tensor = _ops.cross_entropy_(logits, targets)
    increment_version(logits)
    return losses


def kl_divergence_(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_v p·(ln p − ln q) in nats of each token; the gradients q − p replace the logits of q.

    Args:
        logits: of q; as for ``cross_entropy_``.
        reference: the logits of p, like logits; not changed.

    Returns, raises: as ``cross_entropy_``.
    """
    check_logits(logits)
    if not isinstance(reference, torch.Tensor) or reference.dtype != logits.dtype:
        raise TypeError(f"reference must be a {logits.dtype} tensor like logits, got {describe(reference)}")
    if reference.shape != logits.shape or reference.device != logits.device:
        raise ValueError(f"reference must match logits, {describe(logits)}, got {describe(reference)}")
    check_apart("logits", logits, "reference", reference)
    losses: Tensor = _ops.kl_divergence_(logits, reference)
    increment_version(logits)
    return losses


def mute_(
    hidden: Tensor,
    indptr: Tensor,
    indices: Tensor,
    gains: Tensor,
    row_ids: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """Multiply the muted neurons of one layer by their gains, in place; every token with a set of its own.

    Touches nothing but these neurons: of about 1 % muted ones, 1 % of ``hidden``. For serving many mute
    sets in one batch behind anybody's activation. Without gradients.

    Args:
        hidden: [..., F] of T tokens, float32, bfloat16, float16 (or float64), rows of one stride. Products
            are computed in float32 (float64) and rounded once.
        indptr: int32 [S, L + 1], or [L + 1] for S = 1, as ``select_muted`` returns it: the neurons of set s
            in layer l are the slots indptr[s, l] … indptr[s, l + 1] − 1. Sets may lie anywhere and share
            slots.
        indices: int32 [N], neurons in [0, F), each at most once per set and layer.
        gains: float32 [N].
        row_ids: int32 or int64, the set of each token; −1: none. None: the tokens are S equal
            consecutive runs. On the CPU what lies outside raises; in CUDA C++, where a check would wait
            for the device, it is skipped.
        layer: int in [0, L).

    Returns:
        hidden.

    Raises:
        TypeError, ValueError: an argument is not as above, or hidden is part of an autograd graph.
    """
    check_activations("hidden", hidden)
    if torch.is_grad_enabled() and hidden.requires_grad:
        raise ValueError("hidden requires grad, and mute_ has no gradient: use masked_act with 'identity'")
    check_not_negated("hidden", hidden)
    tensors = {
        "indptr": (indptr, torch.int32),
        "indices": (indices, torch.int32),
        "gains": (gains, torch.float32),
    }
    for name, (tensor, dtype) in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype:
            raise TypeError(f"{name} must be a {dtype} tensor, got {describe(tensor)}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} like hidden, got {describe(tensor)}")
    indptr = indptr.unsqueeze(0) if indptr.dim() == 1 else indptr
    if indptr.dim() != 2 or indptr.shape[1] < 2:
        raise ValueError(f"indptr must have shape [S, L + 1] or [L + 1], got {list(indptr.shape)}")
    if indices.dim() != 1 or indices.shape != gains.shape:
        raise ValueError(
            f"indices and gains must both be [N], got {list(indices.shape)} and {list(gains.shape)}"
        )
    check_int("layer", layer, indptr.shape[1] - 1)
    tokens = hidden.shape[:-1].numel()
    if row_ids is not None:
        if not isinstance(row_ids, torch.Tensor) or row_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"row_ids must be an int32 or int64 tensor, got {describe(row_ids)}")
        if row_ids.numel() != tokens or row_ids.device != hidden.device:
            raise ValueError(
                f"row_ids must have one entry for each of {tokens} tokens on {hidden.device}, got "
                f"{describe(row_ids)}"
            )
    elif not len(indptr) or tokens % len(indptr):
        raise ValueError(f"without row_ids the {tokens} tokens must split into {len(indptr)} equal runs")
    _ops.mute_(hidden, indptr, indices, gains, row_ids, layer)
    increment_version(hidden)
    return hidden


def neuron_budget(budget: int | float, neurons: int) -> int:
    """The number of neurons that a budget (an int, or a float share in (0, 1]) means out of ``neurons``.

    Raises TypeError for another type and ValueError for a number out of range.
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
