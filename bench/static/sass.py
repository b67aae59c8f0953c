"""NVIDIA's machine code: how much of it an element takes, and when the last load is issued.

The control bits of an instruction tell how many cycles the next one waits, and on which earlier instructions
it waits. How long those take is not in the code: LATENCIES are typical numbers, so that cycles compare
kernels with one another and are no measurement.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);?\s*/\* 0x([0-9a-f]{16}) \*/"
)
CONTROL = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
LABEL = re.compile(r"^\.(L_x_\d+):")
# What the quarter-rate unit computes: exponentials, reciprocals, conversions between kinds of numbers.
XU = re.compile(r"(MUFU|F2F|F2I|I2F|FRND)(\.|$)")
LATENCIES = {"LDG": 500, "LDGSTS": 500, "LDS": 30, "LDC": 40, "S2R": 25, "S2UR": 25, "MUFU": 25, "BAR": 25}
OTHERS = 20  # cycles of another instruction that has no fixed latency


@dataclass(frozen=True)
class Instruction:
    """stall: cycles before the next one. waits: the barriers that it waits for, as bits. sets: the barriers
    that it sets until its result is there and until its operands are read, 7 for none. target: of a branch,
    the instruction that it jumps to, otherwise −1."""

    name: str
    target: int
    stall: int
    sets: tuple[int, int]
    waits: int

    @property
    def kind(self):
        return self.name.split(".")[0]

    @property
    def loads(self):
        return self.kind in ("LDG", "LDGSTS")


def _run(tool, *arguments):
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def disassemble(cubin):
    """Registers a thread, bytes of stack, the instructions, and the loops in them as (first, last + 1)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        text = _run("nvdisasm", "-c", "-hex", file.name)
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    found, labels = [], {}
    for line in text.splitlines():
        if match := LABEL.match(line):
            labels[match[1]] = len(found)
        elif match := INSTRUCTION.search(line):
            found.append(match.groups())
        elif match := CONTROL.match(line):
            found[-1] += (int(match[1], 16),)
    instructions = [
        Instruction(
            name, labels[to[0]] if name.startswith("BRA") and (to := re.search(r"L_x_\d+", rest)) else -1,
            bits >> 41 & 15, (bits >> 46 & 7, bits >> 49 & 7), bits >> 52 & 63,
        )
        for _, name, rest, _, bits in found
    ]  # fmt: skip
    while instructions[-1].kind in ("NOP", "BRA"):  # padding, and a trap behind the end
        instructions.pop()
    loops = [(i.target, n + 1) for n, i in enumerate(instructions) if 0 <= i.target <= n]
    return registers, stack, instructions, loops


def turn(instructions, loops):
    """The instructions of one turn of the loops that access global memory, or all where there is none."""
    bodies = [instructions[first:end] for first, end in loops]
    bodies = [body for body in bodies if any(i.loads or i.kind == "STG" for i in body)]
    return [i for body in bodies for i in body] or instructions


def xu_operations(instructions):
    return sum(bool(XU.match(i.name)) for i in instructions)


def cycles_to_last_load(instructions, loops):
    """Cycles until the last load of a program's first tile is issued, if it is alone on the multiprocessor.

    Loads that a branch passes by, such as those of tokens that fill no tile, do not count.
    """
    end = next((end for _, end in loops), len(instructions))
    clock, last, ready, place = 0, 0, [0] * 6, 0
    while place < end:
        i = instructions[place]
        place += 1
        clock = max([clock] + [ready[b] for b in range(6) if i.waits >> b & 1])
        if i.loads:
            last = clock
        written, read = i.sets
        if written < 6:
            ready[written] = max(ready[written], clock + LATENCIES.get(i.kind, OTHERS))
        if read < 6:  # until the operands may be overwritten
            ready[read] = max(ready[read], clock + OTHERS)
        clock += max(i.stall, 1)
        if (
            i.kind == "BRA"
            and place <= i.target < end
            and any(x.loads for x in instructions[place : i.target])
        ):
            place = i.target
    return last
