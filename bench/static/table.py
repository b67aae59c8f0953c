"""Compiles every kernel for GPUs that are not there, and holds the machine code to its budgets.

``python -m bench static`` compiles all cases, prints the table and writes it; ``python -m bench.static``
gives a part of it as JSON to the tests. Needs neither a GPU nor a driver, but a process without
TRITON_INTERPRET. Of each kernel and target the table tells registers, spilled bytes, shared memory, the bytes
per element that accesses of 16 bytes move against the budget, the programs that fit on a multiprocessor and
what limits them. For NVIDIA's GPUs it also tells instructions and XU operations per element and the cycles to
the last load (bench/static/sass.py). Times at the roofline are predictions from data-sheet bandwidths
(bench/devices.py).
"""

import datetime
import multiprocessing
import os
import re

import triton
from triton.compiler import ASTSource

from bench.devices import DEVICES
from bench.static import cases, sass
from bench.static.assembly import amd_accesses, bytes_in_loops, ptx_accesses
from bench.static.cuda import cuda_rows, nvcc_version
from neumuter_kernels.triton import masked_ffn

POINTERS = {
    **dict.fromkeys(("order", "chunk_rows", "chunk_starts", "chunk_ends", "first_chunks"), "*i32"),
    **dict.fromkeys(("rows", "starts", "ends"), "*i32"),
    **dict.fromkeys(("row_ids", "sample_ids", "step", "targets"), "*i64"),
    **dict.fromkeys(("mask", "sums", "grad_mask", "scores", "grad_scores", "losses"), "*fp32"),
}
TENSORS = {"grad", "gate", "up", "out", "grad_gate", "grad_up", "logits", "reference"}
WIDE = 16  # bytes
PREDICTED = (4096, 14336)  # tokens and intermediate size that times are predicted for: Llama 3 8B
# What is asserted of the bfloat16 backward of these, with gate and up apart, on these targets.
FAST = {"silu", "gelu_tanh", "relu"}, {"80", "86", "89", "90", "120"}
MOST_INSTRUCTIONS, MOST_XU = 26, 2


def compile_kernel(case):
    """As the launchers call it: pointers, strides and F divisible by 16 wherever Triton looks at that."""
    kernel, dtype = case.kernel, case.dtype
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            continue
        if name in TENSORS:
            signature[name] = f"*{dtype}"
        elif name == "rows" and kernel.__name__.startswith("hard_concrete"):
            signature[name] = "i32"
        else:
            signature[name] = kernel.params[i].annotation_type or POINTERS.get(name, "i32")
            if dtype == "fp64" and signature[name] == "*fp32":
                signature[name] = "*fp64"
        if kernel.params[i].do_not_specialize:
            continue
        if signature[name].startswith("*") or name.startswith("stride") or name in ("F", "V"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    return triton.compile(source, target=case.target, options={"num_warps": case.warps, **case.options})


def triton_row(case):
    """One row of the table."""
    compiled = compile_kernel(case)
    device = DEVICES[str(case.target.arch)]
    threads = case.warps * case.target.warp_size
    row = {"kernel": case.name, "dtype": case.dtype, "target": device.target}
    if case.target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        row["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
        row["spilled"] = sum(int(n) for n in re.findall(r"[sv]gpr_spill_count:\s+(\d+)", assembly))
        accesses = amd_accesses(assembly)
    else:
        row["registers"], row["spilled"], instructions, loops = sass.disassemble(compiled.asm["cubin"])
        accesses = ptx_accesses(compiled.asm["ptx"])
        turn = sass.turn(instructions, loops)
        elements = case.elements / threads
        row["instructions"] = round(len(turn) / elements, 2)
        row["xu"] = round(sass.xu_operations(turn) / elements, 2)
        row["last_load"] = sass.cycles_to_last_load(instructions, loops)
    row["shared"] = compiled.metadata.shared
    wide = [a for a in accesses if a.width >= WIDE]
    row["bytes"] = [b * threads / case.elements for b in bytes_in_loops(wide, case.kernel.src.count("for "))]
    row["budget"] = list(case.budget)
    row["programs"], row["limit"] = device.resident(threads, row["registers"], row["shared"])
    row["occupancy"] = row["programs"] * threads / device.threads
    if case.name in ("forward silu split", "backward silu split, chunks"):
        row["predicted_us"] = round(1e6 * predicted_bytes(case, row) / device.bandwidth, 1)
    return row


def predicted_bytes(case, row):
    """What a kernel moves from and to device memory for PREDICTED tokens and width, with one mask row.

    The forward reads the mask again for every tile, but out of the caches. The backward writes and reads a
    sum of each column and chunk.
    """
    tokens, width = PREDICTED
    e = cases.element_size(case.dtype)
    if case.name.startswith("forward"):
        return tokens * width * 3 * e + width * cases.mask_size(case.dtype)
    at_once = row["programs"] * 132
    blocks = width // case.constants["COLUMNS"]
    chunks = tokens / masked_ffn.tokens_per_chunk(tokens, 1, blocks, at_once)
    return width * (tokens * 5 * e + (2 * chunks + 2) * cases.mask_size(case.dtype))


def violations(row):
    """What breaks the rules: a spill, narrow accesses, traffic over the budget, too many instructions."""
    found = []
    if row["spilled"]:
        found.append(f"spills {row['spilled']} bytes")
    places = ("in the loop", "outside the loop") if row["bytes"] else ()
    for where, moved, budget in zip(places, row["bytes"] or (), row["budget"] or (), strict=True):
        if budget is not None and moved != budget:
            found.append(f"moves {moved:g} bytes per element {where} in accesses of 16 bytes, not {budget:g}")
    activation, targets = FAST
    _, name, layout = f"{row['kernel']}   ".split(" ", 2)
    fast = row["kernel"].startswith("backward") and name in activation and layout.startswith("split, ")
    if fast and "row ids" not in layout and "any F" not in layout and row["dtype"] == "bf16":
        for what, most in (("instructions", MOST_INSTRUCTIONS), ("xu", MOST_XU)):
            if row["target"] in targets and row[what] > most:
                found.append(f"takes {row[what]:g} {what} per element, more than {most}")
    return [f"{row['kernel']} {row['dtype']} on {row['target']}: {what}" for what in found]


def triton_rows(chosen):
    """The rows of these cases, made by a process for each processor."""
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        return pool.map(triton_row, chosen, chunksize=4)


def rows():
    """The whole table: the Triton kernels, then the CUDA sources where nvcc is there."""
    return triton_rows(cases.all_cases()) + cuda_rows()


def by_kernel(table):
    """The table with one row for each kernel and dtype, which has what was found for each of its targets."""
    found = {}
    for row in table:
        row = dict(row)
        about = row.pop("kernel"), row.pop("dtype")
        found.setdefault(about, {})[row.pop("target")] = row
    return [{"kernel": k, "dtype": dtype, "targets": targets} for (k, dtype), targets in found.items()]


def compilers():
    """What the table was compiled with."""
    return {"triton": triton.__version__, "nvcc": nvcc_version(), "date": datetime.date.today().isoformat()}


HEAD = ("kernel", "dtype", "target", "registers", "spilled", "shared", "B/element in 16s", "budget",
        "programs", "limited by", "instructions", "XU", "last load", "predicted")  # fmt: skip


def cells(row):
    """A row as texts in the order of HEAD; bytes are 'in the loop + outside it'."""
    predicted = f"{row['predicted_us']:.0f} µs" if "predicted_us" in row else ""
    moved, budget = (
        " + ".join("any" if b is None else f"{b:g}" for b in row[what] or ()) for what in ("bytes", "budget")
    )
    code = (f"{row[what]:g}" if what in row else "" for what in ("instructions", "xu", "last_load"))
    return (
        row["kernel"], row["dtype"], row["target"], str(row["registers"]), str(row["spilled"]),
        str(row["shared"]), moved, budget, str(row["programs"]), row["limit"], *code, predicted,
    )  # fmt: skip


def print_table(table):
    lines = [HEAD, *map(cells, table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip())
    cards = ", ".join(f"{d.card} {d.bandwidth / 1e12:.3g} TB/s" for d in DEVICES.values())
    print(f"Predicted, not measured: {PREDICTED[0]}×{PREDICTED[1]} at the data sheets' bandwidths ({cards}).")
