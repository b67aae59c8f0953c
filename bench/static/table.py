"""Compiles every kernel for GPUs that are not there, and holds the machine code to its budgets.

``python -m bench static`` prints it, ``python -m bench.static`` gives it as JSON to the tests.
Needs neither a GPU nor a driver, but a process without TRITON_INTERPRET. Of each kernel and target it
tells registers, spilled bytes, shared memory, the widths of the accesses to global memory, the bytes per
element against the budget, the occupancy and the time at the roofline. Those times are predictions from
data-sheet bandwidths (bench/devices.py): no measurement.
"""

import datetime
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.devices import DEVICES
from bench.static.assembly import amd_accesses, bytes_in_loops, ptx_accesses
from bench.static.cuda import cuda_rows, nvcc_version
from neumuter_kernels.reference import ACTIVATIONS
from neumuter_kernels.triton import hard_concrete, masked_ffn, token_losses

TARGETS = [
    GPUTarget("cuda", int(d.target), d.warp) if d.target.isdigit() else GPUTarget("hip", d.target, d.warp)
    for d in DEVICES.values()
]
BLOCK = masked_ffn.BLOCK_F
POINTERS = {"order": "*i64", "chunk_rows": "*i64", "chunk_starts": "*i64", "chunk_ends": "*i64",
            "first_chunks": "*i64", "row_ids": "*i32", "sample_ids": "*i64", "step": "*i64", "mask": "*fp32",
            "targets": "*i64", "losses": "*fp32",
            "partial": "*fp32", "grad_mask": "*fp32", "scores": "*fp32", "grad_scores": "*fp32"}  # fmt: skip
TENSORS = {"grad", "gate", "up", "out", "grad_gate", "grad_up", "logits", "reference"}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
MASK_BYTES = {"fp32": 4, "bf16": 4, "fp16": 4, "fp64": 8}
LAYOUTS = {masked_ffn.PLAIN: "plain", masked_ffn.SPLIT: "split", masked_ffn.INTERLEAVED: "interleaved"}
PREDICTED = (4096, 14336)  # tokens and intermediate size that times are predicted for: Llama 3 8B
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def cases():
    """Of each kernel: name, the kernel, dtype, constants, targets, and its budget.

    The budget is (bytes per element in a turn of each of the kernel's loops, bytes per element outside
    them, or None where those do not grow with the elements); a turn of a masked FFN's loop is one token. The
    mask, its gradient and scores are float32 (float64 in float64 kernels).
    """
    rows = dict.fromkeys(("order", "chunk_rows", "chunk_starts", "chunk_ends"))
    every = range(len(ACTIVATIONS))
    kinds = [(dtype, masked_ffn.SPLIT, every, TARGETS) for dtype in ("fp32", "bf16")]
    kinds += [(dtype, layout, (0,), TARGETS) for dtype in ("fp32", "bf16")
              for layout in (masked_ffn.PLAIN, masked_ffn.INTERLEAVED)]  # fmt: skip
    kinds += [("fp16", masked_ffn.SPLIT, (0,), TARGETS), ("fp64", masked_ffn.SPLIT, every, TARGETS[1:2])]
    for dtype, layout, activations, targets in kinds:
        for number in activations:
            constants = {"ACTIVATION": number, "LAYOUT": layout, "BLOCK": BLOCK}
            name = f"{ACTIVATIONS[number]} {LAYOUTS[layout]}"
            with_ids = (False, True) if number == 0 and layout == masked_ffn.SPLIT else (False,)
            for ids in with_ids:
                yield forward_case(name, dtype, constants, layout, targets, ids)
                yield backward_case(name, dtype, constants | ({} if ids else rows), layout, targets, ids)
    for ids in (False, True):
        at_once, columns = masked_ffn.SUMMED
        total = {"RAGGED": ids, "CHUNKS": at_once, "BLOCK": columns} | ({} if ids else {"first_chunks": None})
        name = "sum of partials" + ", row ids" * ids
        yield name, masked_ffn.sum_partials_kernel, "fp32", total, TARGETS, (4 * at_once, None)
    for training in (True, False):
        gates = {"TRAINING": training, "BLOCK": hard_concrete.BLOCK}
        name = "gates" + ", evaluation" * (not training)
        for dtype, targets in (("fp32", TARGETS), ("fp64", TARGETS[1:2])):
            e = BYTES[dtype]
            yield name, hard_concrete.hard_concrete_kernel, dtype, gates, targets, (0, 2 * e)
            backward = hard_concrete.hard_concrete_backward_kernel
            yield f"{name}, backward", backward, dtype, gates, targets, (e, 2 * e)
    for dtype in ("fp32", "bf16", "fp16"):
        # Each logit is read to find the sums, then read again and overwritten.
        e = BYTES[dtype]
        block = {"BLOCK": token_losses.block(e)}
        yield "cross-entropy", token_losses.cross_entropy_kernel, dtype, block, TARGETS, (3 * e, None)
        yield "KL divergence", token_losses.kl_divergence_kernel, dtype, block, TARGETS, (5 * e, None)


def forward_case(name, dtype, constants, layout, targets, ids):
    constants = constants | {"HAS_IDS": ids} | ({} if ids else {"row_ids": None})
    tensors = 2 if layout == masked_ffn.PLAIN else 3
    label = f"forward {name}" + ", row ids" * ids
    budget = 0, tensors * BYTES[dtype] + MASK_BYTES[dtype]
    return label, masked_ffn.masked_ffn_forward_kernel, dtype, constants, targets, budget


def backward_case(name, dtype, constants, layout, targets, ids):
    gradients = {"INPUT_GRAD": True, "MASK_GRAD": True, "RAGGED": ids}
    tensors = 3 if layout == masked_ffn.PLAIN else 5
    label = f"backward {name}" + ", row ids" * ids
    budget = tensors * BYTES[dtype], 2 * MASK_BYTES[dtype]
    return label, masked_ffn.masked_ffn_backward_kernel, dtype, constants | gradients, targets, budget


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
            signature[name] = kernel.params[i].annotation_type or POINTERS.get(name, "i32")
            if dtype == "fp64" and signature[name] == "*fp32":
                signature[name] = "*fp64"
        if signature[name].startswith("*") or name.startswith("stride") or name in ("F", "V"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    options = {"num_warps": token_losses.WARPS} if "losses" in kernel.arg_names else {}
    return triton.compile(source, target=target, options=options)


def usage(compiled, target):
    """Registers a thread, spilled bytes and accesses."""
    if target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        spilled = sum(int(n) for n in re.findall(r"[sv]gpr_spill_count:\s+(\d+)", assembly))
        return int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1]), spilled, amd_accesses(assembly)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", text)[1]) for what in ("REG", "STACK"))
    return registers, stack, ptx_accesses(compiled.asm["ptx"])


def triton_row(name, kernel, dtype, constants, target, budget):
    """One row of the table."""
    compiled = compile_kernel(kernel, dtype, constants, target)
    registers, spilled, accesses = usage(compiled, target)
    device = DEVICES[str(target.arch)]
    threads = compiled.metadata.num_warps * target.warp_size
    tile = constants["BLOCK"] * (4 if kernel.__name__.startswith("hard_concrete") else 1)
    occupancy, limit = device.occupancy(threads, registers, compiled.metadata.shared)
    widths = [a.width for a in accesses if not a.uniform]
    loops = kernel.src.count("for ")
    row = {
        "kernel": name, "dtype": dtype, "target": device.target, "card": device.card,
        "registers": registers, "spilled": spilled,
        "shared": compiled.metadata.shared, "widths": [min(widths), max(widths)],
        "loads": sum(a.kind == "load" for a in accesses), "stores": sum(a.kind == "store" for a in accesses),
        "bytes": [b * threads / tile for b in bytes_in_loops(accesses, loops)], "budget": list(budget),
        "occupancy": occupancy, "limit": limit,
    }  # fmt: skip
    if name.startswith(("forward", "backward")):
        row["predicted_us"] = 1e6 * predicted_bytes(row) / device.bandwidth
    return row


def predicted_bytes(row):
    """What the compiled kernel moves from and to device memory for PREDICTED tokens and width.

    The forward reads the mask again for every token, out of the L2 cache after the first. The backward
    repeats what is outside its loop once a chunk; the partial sums are read once more.
    """
    tokens, width = PREDICTED
    mask = MASK_BYTES[row["dtype"]]
    if row["kernel"].startswith("forward"):
        return tokens * width * (row["bytes"][1] - mask) + width * mask
    chunks = tokens / masked_ffn.tokens_per_chunk(tokens, 1, -(-width // BLOCK), 132)
    return width * (tokens * row["bytes"][0] + chunks * (row["bytes"][1] + mask) + mask)


def violations(row):
    """What breaks the rules: a spill, a narrow access to activations, traffic over the budget."""
    found = []
    if row["spilled"]:
        found.append(f"spills {row['spilled']} bytes")
    if row["kernel"].startswith(("forward", "backward")):
        # A thread of an AMD program holds 4 elements of a tile: 8 bytes of 16-bit ones.
        least = 8 if row["target"] == "gfx942" and row["dtype"] in ("bf16", "fp16") else 16
        if row["widths"][0] < least:
            found.append(f"accesses of {row['widths'][0]} bytes, narrower than {least}")
    places = ("in the loop", "outside the loop") if row["bytes"] else ()
    for where, moved, budget in zip(places, row["bytes"] or (), row["budget"] or (), strict=True):
        if budget is not None and moved > budget:
            found.append(f"moves {moved:g} bytes per element {where}, over the budget of {budget:g}")
    return [f"{row['kernel']} {row['dtype']} on {row['target']}: {what}" for what in found]


def rows():
    """The whole table: the Triton kernels, then the CUDA sources where nvcc is there."""
    table = [
        triton_row(name, kernel, dtype, constants, target, budget)
        for name, kernel, dtype, constants, targets, budget in cases()
        for target in targets
    ]
    return table + cuda_rows()


def compilers():
    """What the table was compiled with."""
    return {"triton": triton.__version__, "nvcc": nvcc_version(), "date": datetime.date.today().isoformat()}


HEAD = ("kernel", "dtype", "target", "registers", "spilled", "shared", "access", "ld/st",
        "B/element", "budget", "occupancy", "limited by", "predicted")  # fmt: skip


def cells(row):
    """A row as texts in the order of HEAD; bytes are 'in the loop + outside it'."""
    least, widest = row["widths"]
    predicted = f"{row['predicted_us']:.0f} µs" if "predicted_us" in row else ""
    moved, budget = (
        " + ".join("any" if b is None else f"{b:g}" for b in row[what] or ()) for what in ("bytes", "budget")
    )
    return (
        row["kernel"], row["dtype"], row["target"], str(row["registers"]), str(row["spilled"]),
        str(row["shared"]), f"{least}–{widest} B" if least != widest else f"{least} B",
        f"{row['loads']}/{row['stores']}", moved, budget, f"{row['occupancy']:.0%}", row["limit"], predicted,
    )  # fmt: skip


def print_table(table):
    lines = [HEAD, *map(cells, table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip())
    cards = ", ".join(f"{d.card} {d.bandwidth / 1e12:.3g} TB/s" for d in DEVICES.values())
    print(f"Predicted, not measured: {PREDICTED[0]}×{PREDICTED[1]} at the data sheets' bandwidths ({cards}).")
