"""What every op means, in plain PyTorch, for any device and any autograd mode.

These functions are the specification: each backend is tested against them. Below, T is the number
of tokens (the product of the leading dimensions of the activations), F the intermediate size and G
the number of mask rows.
"""

import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# An op names an activation by its place here.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")


class Layout(IntEnum):
    """How the gate and up activations of an FFN lie in memory, [..., F] each."""

    PLAIN = 0  # there is no up: a plain FFN
    SEPARATE = 1  # two tensors
    HALVES = 2  # one tensor [..., 2F]: gate in its first half, up in its second
    INTERLEAVED = 3  # one tensor [..., 2F]: gate in its even columns, up in its odd ones

    @property
    def packed(self) -> bool:
        """Whether gate and up share a tensor."""
        return self in (Layout.HALVES, Layout.INTERLEAVED)


def activate(x: Tensor, activation: str) -> Tensor:
    """φ(x), rounded to the dtype of ``x`` as an eager PyTorch module rounds it."""
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "relu":
        return F.relu(x)
    if activation == "relu2":
        return F.relu(x).square()
    if activation == "identity":
        return x
    raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 (so that gradcheck can be exact), float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expand_mask(mask: Tensor, row_ids: Tensor | None, tokens: int) -> Tensor:
    """The mask of each token, [tokens, F].

    ``row_ids`` None: token t uses row t // (tokens / G). Otherwise token t uses row row_ids[t],
    and a token with id -1 is unmasked.
    """
    if row_ids is None:
        return mask.repeat_interleave(tokens // mask.shape[0], dim=0, output_size=tokens)
    ids = row_ids.reshape(-1).long()
    return torch.where((ids < 0)[:, None], 1.0, mask[ids.clamp(min=0)])


def masked_act(
    hidden: Tensor, mask: Tensor, row_ids: Tensor | None = None, activation: str = "gelu_tanh"
) -> Tensor:
    """h[t, f] = φ(a[t, f]) · m[r(t), f], the activation rounded to the input dtype first."""
    rows = expand_mask(mask, row_ids, hidden.numel() // max(hidden.shape[-1], 1)).view(hidden.shape)
    wide = compute_dtype(hidden.dtype)
    return (activate(hidden, activation).to(wide) * rows.to(wide)).to(hidden.dtype)


def masked_glu(
    gate: Tensor, up: Tensor, mask: Tensor, row_ids: Tensor | None = None, activation: str = "silu"
) -> Tensor:
    """h[t, f] = φ(g[t, f]) · u[t, f] · m[r(t), f], φ(g) rounded to the input dtype first.

    That is the rounding order of Hugging Face's eager MLP, and autograd through this function
    rounds the gradients where eager does.
    """
    rows = expand_mask(mask, row_ids, gate.numel() // max(gate.shape[-1], 1)).view(gate.shape)
    wide = compute_dtype(gate.dtype)
    product = activate(gate, activation).to(wide) * up.to(wide)
    return (product * rows.to(wide)).to(gate.dtype)


def unpack(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of gate and up, [..., F] each, in a packed [..., 2F] tensor."""
    if interleaved:
        return gate_up[..., 0::2], gate_up[..., 1::2]
    gate, up = gate_up.chunk(2, dim=-1)
    return gate, up


def masked_glu_packed(
    gate_up: Tensor,
    mask: Tensor,
    row_ids: Tensor | None = None,
    activation: str = "silu",
    interleaved: bool = False,
) -> Tensor:
    """``masked_glu`` of the two halves (or the even and odd columns) of ``gate_up``."""
    return masked_glu(*unpack(gate_up, interleaved), mask, row_ids, activation)


# --- Hard-concrete gates ---------------------------------------------------------------------
# Every step below is one IEEE operation on float32, in a fixed order and never fused, so that the
# CPU, CUDA and Triton kernels can return the same bits as this code does.

LOG2_E, LN2_HI, LN2_LO = 1.44269504, 0.693359375, -2.12194440e-4
ROUND_TO_INTEGER = 12582912.0  # 1.5 · 2^23: adding and subtracting it rounds to an integer
# exp(r) ≈ 1 + r + r²·Q(r) on |r| ≤ 0.35 and log(1+t) ≈ t − t²/2 + t³·P(t) on √½ ≤ 1+t ≤ √2:
# weighted minimax fits of ours, relative error below 1e-9 before rounding.
EXP_Q = (0.00019919360056519508, 0.0013947212137281895, 0.008333262987434864,
         0.04166625440120697, 0.1666666716337204, 0.5)  # fmt: skip
LOG_P = (0.06915368139743805, -0.11789807677268982, 0.11872976273298264, -0.1238434836268425,
         0.14218658208847046, -0.16669251024723053, 0.20002226531505585, -0.24999986588954926,
         0.3333331048488617)  # fmt: skip
NOISE_MARGIN = 1e-4


def _horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    result = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        result = result * x + c
    return result


def exact_exp(x: Tensor) -> Tensor:
    """exp of float32 ``x`` clamped to ±87, within 2 ulp, the same bits on every backend."""
    x = x.clamp(-87.0, 87.0)
    n = (x * LOG2_E + ROUND_TO_INTEGER) - ROUND_TO_INTEGER
    r = (x - n * LN2_HI) - n * LN2_LO
    y = ((r * r) * _horner(r, EXP_Q) + r) + 1.0
    return y * ((n.to(torch.int32) + 127) << 23).view(torch.float32)


def exact_log(x: Tensor) -> Tensor:
    """log of a normal positive float32 ``x``, within 2 ulp, the same bits on every backend."""
    bits = x.contiguous().view(torch.int32)
    e = (bits - 0x3F3504F3) >> 23  # 0x3F3504F3 is √½
    t = (bits - (e << 23)).view(torch.float32) - 1.0
    e = e.to(torch.float32)
    z = t * t
    y = (t * z) * _horner(t, LOG_P)
    y = (y + e * LN2_LO) - 0.5 * z
    return (t + y) + e * LN2_HI


def _log(x: Tensor) -> Tensor:
    return exact_log(x) if x.dtype == torch.float32 else torch.log(x)


def _sigmoid(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + (exact_exp(-x) if x.dtype == torch.float32 else torch.exp(-x)))


def philox_4x32(
    counter: Sequence[Tensor | int], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 (Salmon et al. 2011, Random123).

    ``counter``: four int64 tensors (or ints) of 32-bit words, broadcast together; ``key``: two
    ints. Returns four int64 tensors of 32-bit words.
    """
    low = 0xFFFFFFFF
    device = next((c.device for c in counter if isinstance(c, torch.Tensor)), None)
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, device=device) for c in counter))
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps; the 64 product bits stay right
        c0, c1, c2, c3 = (((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low)
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def gate_noise(
    sample_ids: Tensor,
    neurons: int,
    seed: int,
    step: int | Tensor,
    layer: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """logit(ν) for ν uniform in (1e-4, 1 − 1e-4), [samples, neurons].

    Word f mod 4 of Philox at the counter (f div 4, sample id, layer, step) under the key ``seed``
    gives 23 bits for neuron f; ``step`` may be an int64 tensor. The noise depends on nothing else,
    so neither on the device nor on how a batch is split.
    """
    low = 0xFFFFFFFF
    block = torch.arange((neurons + 3) // 4, device=sample_ids.device)
    counter = (block[None, :], sample_ids.long()[:, None] & low, layer & low, step & low)
    words = torch.stack(philox_4x32(counter, (seed & low, (seed >> 32) & low)), dim=-1)
    words = words.flatten(1)[:, :neurons]
    uniform = ((words >> 9).to(dtype) + 0.5) * 2.0**-23
    width = 1.0 - 2 * NOISE_MARGIN
    nu = uniform * width + NOISE_MARGIN
    # 1 − uniform is exact where 1 − ν would lose bits.
    return _log(nu) - _log((1.0 - uniform) * width + NOISE_MARGIN)


def stretch_span(stretch: tuple[float, float], dtype: torch.dtype) -> float:
    """ζ − γ, subtracted in the dtype of the scores."""
    low, high = torch.tensor(stretch, dtype=dtype)
    return float(high - low)


def _stretched(
    scores: Tensor,
    sample_ids: Tensor,
    seed: int,
    step: int | Tensor,
    layer: int,
    temperature: float,
    stretch: tuple[float, float],
    training: bool,
) -> tuple[Tensor, Tensor]:
    """σ and the unclamped gate, [rows, F]."""
    x = scores.expand(len(sample_ids), -1)
    if training:
        noise = gate_noise(sample_ids, scores.shape[0], seed, step, layer, scores.dtype)
        x = (noise + x) * (1.0 / temperature)
    sigma = _sigmoid(x)
    return sigma, sigma * stretch_span(stretch, scores.dtype) + stretch[0]


def hard_concrete(
    scores: Tensor,
    sample_ids: Tensor,
    seed: int,
    step: int | Tensor,
    layer: int,
    temperature: float = 1 / 3,
    stretch: tuple[float, float] = (-0.1, 1.1),
    training: bool = True,
) -> Tensor:
    """Hard-concrete gates (Louizos et al. 2018, eq. 10–12), [rows, F], one row per sample id.

    Training: z = clamp(σ((logit ν + s)/β)·(ζ − γ) + γ, 0, 1); otherwise z = clamp(σ(s)·(ζ − γ) +
    γ, 0, 1) in every row. Scores [L, F] are those of ``layer``, ``layer`` + 1 and so on, and give
    [L, rows, F]. Has no autograd; see ``hard_concrete_backward``.
    """
    if scores.dim() == 2:
        options = (seed, step, layer, temperature, stretch, training)
        return _each_layer(hard_concrete, (scores,), sample_ids, options)
    _, raw = _stretched(scores, sample_ids, seed, step, layer, temperature, stretch, training)
    return raw.clamp(0.0, 1.0)


def hard_concrete_backward(
    grad: Tensor,
    scores: Tensor,
    sample_ids: Tensor,
    seed: int,
    step: int | Tensor,
    layer: int,
    temperature: float = 1 / 3,
    stretch: tuple[float, float] = (-0.1, 1.1),
    training: bool = True,
) -> Tensor:
    """The gradient of the scores, [F], for ``grad`` [rows, F]: the sum over the rows; or of [L, F]."""
    if scores.dim() == 2:
        options = (seed, step, layer, temperature, stretch, training)
        return _each_layer(hard_concrete_backward, (grad, scores), sample_ids, options)
    sigma, raw = _stretched(scores, sample_ids, seed, step, layer, temperature, stretch, training)
    scale = stretch_span(stretch, scores.dtype) * (1.0 / temperature if training else 1.0)
    slope = (sigma * (1.0 - sigma)) * scale
    return torch.where((raw > 0) & (raw < 1), grad * slope, 0.0).sum(0)


def _each_layer(
    function: Callable[..., Tensor], tensors: tuple[Tensor, ...], sample_ids: Tensor, options: tuple[Any, ...]
) -> Tensor:
    """``function`` of each layer of ``tensors`` [L, …], stacked."""
    seed, step, layer, *others = options
    found = [
        function(*parts, sample_ids, seed, step, layer + number, *others)
        for number, parts in enumerate(zip(*tensors, strict=True))
    ]
    return torch.stack(found) if found else torch.empty_like(tensors[-1])


# --- Losses of tokens ------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """−ln softmax(logits)[target] in nats of each token, [N], and its gradient softmax − one-hot, [N, V]."""
    log_q = logits.to(compute_dtype(logits.dtype)).log_softmax(-1)
    losses = -log_q.gather(1, targets[:, None])[:, 0]
    return losses, (log_q.exp() - F.one_hot(targets, logits.shape[1])).to(logits.dtype)


def kl_divergence(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_v p·(ln p − ln q) in nats of each token, [N], and its gradient q − p over the logits of q, [N, V].

    q and p are the softmax of ``logits`` and ``reference``, [N, V]; where p is 0 nothing is added.
    """
    log_q, log_p = (x.to(compute_dtype(x.dtype)).log_softmax(-1) for x in (logits, reference))
    p = log_p.exp()
    losses = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)
    return losses, (log_q.exp() - p).to(logits.dtype)


# --- Selection -------------------------------------------------------------------------------


def select_muted(
    scores: Tensor,
    widths: Sequence[int],
    budget: int | None = None,
    threshold: float = 0.0,
    stretch: tuple[float, float] = (-0.1, 1.1),
) -> tuple[Tensor, Tensor, Tensor]:
    """Select neurons to mute among flat ``scores`` [N] of layers of the given ``widths``.

    ``budget`` k: the k lowest scores, ties by lower layer, then lower neuron. ``threshold``: all
    scores s < threshold (a score, not a probability). NaN is never selected; −0 equals +0.
    Returns ``indptr`` int32 [L + 1], ``indices`` int32 [capacity] and ``gains`` float32
    [capacity]; the capacity is k, or N for a threshold, and slots past indptr[-1] hold index −1
    and gain 1. The gain of a selected neuron is its evaluation gate.
    """
    n = scores.numel()
    capacity = n if budget is None else min(budget, n)
    if budget is None:
        chosen = scores < threshold
    else:
        order = torch.sort(scores, stable=True).indices[:capacity]  # NaN sorts last
        chosen = torch.zeros(n, dtype=torch.bool, device=scores.device)
        chosen[order] = True
        chosen &= ~scores.isnan()
    flat = chosen.nonzero().flatten()
    ends = torch.tensor(widths, device=scores.device).cumsum(0)
    counts = torch.searchsorted(flat, ends) if len(widths) else ends
    indptr = torch.cat([counts.new_zeros(1), counts]).to(torch.int32)
    layer = torch.searchsorted(ends, flat, right=True)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]]) if len(widths) else ends
    indices = torch.full((capacity,), -1, dtype=torch.int32, device=scores.device)
    gains = torch.ones(capacity, dtype=torch.float32, device=scores.device)
    indices[: len(flat)] = (flat - starts[layer]).to(torch.int32)
    sigma = _sigmoid(scores[flat])
    gains[: len(flat)] = (sigma * stretch_span(stretch, scores.dtype) + stretch[0]).clamp(0.0, 1.0)
    return indptr, indices, gains


def mute(
    hidden: Tensor,
    indptr: Tensor,
    indices: Tensor,
    gains: Tensor,
    row_ids: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """``hidden`` [T, F] with the muted neurons of each token's set multiplied by their gains.

    The other arguments are those of the public ``mute_``, and indptr is [S, L + 1].
    """
    hidden = hidden.clone()
    tokens, sets = len(hidden), len(indptr)
    if row_ids is None:
        row_ids = torch.arange(tokens) // max(tokens // sets, 1)
    wide = compute_dtype(hidden.dtype)
    for t, row in enumerate(row_ids.flatten().tolist()):
        if row >= 0:
            slots = slice(int(indptr[row, layer]), int(indptr[row, layer + 1]))
            neurons = indices[slots].long()
            hidden[t, neurons] = (hidden[t, neurons].to(wide) * gains[slots].to(wide)).to(hidden.dtype)
    return hidden


def logit(probability: float) -> float:
    """ln(p / (1 − p)) of a float."""
    return math.log(probability / (1.0 - probability))
