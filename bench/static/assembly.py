"""The accesses to global memory in compiled kernels, read from PTX and from AMD's assembly."""

import re
from dataclasses import dataclass

PTX_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.[A-Za-z_:0-9]+)*?(?:\.v(\d))?\.[busf](\d+)\b")
AMD_ACCESS = re.compile(
    r"\b(?:global|buffer|flat)_(load|store)_(?:dword(?:x(\d))?|([usb]*?)(byte|short)\w*)\s+(.*)"
)
BLOCK = re.compile(r"(?:\$L__|\.L|(?://|;) %)([bB]{2}\.?\d\w*)")
REGISTER = re.compile(r"%[a-z]+\d+|%tid\.[xyz]")


@dataclass(frozen=True)
class Access:
    """width: bytes a thread; loop: the innermost loop around it, or None; uniform: one address for all."""

    kind: str
    width: int
    loop: str | None
    uniform: bool


def _blocks(assembly):
    """(line, innermost loop around it or None), as LLVM's comments on its basic blocks tell."""
    loop, label, heading = None, None, False
    for line in assembly.splitlines():
        text = line.strip()
        if match := BLOCK.match(text):
            loop, label, heading = None, match[1], True
        elif not text.startswith(("//", ";")):
            heading = False
        if heading and "Loop Header:" in text and "=>" in text:
            loop = label
        elif heading and loop is None and (inside := re.search(r"in Loop: Header=(\w+)", text)):
            loop = inside[1]
        yield text, loop


def _thread_registers(ptx):
    """The PTX registers whose values depend on the thread's number."""
    flows = []
    for line in ptx.splitlines():
        text = line.split("//")[0].strip()
        if not text or text.startswith((".", "$")) or re.search(r"\b(st|bra|ret|bar)\b", text):
            continue
        predicate, text = re.match(r"(@!?%p\d+)?\s*(.*)", text).groups()
        operands = re.match(r"\S+\s+(\{[^}]*\}|[^,;]+)(.*)", text)
        if operands:
            sources = set(REGISTER.findall(operands[2])) | set(REGISTER.findall(predicate or ""))
            flows.append((REGISTER.findall(operands[1]), sources))
    dependent = {"%tid.x"}
    while True:
        more = {d for targets, sources in flows if sources & dependent for d in targets} - dependent
        if not more:
            return dependent
        dependent |= more


def ptx_accesses(ptx):
    """The accesses of a kernel in PTX."""
    dependent = _thread_registers(ptx)
    found = []
    for text, loop in _blocks(ptx):
        if match := PTX_ACCESS.search(text):
            address = set(REGISTER.findall(re.search(r"\[([^\]]*)\]", text)[1]))
            kind = "load" if match[1] == "ld" else "store"
            width = int(match[2] or 1) * int(match[3]) // 8
            found.append(Access(kind, width, loop, not address & dependent))
    return found


def amd_accesses(assembly):
    """The accesses of a kernel in AMD's assembly; scalar loads, which are uniform, are left out."""
    found = []
    for text, loop in _blocks(assembly):
        if match := AMD_ACCESS.search(text):
            width = {"byte": 1, "short": 2}.get(match[4]) or 4 * int(match[2] or 1)
            offset = re.fullmatch(r"v\S+, (v\d+), s\[[^\]]*\].*", match[5])
            found.append(Access(match[1], width, loop, bool(offset) and _is_zero(assembly, offset[1])))
    return found


def bytes_in_loops(accesses, loops=1):
    """Bytes a thread moves in one turn of each of the source's loops, and outside; uniform ones left out.

    LLVM may unroll a loop, and keeps one for the remaining turns: then this one is counted.
    """
    moved = {None: 0}
    for a in accesses:
        if not a.uniform:
            moved[a.loop] = moved.get(a.loop, 0) + a.width
    outside, turns = moved.pop(None), sorted(moved.values())
    if len(turns) > loops:
        turns = turns[:1] if all(t % turns[0] == 0 for t in turns) else turns
    return sum(turns), outside


def _is_zero(assembly, register):
    """Whether nothing but zero is ever written to a vector register."""
    writes = re.findall(rf"^\s*[vg]\w+ (?:{register}),? *(.*)$", assembly, re.MULTILINE)
    return bool(writes) and all(re.match(r"0\b", w) for w in writes)
