"""What the table of bench/static/table.py compiles: every variant that the public functions can reach."""

from dataclasses import dataclass, field
from typing import Any

import torch
from triton.backends.compiler import GPUTarget

from bench.devices import DEVICES
from neumuter_kernels.reference import ACTIVATIONS
from neumuter_kernels.triton import (
    arithmetic,
    hard_concrete,
    masked_ffn,
    masked_ffn_kernels,
    row_ids,
    token_losses,
)

KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        masked_ffn_kernels.masked_ffn_forward_kernel,
        masked_ffn_kernels.masked_ffn_backward_kernel,
        masked_ffn_kernels.sum_chunks_kernel,
        row_ids.chunk_kernel,
        hard_concrete.hard_concrete_kernel,
        hard_concrete.hard_concrete_backward_kernel,
        token_losses.cross_entropy_kernel,
        token_losses.kl_divergence_kernel,
    )
}
TARGETS = [
    GPUTarget("cuda", int(d.target), d.warp) if d.target.isdigit() else GPUTarget("hip", d.target, d.warp)
    for d in DEVICES.values()
]
HOPPER = next(target for target in TARGETS if target.arch == 90)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
LAYOUTS = {masked_ffn.PLAIN: "plain", masked_ffn.SPLIT: "split", masked_ffn.INTERLEAVED: "interleaved"}
MASKS = {masked_ffn.ONE_ROW: "", masked_ffn.RUNS: ", runs", masked_ffn.ROW_IDS: ", row ids"}
TILES = ("one chunk", "chunks")


@dataclass(frozen=True)
class Case:
    """A kernel for a dtype and a target.

    elements: of a tile. budget: the bytes per element that accesses of 16 bytes move in one turn of the
    kernel's loops and outside of them, None for any number.
    """

    name: str
    kernel_name: str
    dtype: str
    constants: dict[str, Any]
    target: GPUTarget
    elements: int
    budget: tuple[float | None, float | None]
    warps: int = 4
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def kernel(self):
        return KERNELS[self.kernel_name]


def element_size(dtype):
    return DTYPES[dtype].itemsize


def mask_size(dtype):
    return 8 if dtype == "fp64" else 4


def arithmetic_for(dtype, target):
    kind = arithmetic.arithmetic(DTYPES[dtype])
    return arithmetic.PLAIN if kind == arithmetic.FAST and target.backend == "hip" else kind


def masked_ffn_cases(dtypes, target, layouts=tuple(LAYOUTS), activations=ACTIVATIONS, masks=tuple(MASKS)):
    for dtype in dtypes:
        for layout in layouts:
            for name in activations:
                for how in masks:
                    yield forward_case(dtype, layout, name, how, target)
                    if how != masked_ffn.RUNS:  # which the backward does not tell from one row
                        for tile in TILES:
                            yield backward_case(dtype, layout, name, how, tile, target)


def forward_case(dtype, layout, activation, how, target):
    tile = masked_ffn.FORWARD.constants(target.warp_size)
    warps = tile.pop("num_warps")
    constants = {
        "ACTIVATION": ACTIVATIONS.index(activation), "LAYOUT": layout, "MASK": how,
        "ARITHMETIC": arithmetic_for(dtype, target), **tile,
    } | ({} if how == masked_ffn.ROW_IDS else {"row_ids": None})  # fmt: skip
    tensors = 2 if layout == masked_ffn.PLAIN else 3
    return Case(
        f"forward {activation} {LAYOUTS[layout]}{MASKS[how]}", "masked_ffn_forward_kernel",
        dtype, constants, target, tile["ROWS"] * tile["COLUMNS"],
        (0, tensors * element_size(dtype) + mask_size(dtype)), warps,
    )  # fmt: skip


def backward_case(dtype, layout, activation, how, tile_name, target, gradients=(True, True), whole=True):
    few = tile_name == "one chunk"
    tile = masked_ffn.ONE_CHUNK[element_size(dtype)] if few else masked_ffn.MANY_CHUNKS
    by_ids = how == masked_ffn.ROW_IDS
    inputs, mask = gradients
    options = {}
    if target.backend == "cuda":
        options = masked_ffn.all_registers(tile, activation, DTYPES[dtype], by_ids, mask)
    tile = tile.constants(target.warp_size)
    warps = tile.pop("num_warps")
    constants = {
        "ACTIVATION": ACTIVATIONS.index(activation), "LAYOUT": layout, "ROW_IDS": by_ids,
        "ARITHMETIC": arithmetic_for(dtype, target), "INPUT_GRAD": inputs, "MASK_GRAD": mask,
        "WHOLE": whole, **tile,
    } | ({} if by_ids else dict.fromkeys(("order", "chunk_rows", "chunk_starts", "chunk_ends")))  # fmt: skip
    tensors = (2 if layout == masked_ffn.PLAIN else 3) + inputs * (1 if layout == masked_ffn.PLAIN else 2)
    # The slope of the identity is the same everywhere.
    tensors -= activation == "identity" and layout == masked_ffn.PLAIN and not mask
    name = f"backward {activation} {LAYOUTS[layout]}{MASKS[how]}, {tile_name}"
    name += ", inputs alone" * (not mask) + ", mask alone" * (not inputs) + ", any F" * (not whole)
    return Case(
        name, "masked_ffn_backward_kernel", dtype, constants, target,
        tile["ROWS"] * tile["COLUMNS"], (tensors * element_size(dtype), None), warps, options,
    )  # fmt: skip


def other_cases(target):
    for by_ids in (False, True):
        at_a_time, columns = masked_ffn.SUMMED
        total = {"ROW_IDS": by_ids, "CHUNKS": at_a_time, "COLUMNS": columns}
        yield Case(
            "sum of chunks" + ", row ids" * by_ids, "sum_chunks_kernel", "fp32",
            total | ({} if by_ids else {"first_chunks": None}), target, at_a_time * columns, (4, None),
        )  # fmt: skip
    yield Case(
        "chunks of row ids", "chunk_kernel", "fp32", {"BLOCK": row_ids.BLOCK}, target,
        row_ids.BLOCK, (None, None), row_ids.THREADS // target.warp_size,
    )  # fmt: skip
    for training in (True, False):
        gates = {"TRAINING": training, "BLOCK": hard_concrete.BLOCK}
        name = "gates" + ", evaluation" * (not training)
        for dtype in ("fp32", "fp64") if target == HOPPER else ("fp32",):
            e = element_size(dtype)
            yield Case(
                name, "hard_concrete_kernel", dtype, gates, target, 4 * hard_concrete.BLOCK,
                (0, 2 * e), options={"enable_fp_fusion": False},
            )  # fmt: skip
            yield Case(
                f"{name}, backward", "hard_concrete_backward_kernel", dtype, gates, target,
                4 * hard_concrete.BLOCK, (e, 2 * e), options={"enable_fp_fusion": False},
            )  # fmt: skip
    yield from losses_cases(target)


def losses_cases(target, dtypes=("fp32", "bf16", "fp16")):
    for dtype in dtypes:
        # Each logit is read to find the sums, then read again and overwritten.
        e = element_size(dtype)
        constants = token_losses.turn(e)
        logits = constants["ACCESSES"] * constants["THREADS"] * constants["EACH"]
        constants |= {"ARITHMETIC": arithmetic_for(dtype, target)}
        for name, kernel, tensors in (
            ("cross-entropy", "cross_entropy_kernel", 3), ("KL divergence", "kl_divergence_kernel", 5)
        ):  # fmt: skip
            yield Case(
                name, kernel, dtype, constants, target, logits, (tensors * e, None),
                token_losses.THREADS // target.warp_size,
            )  # fmt: skip


def all_cases():
    """For every target the dtypes of training; for one target float64, single gradients, and an F that is not
    made of whole tiles."""
    found = []
    for target in TARGETS:
        found += masked_ffn_cases(("fp32", "bf16", "fp16"), target)
        found += other_cases(target)
    found += masked_ffn_cases(("fp64",), HOPPER)
    for layout in LAYOUTS:
        for activation in ACTIVATIONS:
            for how in (masked_ffn.ONE_ROW, masked_ffn.ROW_IDS):
                for tile in TILES:
                    case = "bf16", layout, activation, how, tile, HOPPER
                    found.append(backward_case(*case, gradients=(True, False)))
                    found.append(backward_case(*case, gradients=(False, True)))
                    found.append(backward_case(*case, whole=False))
    return found


def tested_cases():
    """Few enough to be compiled by a test: one of each kernel, and what has a budget of instructions.

    Of the latter one activation on each target, and all of them on Hopper.
    """
    found = list(other_cases(HOPPER))
    for target in TARGETS:
        found.append(forward_case("bf16", masked_ffn.SPLIT, "silu", masked_ffn.ONE_ROW, target))
        for activation in ("silu", "gelu_tanh", "relu") if target is HOPPER else ("silu",):
            for tile in TILES:
                case = "bf16", masked_ffn.SPLIT, activation, masked_ffn.ONE_ROW, tile, target
                found.append(backward_case(*case))
    return found
