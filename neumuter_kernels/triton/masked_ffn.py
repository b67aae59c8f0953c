"""masked_ffn and its backward in Triton.

Forward: one program per tile of tokens and columns. Backward: one program per chunk of tokens of a mask row
and block of columns. It walks the chunk's tokens in tiles, keeps its part of the mask gradient in registers,
and writes one sum per column. Where a mask row has several chunks, a second kernel adds up their sums. There
are no atomics, so every run gives the same bits. Mask rows of more than FEW tokens are cut into chunks that
fill the GPU: there the bits depend on its multiprocessors and on the registers of the compiled kernel.

Shapes: T tokens, F the intermediate size, G mask rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neumuter_kernels.recording import launch
from neumuter_kernels.reference import ACTIVATIONS, Layout
from neumuter_kernels.triton.arithmetic import HAS_PTX, WARP, arithmetic
from neumuter_kernels.triton.masked_ffn_kernels import (
    masked_ffn_backward_kernel,
    masked_ffn_forward_kernel,
    sum_chunks_kernel,
)
from neumuter_kernels.triton.row_ids import Chunks, chunks_of


@dataclass(frozen=True)
class Tile:
    """The tokens and the columns that a program has at a time, and its threads."""

    rows: int
    columns: int
    threads: int

    def constants(self, warp: int = WARP) -> dict[str, int]:
        """For a launch on a GPU with warps of so many threads."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "num_warps": self.threads // warp}


# Activations whose backward needs many registers, and the dtypes in which it does.
HEAVY = {"gelu": (torch.float16, torch.float64), "gelu_tanh": (torch.float32,)}


def all_registers(
    tile: Tile, activation: str, dtype: torch.dtype, row_ids: bool, mask_grad: bool
) -> dict[str, int]:
    """Let a backward kernel on NVIDIA's GPUs take all registers, where ptxas would rather spill.

    It does so where that lets more programs run at once. Others run more of them without a spill.
    """
    spills = dtype in HEAVY.get(activation, ()) or (row_ids and not mask_grad)
    return {"maxnreg": min(255, 2**16 // tile.threads)} if spills else {}


FORWARD = Tile(8, 256, 256)
# For a mask row in one chunk: narrow, so that there are programs enough. A thread has 16 bytes of each tensor
# at a time; with more of float32 and float64 than that, its registers spill.
ONE_CHUNK = {size: Tile(128 // size, 64, 512) for size in (2, 4, 8)}
MANY_CHUNKS = Tile(8, 128, 128)
# The most tokens of a mask row that are always one chunk.
FEW = 1024
# Sums and columns that a program of the second kernel adds up at a time.
SUMMED = 32, 64
# Programs along the second and third axis of a grid; elements between rows, so that a tile's fit in 31 bits.
MOST_PROGRAMS, FARTHEST = 2**16 - 1, 2**24
# Programs at once where no GPU tells it, in Triton's interpreter.
INTERPRETED_AT_ONCE = 1024

# What of a ``Layout`` the kernels are compiled for: SPLIT are two tensors as well as two halves of one,
# which are two pointers either way.
PLAIN, SPLIT, INTERLEAVED = 0, 1, 2
COMPILED_FOR = {
    Layout.PLAIN: PLAIN,
    Layout.SEPARATE: SPLIT,
    Layout.HALVES: SPLIT,
    Layout.INTERLEAVED: INTERLEAVED,
}
# How the kernels find the mask row of a token: there is one, they are runs of equal lengths, by row ids.
ONE_ROW, RUNS, ROW_IDS = 0, 1, 2


def _ceil(x: int, y: int) -> int:
    """x / y rounded up. triton.cdiv takes longer."""
    return -(-x // y)


def _rows(x: Tensor) -> Tensor:
    """``x`` [..., columns] as [rows, columns] of one row stride with adjacent columns."""
    x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    near = x.stride(1) == 1 or x.shape[1] == 1
    return x if near and x.stride(0) <= FARTHEST else x.contiguous()


def _grid(columns: int, block: int, number: int, runs: int = 1) -> tuple[int, int, int]:
    """Programs for blocks of columns and a number of tiles or chunks: of each run of tokens, or of all.

    There may be too many of all for one axis. Then they fill two, and some programs get nothing to do.
    """
    along_second = min(number, MOST_PROGRAMS)
    return _ceil(columns, block), along_second, runs if runs > 1 else _ceil(number, along_second)


def programs_at_once(registers: int, warps: int, device: Any) -> int:
    """How many programs of a kernel run on a GPU at the same time.

    registers: of a thread of the compiled kernel; device: as torch.cuda.get_device_properties returns it.
    """
    threads = warps * device.warp_size
    resident = min(
        device.regs_per_multiprocessor // (_ceil(max(registers, 1), 8) * 8 * threads),
        device.max_threads_per_multi_processor // threads,
    )
    return int(max(resident, 1) * device.multi_processor_count)


def tokens_per_chunk(tokens: int, G: int, blocks: int, at_once: int) -> int:
    """The length of a mask row's chunks with which all programs run at once (with row ids, nearly all)."""
    chunks = min(max(at_once // (max(G, 1) * blocks), 1), MOST_PROGRAMS)
    return _ceil(_ceil(tokens, chunks), MANY_CHUNKS.rows) * MANY_CHUNKS.rows


# How many programs of a backward kernel run at once, by the device and all that Triton compiles it for.
_at_once: dict[tuple[Any, ...], int] = {}


def _backward_at_once(device: torch.device, arguments: tuple[Any, ...], constants: dict[str, Any]) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return INTERPRETED_AT_ONCE
    numbers = (x.data_ptr() if isinstance(x, Tensor) else x for x in arguments if isinstance(x, Tensor | int))
    key = (device, arguments[0].dtype, *constants.values(), *(x % 16 == 0 for x in numbers))
    if key not in _at_once:
        compiled = masked_ffn_backward_kernel.warmup(*arguments, grid=(1, 1, 1), **constants)
        compiled[1, 1, 1]  # loads it, which tells its registers
        properties = torch.cuda.get_device_properties(device)
        _at_once[key] = programs_at_once(compiled.n_regs, constants["num_warps"], properties)
    return _at_once[key]


@dataclass
class _Input:
    """Gate, up (or what stands in for it) and mask as rows, and how they lie."""

    gate: Tensor
    up: Tensor
    mask: Tensor
    row_ids: Tensor | None
    layout: Layout
    F: int

    @classmethod
    def of(
        cls, gate: Tensor, up: Tensor | None, mask: Tensor, row_ids: Tensor | None, layout: Layout
    ) -> "_Input":
        gate, mask = _rows(gate), _rows(mask)
        F = gate.shape[1] // 2 if layout.packed else gate.shape[1]
        if up is not None:
            up = _rows(up)
        elif layout == Layout.PLAIN:
            up = gate
        else:
            up = gate[:, 1 if layout == Layout.INTERLEAVED else F :]
        T, G = gate.shape[0], mask.shape[0]
        if row_ids is not None:
            row_ids = row_ids.reshape(-1).contiguous()
        elif max(G, T // max(G, 1) if G > 1 else 0) > MOST_PROGRAMS:  # more than a grid of runs has room for
            row_ids = torch.arange(G, device=gate.device).repeat_interleave(T // G)
        return cls(gate, up, mask, row_ids, layout, F)

    @property
    def how_masked(self) -> int:
        if self.row_ids is not None:
            return ROW_IDS
        return ONE_ROW if self.mask.shape[0] == 1 else RUNS

    @property
    def tokens(self) -> int:
        """Of each mask row, or all of them if there are row ids."""
        return self.gate.shape[0] // (self.mask.shape[0] if self.row_ids is None else 1)


def forward(
    gate: Tensor, up: Tensor | None, mask: Tensor, row_ids: Tensor | None, activation: int, layout: int
) -> Tensor:
    """h [..., F] of gate [..., F] (or packed [..., 2F]), up (None unless SEPARATE) and mask [G, F]."""
    x = _Input.of(gate, up, mask, row_ids, Layout(layout))
    out = torch.empty((*gate.shape[:-1], x.F), dtype=gate.dtype, device=gate.device)
    if out.numel() == 0:
        return out
    G, how_masked = x.mask.shape[0], x.how_masked
    grid = _grid(x.F, FORWARD.columns, _ceil(x.tokens, FORWARD.rows), G if how_masked == RUNS else 1)
    launch(
        masked_ffn_forward_kernel, grid,
        x.gate, x.up, x.mask, x.row_ids, out,
        x.tokens, x.F, G, x.gate.stride(0), x.up.stride(0), x.mask.stride(0),
        ACTIVATION=activation, LAYOUT=COMPILED_FOR[x.layout], MASK=how_masked,
        ARITHMETIC=arithmetic(gate.dtype), **FORWARD.constants(),
    )  # fmt: skip
    return out


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
    G, F, how_masked = x.mask.shape[0], x.F, x.how_masked
    by_ids = how_masked == ROW_IDS
    grad = _rows(grad)
    grad_gate = gate.new_empty(gate.shape if input_grad else 0)
    grad_up = gate.new_empty(gate.shape if input_grad and up is not None else 0)
    grad_mask = mask.new_empty(mask.shape if mask_grad else 0)
    if x.gate.numel() == 0:
        return grad_gate, grad_up, grad_mask.zero_()

    in_halves = x.layout == Layout.HALVES and input_grad
    p_grad_up = grad_gate.view(-1, 2 * F)[:, F:] if in_halves else grad_up
    few = x.tokens <= FEW
    tile = ONE_CHUNK[gate.element_size()] if few else MANY_CHUNKS
    constants = {
        "ACTIVATION": activation, "LAYOUT": COMPILED_FOR[x.layout], "ROW_IDS": by_ids,
        "ARITHMETIC": arithmetic(gate.dtype), "INPUT_GRAD": input_grad, "MASK_GRAD": mask_grad,
        "WHOLE": F % tile.columns == 0, **tile.constants(),
    }  # fmt: skip
    if HAS_PTX:
        constants |= all_registers(tile, ACTIVATIONS[activation], gate.dtype, by_ids, mask_grad)
    strides = grad.stride(0), x.gate.stride(0), x.up.stride(0), x.mask.stride(0), x.gate.shape[1]

    def arguments(chunks: Sequence[Any], sums: Tensor, number: int, length: int) -> tuple[Any, ...]:
        return (grad, x.gate, x.up, x.mask, *chunks[:4], grad_gate, p_grad_up, sums,
                number, x.tokens, length, F, G, *strides)  # fmt: skip

    rows = G if how_masked == RUNS else 1  # that are cut into chunks one by one
    length = x.tokens + 1
    if not few:
        types = [torch.int32 if by_ids else None] * 4
        at_once = _backward_at_once(gate.device, arguments(types, grad_mask, 1, 1), constants)
        length = tokens_per_chunk(x.tokens, rows, _ceil(F, tile.columns), at_once)
    number = _ceil(x.tokens, length)
    chunks: Chunks | None = None
    if x.row_ids is not None:
        chunks = chunks_of(x.row_ids, G, length)
        number = chunks.rows.numel()
    one_each = length > x.tokens
    sums = grad_mask if one_each or not mask_grad else mask.new_empty(rows * number, F)
    grid = _grid(F, tile.columns, number, rows)
    launch(
        masked_ffn_backward_kernel, grid, *arguments(chunks or [None] * 4, sums, number, length), **constants
    )
    if mask_grad and not one_each:
        at_a_time, columns = SUMMED
        launch(
            sum_chunks_kernel, _grid(F, columns, G),
            sums, chunks and chunks.first_chunks, grad_mask, F, number, G,
            ROW_IDS=by_ids, CHUNKS=at_a_time, COLUMNS=columns,
        )  # fmt: skip
    return grad_gate, grad_up, grad_mask
