"""The kernels of masked_ffn in Triton; masked_ffn.py launches them.

A tile is ROWS tokens and COLUMNS columns. F is the intermediate size, G the number of mask rows. LAYOUT and
MASK are numbers that masked_ffn.py names, ACTIVATION one of reference.py and ARITHMETIC one of arithmetic.py.
"""

import triton
import triton.language as tl

from neumuter_kernels.triton.activations import activation
from neumuter_kernels.triton.arithmetic import rounded, widened


@triton.jit
def load(p, valid, ALL: tl.constexpr):
    """What lies at p, and 0 where that is not valid; ALL: everything is."""
    if ALL:
        result = tl.load(p)
    else:
        result = tl.load(p, mask=valid, other=0.0)
    return result


@triton.jit
def store(p, x, valid, ALL: tl.constexpr):
    if ALL:
        tl.store(p, x)
    else:
        tl.store(p, x, mask=valid)


@triton.jit
def columns_of(LAYOUT: tl.constexpr, COLUMNS: tl.constexpr):
    """The program's columns [1, …] of a gate of that layout: an interleaved one has twice as many."""
    width: tl.constexpr = 2 * COLUMNS if LAYOUT == 2 else COLUMNS
    return tl.program_id(0) * width + tl.arange(0, width)[None, :]


@triton.jit
def load_gate_up(p_gate, p_up, valid_gate, valid, ALL: tl.constexpr, LAYOUT: tl.constexpr):
    """A tile of gate and of up in the dtype of the memory (PLAIN: gate twice)."""
    b_gate = load(p_gate, valid_gate, ALL)
    b_up = b_gate
    if LAYOUT == 1:
        b_up = load(p_up, valid, ALL)
    elif LAYOUT == 2:
        b_gate, b_up = tl.split(tl.reshape(b_gate, (b_gate.shape[0], b_gate.shape[1] // 2, 2)))
    return b_gate, b_up


@triton.jit(do_not_specialize=("row_ids", "tokens", "G"))
def masked_ffn_forward_kernel(
    gate, up, mask, row_ids, out,
    tokens, F, G, stride_gate, stride_up, stride_mask,
    ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr, MASK: tl.constexpr, ARITHMETIC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """tokens: of each mask row where those are RUNS."""
    dtype: tl.constexpr = out.dtype.element_ty
    f, f_gate = columns_of(0, COLUMNS), columns_of(LAYOUT, COLUMNS)
    first = tl.program_id(1) * ROWS
    if MASK != 1:
        first += tl.program_id(2) * (tl.num_programs(1) * ROWS)
    r = tl.arange(0, ROWS)[:, None]
    live = r < tokens - first
    t = (first + r).to(tl.int64)
    # Pointers of a whole tile, so that each thread gets the mask's columns that it computes.
    p_mask = mask + f + 0 * r
    masked = f < F
    if MASK == 1:
        p_mask += tl.program_id(2).to(tl.int64) * stride_mask
        t += tl.program_id(2).to(tl.int64) * tokens
    elif MASK == 2:
        row = tl.load(row_ids + t, mask=live, other=-1).to(tl.int64)
        p_mask += row * stride_mask
        masked = masked & (row >= 0) & (row < G)
    b_gate, b_up = load_gate_up(
        gate + t * stride_gate + f_gate, up + t * stride_up + f,
        live & (f_gate < (2 * F if LAYOUT == 2 else F)), live & (f < F), False, LAYOUT,
    )  # fmt: skip
    b_mask = tl.load(p_mask, mask=masked, other=1.0 if MASK == 2 else 0.0)
    value, _ = activation(widened(b_gate, ARITHMETIC), ACTIVATION, ARITHMETIC)
    h = rounded(value, dtype, ARITHMETIC)  # where eager rounds
    if LAYOUT != 0:
        h = h * widened(b_up, ARITHMETIC)
    tl.store(out + t * F + f, (h * b_mask).to(dtype), mask=live & (f < F))


@triton.jit
def backward_tile(
    p_grad, p_gate, p_up, p_grad_gate, p_grad_up, b_mask, sums, valid_gate, valid, ALL: tl.constexpr,
    ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr, ARITHMETIC: tl.constexpr,
    INPUT_GRAD: tl.constexpr, MASK_GRAD: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of a tile of gate and up; returns its part of the mask's gradient plus sums."""
    dtype: tl.constexpr = p_gate.dtype.element_ty
    b_grad = load(p_grad, valid, ALL)
    b_gate, b_up = load_gate_up(p_gate, p_up, valid_gate, valid, ALL, LAYOUT)
    b_grad, b_up = widened(b_grad, ARITHMETIC), widened(b_up, ARITHMETIC)
    value, slope = activation(widened(b_gate, ARITHMETIC), ACTIVATION, ARITHMETIC)
    value = rounded(value, dtype, ARITHMETIC)
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
        d_gate = (rounded(inner, dtype, ARITHMETIC) * slope).to(dtype)
        if LAYOUT == 2:
            d_gate = tl.reshape(tl.join(d_gate, d_up), p_grad_gate.shape)
        store(p_grad_gate, d_gate, valid_gate, ALL)
        if LAYOUT == 1:
            store(p_grad_up, d_up, valid, ALL)
    return sums


@triton.jit
def pointers(
    grad, gate, up, grad_gate, grad_up, t, f, f_gate, stride_grad, stride_gate, stride_up, stride_out
):
    """Where columns of tokens t [ROWS, 1] lie in the five tensors."""
    return (grad + t * stride_grad + f, gate + t * stride_gate + f_gate, up + t * stride_up + f,
            grad_gate + t * stride_out + f_gate, grad_up + t * stride_out + f)  # fmt: skip


@triton.jit(do_not_specialize=("order", "chunk_rows", "chunk_starts", "chunk_ends",
                               "chunks", "tokens", "tokens_per_chunk", "G"))  # fmt: skip
def masked_ffn_backward_kernel(
    grad, gate, up, mask, order, chunk_rows, chunk_starts, chunk_ends, grad_gate, grad_up, sums,
    chunks, tokens, tokens_per_chunk, F, G, stride_grad, stride_gate, stride_up, stride_mask, stride_out,
    ACTIVATION: tl.constexpr, LAYOUT: tl.constexpr, ROW_IDS: tl.constexpr, ARITHMETIC: tl.constexpr,
    INPUT_GRAD: tl.constexpr, MASK_GRAD: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """chunks and tokens: of each mask row, but of all if there are row ids. WHOLE: COLUMNS divides F."""
    f, f_gate = columns_of(0, COLUMNS), columns_of(LAYOUT, COLUMNS)
    inside, inside_gate = f < F, f_gate < (2 * F if LAYOUT == 2 else F)
    r = tl.arange(0, ROWS)[:, None]
    masked = inside
    if ROW_IDS:
        chunk = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
        exists = chunk < chunks
        row = tl.load(chunk_rows + chunk, mask=exists, other=G).to(tl.int64)
        first = tl.load(chunk_starts + chunk, mask=exists, other=0).to(tl.int64)
        count = tl.load(chunk_ends + chunk, mask=exists, other=0) - first.to(tl.int32)
        masked = masked & (row < G)  # row G: the unmasked tokens
    else:
        row = tl.program_id(2).to(tl.int64)
        chunk = row * chunks + tl.program_id(1)
        first = row * tokens + tl.program_id(1) * tokens_per_chunk
        count = tl.minimum(tokens - tl.program_id(1) * tokens_per_chunk, tokens_per_chunk)
    # Pointers of a whole tile, so that each thread gets the mask's columns that it computes.
    b_mask = tl.load(mask + row * stride_mask + f + 0 * r, mask=masked, other=1.0)
    total = tl.zeros((ROWS, COLUMNS), dtype=b_mask.dtype)
    # The rest comes first, then whole tiles, of which nothing is masked out. With the rest last, or with one
    # masked loop for all, the loop would have 10 to 25 instructions more per turn.
    whole = count // ROWS * ROWS
    if whole < count:
        live = r < count - whole
        t = first + whole + r
        if ROW_IDS:
            t = tl.load(order + t, mask=live, other=0).to(tl.int64)
        p_grad, p_gate, p_up, p_grad_gate, p_grad_up = pointers(
            grad, gate, up, grad_gate, grad_up, t, f, f_gate, stride_grad, stride_gate, stride_up, stride_out
        )
        total = backward_tile(
            p_grad, p_gate, p_up, p_grad_gate, p_grad_up, b_mask, total,
            live & inside_gate, live & inside, False,
            ACTIVATION, LAYOUT, ARITHMETIC, INPUT_GRAD, MASK_GRAD,
        )  # fmt: skip
    p_grad, p_gate, p_up, p_grad_gate, p_grad_up = pointers(
        grad, gate, up, grad_gate, grad_up, first + r, f, f_gate,
        stride_grad, stride_gate, stride_up, stride_out,
    )  # fmt: skip
    if ROW_IDS:
        p_order = order + first + r
    for _ in range(0, whole, ROWS):
        if ROW_IDS:
            t = tl.load(p_order).to(tl.int64)
            p_order += ROWS
            p_grad, p_gate, p_up, p_grad_gate, p_grad_up = pointers(
                grad, gate, up, grad_gate, grad_up, t, f, f_gate,
                stride_grad, stride_gate, stride_up, stride_out,
            )  # fmt: skip
        total = backward_tile(
            p_grad, p_gate, p_up, p_grad_gate, p_grad_up, b_mask, total, inside_gate, inside, WHOLE,
            ACTIVATION, LAYOUT, ARITHMETIC, INPUT_GRAD, MASK_GRAD,
        )  # fmt: skip
        if not ROW_IDS:
            p_grad += ROWS * stride_grad
            p_gate += ROWS * stride_gate
            p_up += ROWS * stride_up
            p_grad_gate += ROWS * stride_out
            p_grad_up += ROWS * stride_out
    if MASK_GRAD:
        f = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        written = f < F
        if ROW_IDS:
            written = written & (row < G)
        tl.store(sums + chunk * F + f, tl.sum(total, axis=0), mask=written)


@triton.jit(do_not_specialize=("first_chunks", "chunks", "G"))
def sum_chunks_kernel(sums, first_chunks, grad_mask, F, chunks, G,
                      ROW_IDS: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Adds up the sums of a mask row's chunks. chunks: of each mask row, unless there are row ids."""
    g = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    f = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if ROW_IDS:
        first = tl.load(first_chunks + g, mask=g < G, other=0).to(tl.int64)
        last = tl.load(first_chunks + g + 1, mask=g < G, other=0).to(tl.int64)
    else:
        first = g * chunks
        last = first + chunks
    total = tl.zeros((CHUNKS, COLUMNS), dtype=sums.dtype.element_ty)
    for start in range(first, last, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        valid = (chunk < last)[:, None] & (f < F)[None, :]
        total += tl.load(sums + chunk[:, None] * F + f[None, :], mask=valid, other=0.0)
    tl.store(grad_mask + g * F + f, tl.sum(total, axis=0), mask=(f < F) & (g < G))
