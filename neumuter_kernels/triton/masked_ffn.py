"""masked_ffn and its backward in Triton.

Forward: one program per token and column block. Backward: one program per chunk of tokens and
column block; it keeps its block's mask gradient in registers while it walks the chunk's tokens,
writes one partial sum, and a second kernel adds up the partial sums of each mask row. No atomics,
so every run gives the same bits on GPUs with the same number of multiprocessors, on which chunks depend.

Shapes: T tokens, F the intermediate size, G mask rows.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from neumuter_kernels.reference import Layout
from neumuter_kernels.triton.activations import activation

# Columns per program: 128 threads with 8 elements each.
BLOCK_F = 1024
# Backward programs that a multiprocessor has room for.
RESIDENT = 8
# The least number of tokens that a backward program walks.
MIN_TOKENS_PER_CHUNK = 4
# Partial sums and columns that a program adds up at a time.
SUMMED = 32, 64

# What of a ``Layout`` the kernels are compiled for: SPLIT are two tensors as well as two halves of one,
# which are two pointers either way.
PLAIN, SPLIT, INTERLEAVED = 0, 1, 2
COMPILED_FOR = {
    Layout.PLAIN: PLAIN,
    Layout.SEPARATE: SPLIT,
    Layout.HALVES: SPLIT,
    Layout.INTERLEAVED: INTERLEAVED,
}


@triton.jit
def load_gate_up(p_gate, p_up, first_f, F, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    """One token's gate and up from column first_f on, in the dtype of the memory (PLAIN: gate twice)."""
    f = first_f + tl.arange(0, BLOCK)
    if LAYOUT == 2:
        both = 2 * first_f + tl.arange(0, 2 * BLOCK)
        b_gate, b_up = tl.split(tl.reshape(tl.load(p_gate + both, mask=both < 2 * F, other=0.0), (BLOCK, 2)))
    else:
        b_gate = tl.load(p_gate + f, mask=f < F, other=0.0)
        b_up = b_gate
        if LAYOUT == 1:
            b_up = tl.load(p_up + f, mask=f < F, other=0.0)
    return b_gate, b_up


@triton.jit
def masked_ffn_forward_kernel(
    gate, up, mask, row_ids, out,
    F, G, tokens_per_mask, stride_gate, stride_up, stride_mask,
    ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr, HAS_IDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(F, BLOCK)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    first_f = (tl.program_id(0) % blocks) * BLOCK
    f = first_f + tl.arange(0, BLOCK)
    valid = f < F
    dtype: tl.constexpr = gate.dtype.element_ty
    wide: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    accurate: tl.constexpr = dtype == tl.float32

    masked = valid
    row = t // tokens_per_mask
    if HAS_IDS:
        row = tl.load(row_ids + t).to(tl.int64)
        masked = valid & (row >= 0) & (row < G)
    b_mask = tl.load(mask + row * stride_mask + f, mask=masked, other=1.0)
    b_gate, b_up = load_gate_up(gate + t * stride_gate, up + t * stride_up, first_f, F, LAYOUT, BLOCK)
    value, _ = activation(b_gate.to(wide), ACTIVATION, accurate)
    h = value.to(dtype).to(wide)  # rounded where eager rounds
    if LAYOUT != 0:
        h = h * b_up.to(wide)
    tl.store(out + t * F + f, (h * b_mask).to(dtype), mask=valid)


@triton.jit(do_not_specialize=("tokens_per_mask", "tokens_per_chunk", "chunks_per_mask"))
def masked_ffn_backward_kernel(
    grad, gate, up, mask, order, chunk_rows, chunk_starts, chunk_ends, grad_gate, grad_up, partial,
    F, G, tokens_per_mask, tokens_per_chunk, chunks_per_mask,
    stride_grad, stride_gate, stride_up, stride_mask, stride_grad_input,
    ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr, RAGGED: tl.constexpr,
    INPUT_GRAD: tl.constexpr, MASK_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(F, BLOCK)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    first_f = (tl.program_id(0) % blocks) * BLOCK
    f = first_f + tl.arange(0, BLOCK)
    valid = f < F
    dtype: tl.constexpr = gate.dtype.element_ty
    wide: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    accurate: tl.constexpr = dtype == tl.float32

    masked = valid
    if RAGGED:
        row = tl.load(chunk_rows + chunk).to(tl.int64)
        first = tl.load(chunk_starts + chunk).to(tl.int64)
        last = tl.load(chunk_ends + chunk).to(tl.int64)
        masked = valid & (row < G)  # row G: the unmasked tokens
    else:
        row = chunk // chunks_per_mask
        first = row * tokens_per_mask + (chunk % chunks_per_mask) * tokens_per_chunk
        last = tl.minimum(first + tokens_per_chunk, (row + 1) * tokens_per_mask)
    b_mask = tl.load(mask + row * stride_mask + f, mask=masked, other=1.0)
    sums = tl.zeros((BLOCK,), dtype=wide)
    for i in range(first, last):
        t = i
        if RAGGED:
            t = tl.load(order + i).to(tl.int64)
        b_grad = tl.load(grad + t * stride_grad + f, mask=valid, other=0.0).to(wide)
        b_gate, b_up = load_gate_up(gate + t * stride_gate, up + t * stride_up, first_f, F, LAYOUT, BLOCK)
        value, slope = activation(b_gate.to(wide), ACTIVATION, accurate)
        value = value.to(dtype).to(wide)
        b_up = b_up.to(wide)
        if MASK_GRAD:
            if LAYOUT == 0:
                sums += b_grad * value
            else:
                sums += b_grad * (value * b_up)
        if INPUT_GRAD:
            inner = b_grad * b_mask
            d_up = (inner * value).to(dtype)
            if LAYOUT != 0:
                inner = inner * b_up
            d_gate = (inner.to(dtype).to(wide) * slope).to(dtype)
            if LAYOUT == 2:
                both = 2 * first_f + tl.arange(0, 2 * BLOCK)
                d_both = tl.reshape(tl.join(d_gate, d_up), (2 * BLOCK,))
                tl.store(grad_gate + t * stride_grad_input + both, d_both, mask=both < 2 * F)
            else:
                tl.store(grad_gate + t * stride_grad_input + f, d_gate, mask=valid)
                if LAYOUT == 1:
                    tl.store(grad_up + t * stride_grad_input + f, d_up, mask=valid)
    if MASK_GRAD:
        tl.store(partial + chunk * F + f, sums, mask=valid)


@triton.jit(do_not_specialize=("chunks_per_mask",))
def sum_partials_kernel(partial, first_chunks, grad_mask, F, chunks_per_mask,
                        RAGGED: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(F, BLOCK)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    f = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    if RAGGED:
        first = tl.load(first_chunks + g).to(tl.int64)
        last = tl.load(first_chunks + g + 1).to(tl.int64)
    else:
        first = g * chunks_per_mask
        last = first + chunks_per_mask
    sums = tl.zeros((CHUNKS, BLOCK), dtype=partial.dtype.element_ty)
    for start in range(first, last, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        valid = (chunk < last)[:, None] & (f < F)[None, :]
        sums += tl.load(partial + chunk[:, None] * F + f[None, :], mask=valid, other=0.0)
    tl.store(grad_mask + g * F + f, tl.sum(sums, axis=0), mask=f < F)


def _ceil(x: int, y: int) -> int:
    """x / y rounded up. triton.cdiv takes longer."""
    return -(-x // y)


def _rows(x: Tensor) -> Tensor:
    """``x`` [..., columns] as [rows, columns] of one row stride with adjacent columns."""
    x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def tokens_per_chunk(tokens: int, G: int, blocks: int, multiprocessors: int) -> int:
    """The length of a chunk with which all programs fit on the GPU at once (with row ids, nearly all)."""
    G = max(G, 1)
    chunks = max(RESIDENT * multiprocessors // (G * blocks), 1)  # of the tokens of a mask row
    return max(_ceil(tokens, G * chunks), MIN_TOKENS_PER_CHUNK)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass
class _Input:
    """Gate, up (or what stands in for it) and mask as rows, and how they lie."""

    gate: torch.Tensor
    up: torch.Tensor
    mask: torch.Tensor
    row_ids: torch.Tensor | None
    layout: Layout
    F: int

    @classmethod
    def of(
        cls, gate: Tensor, up: Tensor | None, mask: Tensor, row_ids: Tensor | None, layout: Layout
    ) -> "_Input":
        gate = _rows(gate)
        F = gate.shape[1] // 2 if layout.packed else gate.shape[1]
        if up is not None:
            up = _rows(up)
        elif layout == Layout.PLAIN:
            up = gate
        else:
            up = gate[:, 1 if layout == Layout.INTERLEAVED else F :]
        if row_ids is not None:
            row_ids = row_ids.reshape(-1).contiguous()
        return cls(gate, up, _rows(mask), row_ids, layout, F)

    @property
    def tokens(self) -> int:
        return self.gate.shape[0]

    @property
    def block(self) -> int:
        return min(BLOCK_F, 1 << (self.F - 1).bit_length())

    @property
    def blocks(self) -> int:
        return _ceil(self.F, self.block)

    @property
    def tokens_per_mask(self) -> int:
        return max(self.tokens // max(self.mask.shape[0], 1), 1)


def forward(
    gate: Tensor, up: Tensor | None, mask: Tensor, row_ids: Tensor | None, activation: int, layout: int
) -> Tensor:
    """h [..., F] of gate [..., F] (or packed [..., 2F]), up (None unless SEPARATE) and mask [G, F]."""
    x = _Input.of(gate, up, mask, row_ids, Layout(layout))
    out = torch.empty((*gate.shape[:-1], x.F), dtype=gate.dtype, device=gate.device)
    if out.numel() == 0:
        return out
    masked_ffn_forward_kernel[(x.tokens * x.blocks,)](
        x.gate, x.up, x.mask, x.row_ids, out,
        x.F, x.mask.shape[0], x.tokens_per_mask, x.gate.stride(0), x.up.stride(0), x.mask.stride(0),
        ACTIVATION=activation, LAYOUT=COMPILED_FOR[x.layout], HAS_IDS=row_ids is not None, BLOCK=x.block,
    )  # fmt: skip
    return out


def _ragged_chunks(row_ids: Tensor, G: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tokens sorted by mask row, cut into chunks of one row of that length; nothing waits for the device.

    Returns order [T], and of each chunk its row (G: unmasked, G + 1: no tokens), first and last
    position in the order, and the first chunk of each row [G + 2].
    """
    T, device = row_ids.numel(), row_ids.device
    rows = torch.where((row_ids >= 0) & (row_ids < G), row_ids, G).long()
    rows, order = rows.sort(stable=True)
    starts = torch.searchsorted(rows, torch.arange(G + 2, device=device))
    chunks = (starts.diff() + length - 1) // length
    first_chunks = torch.cat([chunks.new_zeros(1), chunks.cumsum(0)])
    index = torch.arange(_ceil(T, length) + G + 1, device=device)
    chunk_rows = torch.searchsorted(first_chunks[1:], index, right=True)
    row = chunk_rows.clamp(max=G)
    chunk_starts = starts[row] + (index - first_chunks[row]) * length
    chunk_ends = torch.minimum(chunk_starts + length, starts[row + 1])
    return order, chunk_rows, chunk_starts, chunk_ends, first_chunks


def backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    mask: Tensor,
    row_ids: Tensor | None,
    activation: int,
    layout: int,
    input_grad: bool,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate, up and mask; those that are not wanted, and that of a missing up, are empty."""
    x = _Input.of(gate, up, mask, row_ids, Layout(layout))
    G, F = x.mask.shape[0], x.F
    grad = _rows(grad)
    grad_gate = gate.new_empty(gate.shape if input_grad else 0)
    grad_up = gate.new_empty(gate.shape if input_grad and up is not None else 0)
    grad_mask = mask.new_empty(mask.shape if mask_grad else 0)
    if x.tokens == 0 or F == 0:
        return grad_gate, grad_up, grad_mask.zero_()

    length = tokens_per_chunk(x.tokens, G, x.blocks, _multiprocessors(gate.device))
    chunks_per_mask = _ceil(x.tokens_per_mask, length)
    ragged = None if x.row_ids is None else _ragged_chunks(x.row_ids, G, length)
    order, chunk_rows, chunk_starts, chunk_ends, first_chunks = ragged or (None,) * 5
    chunks = G * chunks_per_mask if chunk_rows is None else chunk_rows.numel()
    partial = torch.empty((chunks, F) if mask_grad else 0, dtype=mask.dtype, device=mask.device)
    in_halves = x.layout == Layout.HALVES and input_grad
    p_grad_up = grad_gate.view(-1, 2 * F)[:, F:] if in_halves else grad_up
    masked_ffn_backward_kernel[(chunks * x.blocks,)](
        grad, x.gate, x.up, x.mask, order, chunk_rows, chunk_starts, chunk_ends,
        grad_gate, p_grad_up, partial,
        F, G, x.tokens_per_mask, length, chunks_per_mask,
        grad.stride(0), x.gate.stride(0), x.up.stride(0), x.mask.stride(0), x.gate.shape[1],
        ACTIVATION=activation, LAYOUT=COMPILED_FOR[x.layout], RAGGED=ragged is not None,
        INPUT_GRAD=input_grad, MASK_GRAD=mask_grad, BLOCK=x.block,
    )  # fmt: skip
    if mask_grad:
        at_once, columns = SUMMED
        sum_partials_kernel[(G * _ceil(F, columns),)](
            partial, first_chunks, grad_mask, F, chunks_per_mask,
            RAGGED=ragged is not None, CHUNKS=at_once, BLOCK=columns,
        )  # fmt: skip
    return grad_gate, grad_up, grad_mask
