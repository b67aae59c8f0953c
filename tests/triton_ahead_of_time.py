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

from neumuter_kernels.triton import hard_concrete, masked_ffn

TARGETS = [
    GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32),
    GPUTarget("hip", "gfx942", 64),
]  # fmt: skip
BLOCK = masked_ffn.BLOCK_F
POINTERS = {"order": "*i64", "chunk_rows": "*i64", "chunk_starts": "*i64", "chunk_ends": "*i64",
            "first_chunks": "*i64", "row_ids": "*i32", "sample_ids": "*i64", "mask": "*fp32",
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
    for dtype in ("fp32", "bf16"):
        for layout in (masked_ffn.PLAIN, masked_ffn.SPLIT, masked_ffn.INTERLEAVED):
            for activation in (0, 2):
                common = {"ACTIVATION": activation, "LAYOUT": layout, "BLOCK": BLOCK}
                forward = common | {"HAS_IDS": False, "row_ids": None}
                yield "forward", masked_ffn.masked_ffn_forward_kernel, dtype, forward
                backward = common | {
                    "RAGGED": False,
                    "INPUT_GRAD": True,
                    "MASK_GRAD": True,
                    "CHUNK": masked_ffn.CHUNK,
                }
                backward |= dict.fromkeys(("order", "chunk_rows", "chunk_starts", "chunk_ends"))
                yield "backward", masked_ffn.masked_ffn_backward_kernel, dtype, backward
    ragged = common | {"RAGGED": True, "INPUT_GRAD": True, "MASK_GRAD": True, "CHUNK": masked_ffn.CHUNK}
    yield "backward, row ids", masked_ffn.masked_ffn_backward_kernel, "bf16", ragged
    yield (
        "sum",
        masked_ffn.sum_partials_kernel,
        "fp32",
        {"RAGGED": False, "BLOCK": BLOCK, "first_chunks": None},
    )
    gates = {"TRAINING": True, "BLOCK": hard_concrete.BLOCK}
    yield "gates", hard_concrete.hard_concrete_kernel, "fp32", gates
    yield "gates backward", hard_concrete.hard_concrete_backward_kernel, "fp32", gates


if __name__ == "__main__":
    for name, kernel, dtype, constants in cases():
        for target in TARGETS:
            compiled = compile_kernel(kernel, dtype, constants, target)
            spilled, widths = describe(compiled, target)
            layout = constants.get("LAYOUT")
            label = f"{name} {dtype} layout {layout} activation {constants.get('ACTIVATION')}"
            print(
                json.dumps(
                    {"kernel": label, "target": str(target.arch), "spilled": spilled, "widths": widths}
                )
            )
