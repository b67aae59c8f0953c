"""Tokens sorted by their mask rows and cut into chunks; nothing waits for the device.

One kernel does it, in which each row looks at all tokens. Where that is too many looks, torch sorts.

Shapes: T tokens, G mask rows. Tokens without a mask row belong to a row of their own, row G.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from neumuter_kernels.triton.arithmetic import WARP

BLOCK, THREADS = 4096, 256  # row ids that a program looks at, at a time, and its threads
MOST_LOOKS = 1 << 26  # of the kernel: 2 × 8 bytes each out of the L2 cache, estimated at a quarter of a ms


class Chunks(NamedTuple):
    """The order of the tokens [T] and, of each chunk of tokens of one row, the row and the first and the last
    position in the order. ``first_chunks`` [G + 2] has the first chunk of each row; chunks may be empty."""

    order: Tensor
    rows: Tensor
    starts: Tensor
    ends: Tensor
    first_chunks: Tensor


@triton.jit
def load_rows(row_ids, t, tokens, G):
    """The rows of tokens t, and G + 1 past the last one."""
    ids = tl.load(row_ids + t, mask=t < tokens, other=0).to(tl.int64)
    return tl.where(t < tokens, tl.where((ids >= 0) & (ids < G), ids, G), G + 1)


@triton.jit(do_not_specialize=("row_ids", *Chunks._fields, "tokens", "G", "tokens_per_chunk"))
def chunk_kernel(row_ids, order, rows, starts, ends, first_chunks,
                 tokens, G, tokens_per_chunk, BLOCK: tl.constexpr):  # fmt: skip
    """One program per row: it counts the tokens of the rows before, and lists its own in their order."""
    g = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    here = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, tokens, BLOCK):
        row = load_rows(row_ids, start + lanes, tokens, G)
        before += (row < g).to(tl.int32)
        here += (row == g).to(tl.int32)
    first = tl.sum(before, axis=0)
    last = first + tl.sum(here, axis=0)
    position = first
    for start in range(0, tokens, BLOCK):
        own = (load_rows(row_ids, start + lanes, tokens, G) == g).to(tl.int32)
        tl.store(order + position + tl.cumsum(own, axis=0) - 1, start + lanes, mask=own == 1)
        position += tl.sum(own, axis=0)
    # Row g has at most as many chunks as lie between these two, whatever the other rows have.
    chunk = first // tokens_per_chunk + g
    next_chunk = last // tokens_per_chunk + g + 1
    tl.store(first_chunks + g, chunk)
    tl.store(first_chunks + g + 1, next_chunk, mask=g == G)
    for i in range(0, next_chunk - chunk, BLOCK):
        k = i + lanes
        begin = tl.minimum(first + k * tokens_per_chunk, last)
        valid = chunk + k < next_chunk
        tl.store(rows + chunk + k, g + 0 * k, mask=valid)
        tl.store(starts + chunk + k, begin, mask=valid)
        tl.store(ends + chunk + k, tl.minimum(begin + tokens_per_chunk, last), mask=valid)


def chunks_of(row_ids: Tensor, G: int, tokens_per_chunk: int) -> Chunks:
    """Chunks of at most ``tokens_per_chunk`` of the tokens with these row ids, contiguous [T].

    There are T // tokens_per_chunk + G + 1 of them. Where tokens_per_chunk > T, chunk g is all of row g.
    """
    T = row_ids.numel()
    n = T // tokens_per_chunk + G + 1
    if (G + 1) * T > MOST_LOOKS:
        return _sorted_chunks(row_ids, G, tokens_per_chunk, n)
    order, rows, starts, ends, first_chunks = row_ids.new_empty(T + 3 * n + G + 2, dtype=torch.int32).split(
        [T, n, n, n, G + 2]
    )
    chunks = Chunks(order, rows, starts, ends, first_chunks)
    chunk_kernel[(G + 1,)](row_ids, *chunks, T, G, tokens_per_chunk, BLOCK=BLOCK, num_warps=THREADS // WARP)
    return chunks


def _sorted_chunks(row_ids: Tensor, G: int, tokens_per_chunk: int, n: int) -> Chunks:
    """The same, by sorting."""
    device = row_ids.device
    rows, order = torch.where((row_ids >= 0) & (row_ids < G), row_ids, G).sort(stable=True)
    bounds = torch.searchsorted(rows, torch.arange(G + 2, dtype=rows.dtype, device=device))
    first_chunks = bounds // tokens_per_chunk + torch.arange(G + 2, device=device)
    chunk = torch.arange(n, device=device)
    row = torch.searchsorted(first_chunks[1:], chunk, right=True)
    last = bounds[row + 1]
    starts = torch.minimum(bounds[row] + (chunk - first_chunks[row]) * tokens_per_chunk, last)
    ends = torch.minimum(starts + tokens_per_chunk, last)
    return Chunks(*(x.int() for x in (order, row, starts, ends, first_chunks)))
