"""NVIDIA's assembly in Triton's interpreter: the instructions that the kernels contain, on numpy arrays.

Approximate instructions are off by as much as NVIDIA's documentation allows, up or down at random.
"""

import contextlib
import re

import numpy as np

EX2_ERROR = 2.0**-22  # relative
LEAST_NORMAL = np.float32(2.0**-126)


def _bf16(x):
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded)


def _f16(x):
    return x.astype(np.float16).view(np.uint16).astype(np.uint32)


def _flushed(x):
    return np.where(np.abs(x) < LEAST_NORMAL, np.copysign(np.float32(0), x), x).astype(np.float32)


class Instructions:
    """What an instruction makes of its operands, all as bits of uint32."""

    def __init__(self, random):
        self.random = random

    def shl_b32(self, x, n):
        return x << np.uint32(n)

    def and_b32(self, x, mask):
        return x & np.uint32(mask)

    def cvt_rn_bf16x2_f32(self, high, low):
        return _bf16(high.view(np.float32)) << 16 | _bf16(low.view(np.float32))

    def cvt_rn_f16x2_f32(self, high, low):
        return _f16(high.view(np.float32)) << 16 | _f16(low.view(np.float32))

    def cvt_f32_f16(self, x):
        return x.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)

    def ex2_approx_ftz_f32(self, x):
        exact = np.exp2(_flushed(x.view(np.float32)).astype(np.float64))
        return _flushed((exact * (1 + EX2_ERROR * self._signs(x))).astype(np.float32)).view(np.uint32)

    def rcp_approx_ftz_f32(self, x):
        exact = (1.0 / _flushed(x.view(np.float32)).astype(np.float64)).astype(np.float32)
        towards = (np.inf * self._signs(x)).astype(np.float32)
        off = np.where(np.isfinite(exact) & (exact != 0), np.nextafter(exact, towards), exact)
        return _flushed(off.astype(np.float32)).view(np.uint32)

    def _signs(self, x):
        return self.random.choice([-1.0, 1.0], x.shape)


def run(text, outputs, inputs, instructions):
    """The registers $0 … of assembly whose next ones are ``inputs``."""
    registers = {f"${outputs + i}": x for i, x in enumerate(inputs)}
    for statement in re.sub(r"^\s*\{(.*)\}\s*$", r"\1", text, flags=re.DOTALL).split(";"):
        name, _, rest = statement.strip().partition(" ")
        if not name or name == ".reg":
            continue
        if name == "mov.b32":
            low, high, source = re.fullmatch(r"\{(\w+), (\w+)\}, (\w+)", rest).groups()
            registers[low], registers[high] = registers[source] & np.uint32(0xFFFF), registers[source] >> 16
            continue
        target, *sources = rest.split(", ")
        values = [registers[s] if s in registers else int(s, 0) for s in sources]
        registers[target] = getattr(instructions, name.replace(".", "_"))(*values)
    return [registers[f"${i}"] for i in range(outputs)]


@contextlib.contextmanager
def emulated(monkeypatch, seed=0):
    """Kernels that are launched in here are those for NVIDIA's GPUs."""
    from triton.runtime import interpreter

    from neumuter_kernels.triton import arithmetic

    instructions = Instructions(np.random.default_rng(seed))

    def create_inline_asm(self, text, constraints, values, types, is_pure, pack):
        (value,) = values
        flat = np.ascontiguousarray(value.data).reshape(-1)
        lanes = [flat[i::pack] for i in range(pack)]
        if flat.itemsize == 2:
            inputs = [
                lanes[0].view(np.uint16).astype(np.uint32) | lanes[1].view(np.uint16).astype(np.uint32) << 16
            ]
        else:
            inputs = [np.ascontiguousarray(lane).view(np.uint32) for lane in lanes]
        assert constraints.count("=") == pack
        assert len(constraints.split(",")) == pack + len(inputs)
        result = np.empty(flat.size, np.float32)
        for i, found in enumerate(run(text, pack, inputs, instructions)):
            result[i::pack] = np.ascontiguousarray(found).astype(np.uint32).view(np.float32)
        handle = interpreter.TensorHandle(result.reshape(value.data.shape), interpreter.tl.float32)
        return type("Call", (), {"get_result": lambda self, i: handle})()

    with monkeypatch.context() as patched:
        patched.setattr(arithmetic, "HAS_PTX", True)
        patched.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
        yield
