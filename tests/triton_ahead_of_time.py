"""Compiles the Triton kernels for GPUs that are not there; prints one JSON line per kernel.

Run in a process of its own: the tests' process interprets the kernels. Prints kernel, target,
spilled bytes, shared memory, and the widths in bytes of the vector accesses to global memory.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from neumuter_kernels.reference import ACTIVATIONS
from neumuter_kernels.triton import hard_concrete, masked_ffn

TARGETS = [
    GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32),
    GPUTarget("hip", "gfx942", 64),
]  # fmt: skip
BLOCK = masked_ffn.BLOCK_F
PLAIN_OR_INTERLEAVED = (masked_ffn.PLAIN, masked_ffn.INTERLEAVED)
POINTERS = {"order": "*i64", "chunk_rows": "*i64", "chunk_starts": "*i64", "chunk_ends": "*i64",
            "first_chunks": "*i64", "row_ids": "*i32", "sample_ids": "*i64", "step": "*i64", "mask": "*fp32",
            "partial": "*fp32", "grad_mask": "*fp32", "scores": "*fp32", "grad_scores": "*fp32"}  # fmt: skip
TENSORS = {"grad", "gate", "up", "out", "grad_gate", "grad_up"}
FLOATS = {"inverse_temperature", "gamma", "span", "scale"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_kernel(kernel, dtype, constants, target):
    """As the launchers call it: pointers, strides and F divisible by 16."""
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in TENSORS:
            signature[name] = f"*{dtype}"
        else:
            signature[name] = POINTERS.get(name, "fp32" if name in FLOATS else "i32")
            if dtype == "fp64" and signature[name] == "*fp32":
                signature[name] = "*fp64"
        if signature[name].startswith("*") or name.startswith("stride") or name == "F":
            attributes[(i,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    return triton.compile(source, target=target)


def describe(compiled, target):
    if target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        spilled = sum(int(n) for n in re.findall(r"[sv]gpr_spill_count:\s+(\d+)", assembly))
        words = re.findall(r"(?:global|buffer)_(?:load|store)_dword(?:x(\d))?\b", assembly)
        return spilled, [4 * int(n or 1) for n in words]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    accesses = re.findall(r"(?:ld|st)\.global(?:\.[a-z_:0-9]+)*?(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])
    return int(re.search(r"STACK:(\d+)", usage.stdout)[1]), [int(n or 1) * int(b) // 8 for n, b in accesses]


def cases():
    """(name, kernel, dtype, constants, targets)"""
    forward, backward = masked_ffn.masked_ffn_forward_kernel, masked_ffn.masked_ffn_backward_kernel
    rows = dict.fromkeys(("order", "chunk_rows", "chunk_starts", "chunk_ends"))
    gradients = {"INPUT_GRAD": True, "MASK_GRAD": True, "CHUNK": masked_ffn.CHUNK}
    every = range(len(ACTIVATIONS))
    kinds = [(dtype, masked_ffn.SPLIT, every, TARGETS) for dtype in ("fp32", "bf16")]
    kinds += [(dtype, layout, (0,), TARGETS) for dtype in ("fp32", "bf16") for layout in PLAIN_OR_INTERLEAVED]
    kinds += [("fp16", masked_ffn.SPLIT, (0,), TARGETS), ("fp64", masked_ffn.SPLIT, every, TARGETS[1:2])]
    for dtype, layout, activations, targets in kinds:
        for activation in activations:
            common = {"ACTIVATION": activation, "LAYOUT": layout, "BLOCK": BLOCK}
            yield "forward", forward, dtype, common | {"HAS_IDS": False, "row_ids": None}, targets
            yield "backward", backward, dtype, common | gradients | rows | {"RAGGED": False}, targets
    ragged = common | gradients | {"RAGGED": True}
    yield "backward, row ids", backward, "bf16", ragged, TARGETS
    total = {"RAGGED": False, "BLOCK": BLOCK, "first_chunks": None}
    yield "sum", masked_ffn.sum_partials_kernel, "fp32", total, TARGETS
    gates = {"TRAINING": True, "BLOCK": hard_concrete.BLOCK}
    for dtype, targets in (("fp32", TARGETS), ("fp64", TARGETS[1:2])):
        yield "gates", hard_concrete.hard_concrete_kernel, dtype, gates, targets
        yield "gates backward", hard_concrete.hard_concrete_backward_kernel, dtype, gates, targets


if __name__ == "__main__":
    for name, kernel, dtype, constants, targets in cases():
        for target in targets:
            compiled = compile_kernel(kernel, dtype, constants, target)
            spilled, widths = describe(compiled, target)
            layout = constants.get("LAYOUT")
            label = f"{name} {dtype} layout {layout} activation {constants.get('ACTIVATION')}"
            row = {"kernel": label, "target": str(target.arch), "spilled": spilled, "widths": widths}
            print(json.dumps(row | {"dtype": dtype}))
