"""Damaged and hostile mute files: each loads as a valid set or raises MuteFileError; nothing else happens.

16,000 files in a process of its own, whose memory is limited, so that a crash, a hang and an allocation that
a file asks for all show. ``NEUMUTER_FUZZ_FILES`` and ``NEUMUTER_FUZZ_SEED`` ask for more, and for others.
"""

import contextlib
import json
import math
import os
import random
import resource
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from neumuter import MuteFileError, MuteSet
from neumuter.mutes.container import MAX_HEADER_BYTES
from neumuter.mutes.mute_set import MutedLayer

FILES = int(os.environ.get("NEUMUTER_FUZZ_FILES", 16_000))
SEED = int(os.environ.get("NEUMUTER_FUZZ_SEED", 0))
ROOM = 1 << 28  # bytes of address space for small files, beyond what is in use before
HEADER_ROOM = 1 << 29  # for the largest header
SLOW = 5.0  # seconds of CPU time for one file
SAVED = 97  # of the sets that load, every so many is saved again

NUMBERS = (
    0, 1, -1, 2, 3, 31, 71, 72, 73, 2**15, 2**24, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64,
    10**25,
)  # fmt: skip
VALUES = (
    *NUMBERS, 0.0, -0.5, 1e-320, 1e300, 1e308, True, False, None, "", "mute", "modulate", "0", "\x00",
    "\ud800", "ü" * 200, "../../etc/passwd", "a.b", "h.1.mlp", [], [0], [0, 1], [1, 0], [-2, 2], [[]], {},
    {"": {}}, {"format": 1},
)  # fmt: skip
SHAPES = ([], [0], [1], [2], [3], [3, 1], [2**62, 4], [2**32, 2**32], [2**64], [-3], [3.0], "3")
DTYPES = (
    "F32", "F64", "F16", "BF16", "I8", "U8", "I16", "I32", "I64", "BOOL", "F8_E4M3", "F4", "C64", "", "f32",
)  # fmt: skip
WORDS = (0, 1, -1, 2, 71, 72, -(2**31), 2**31 - 1, 0x7FC00000, 0x7F800000, -0x00800000, 0x3F800000)
RAW = (
    "NaN", "Infinity", "-Infinity", "1e999", "-0", "01", "", "1" * 5000, '"\\ud800"', "[" * 3000,
    '{"a":' * 3000, "[" * 500 + "]" * 500,
)  # fmt: skip


def corpus():
    """Valid mute sets: one in few words, one with much in it."""
    much = {"steps": 120, "lr": 0.1, "names": ["é", "\x1b[2J"], "deep": {"a": [None, True, {"b": [1.5]}]}}
    alternating = [(-1) ** i / 2 for i in range(24)]
    sketch = [math.sin(i) for i in range(64)]
    for muted, mode, gain_range, method in (
        ({"model.layers.1.mlp": ([2, 17, 71], [0.0, 0.25, 0.5])}, "mute", (0.0, 1.0), {}),
        ({f"h.{i}.mlp": (range(i, 72, 3), alternating) for i in range(3)}, "modulate", (-2.0, 2.0), much),
    ):
        layers = {
            path: MutedLayer(torch.tensor(list(indices), dtype=torch.int32), torch.tensor(gains))
            for path, (indices, gains) in muted.items()
        }
        widths = dict.fromkeys(["model.layers.0.mlp", *layers], 72)
        yield MuteSet(
            layers,
            widths,
            architecture={"class": "LlamaForCausalLM", "model_type": "llama"},
            fingerprint={path: sketch[: 64 if path in layers else 32] for path in widths},
            mode=mode,
            gain_range=gain_range,
            method=method,
            metrics={"before": {"ma": 0.9}, "after": {}},
            adapter={"model.layers.1.self_attn.q_proj": sketch} if method else {},
        )


# --- Mutations -------------------------------------------------------------------------------


def split(data):
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header, payload):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def places(value, found=None):
    """Every (container, key) of a JSON value."""
    found = [] if found is None else found
    for key in value if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], dict | list):
            places(value[key], found)
    return found


def edit(draw, value):
    """Change one thing somewhere in a JSON value."""
    container, key = draw.choice(places(value))
    action = draw.randrange(6)
    if action == 0:
        del container[key]
    elif action == 1 and isinstance(container, dict):
        container[draw.choice(("", "x", "path", "format", f"{key} "))] = container.pop(key)
    elif action == 2:
        container[key] = [container[key]] * draw.choice((1, 2, 40))
    elif action == 3 and isinstance(container[key], int | float):
        container[key] += draw.choice((1, -1, 0.5, 1e-7))
    else:
        container[key] = draw.choice(VALUES)


def flipped(draw, data, other):
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def overwritten(draw, data, other):
    start, size = draw.randrange(len(data)), draw.choice((1, 2, 4, 8, 64, 500))
    return data[:start] + draw.choice((b"\0", b"\xff", b'"', b"{", b"\xc3")) * size + data[start + size :]


def inserted(draw, data, other):
    start, size = draw.randrange(len(data)), draw.choice((1, 2, 4, 8, 64))
    return data[:start] + draw.randbytes(size) + data[start:]


def truncated(draw, data, other):
    return data[: draw.choice((draw.randrange(len(data)), len(data) - 1, 8, 7, 9))]


def cut(draw, data, other):
    start = draw.randrange(len(data))
    return data[:start] + data[start + draw.choice((1, 4, 8, 100)) :]


def doubled(draw, data, other):
    start, end = sorted(draw.sample(range(len(data)), 2))
    return data[:end] + data[start:]


def spliced(draw, data, other):
    if draw.randrange(2):
        return join(json.dumps(split(data)[0]).encode(), split(other)[1])
    return data[: draw.randrange(len(data))] + other[draw.randrange(len(other)) :]


def of_other_length(draw, data, other):
    (size,) = struct.unpack("<Q", data[:8])
    sizes = (0, 1, size - 1, size + 1, len(data), len(data) - 8, 2**24 + 1, 2**31, 2**32, 2**63, 2**64 - 1)
    return struct.pack("<Q", max(draw.choice(sizes), 0)) + data[8:]


def tensors_edited(draw, data, other):
    header, payload = split(data)
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry, action = header[name], draw.randrange(5)
    if action == 0:
        entry["dtype"] = draw.choice(DTYPES)
    elif action == 1:
        entry["shape"] = draw.choice(SHAPES)
    elif action == 2:
        offsets = (*entry["data_offsets"], *NUMBERS)
        entry["data_offsets"] = draw.choices(offsets, k=draw.choice((2, 2, 2, 1, 3)))
    elif action == 3:
        header[draw.choice(("x", "", "a.indices", name + ".gains", "__metadata__ "))] = header.pop(name)
    else:
        edit(draw, header)
    return join(header, payload)


def metadata_edited(draw, data, other):
    header, payload = split(data)
    metadata = json.loads(header["__metadata__"]["neumuter"])
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        edit(draw, metadata)
    header["__metadata__"]["neumuter"] = json.dumps(metadata)
    return join(header, payload)


def metadata_text_edited(draw, data, other):
    """What json.dumps would not write: constants, entries twice, depth, numbers of many digits."""
    header, payload = split(data)
    text = header["__metadata__"]["neumuter"]
    low, high = sorted(draw.choices([i for i, c in enumerate(text) if c in ":,"], k=2))
    if draw.randrange(2):
        text = text[: low + 1] + draw.choice(RAW) + text[draw.choice((low + 1, low + 2, high)) :]
    else:
        text = text[:high] + text[low:]
    header["__metadata__"]["neumuter"] = text
    return join(header, payload)


def payload_edited(draw, data, other):
    header, payload = split(data)
    payload = bytearray(payload)
    for _ in range(draw.choice((1, 1, 2, 6))):
        at = 4 * draw.randrange(len(payload) // 4)
        payload[at : at + 4] = struct.pack("<i", draw.choice(WORDS))
    return join(json.dumps(header).encode(), bytes(payload))


MUTATIONS = (
    flipped, overwritten, inserted, truncated, cut, doubled, spliced, of_other_length,
    *(tensors_edited, payload_edited) * 2, *(metadata_edited,) * 3, metadata_text_edited,
)  # fmt: skip
TOO_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, struct.error, RecursionError)


def mutated(files, seed, number):
    """The bytes of the file of that number."""
    draw = random.Random(seed * 2**32 + number)
    data = draw.choice(files)
    for _ in range(draw.choice((1, 1, 1, 2))):
        with contextlib.suppress(*TOO_DAMAGED):  # for a second mutation
            data = bytes(draw.choice(MUTATIONS)(draw, data, draw.choice(files)))
    return data


# --- What a file may do ----------------------------------------------------------------------


def check(mutes):
    """A loaded set is what docs/mute-file.md says, seen by other code than the loader's."""
    low, high = map(float, mutes.gain_range)
    assert -math.inf < low <= high < math.inf
    assert mutes.mode == "modulate" or (mutes.mode, 0 <= low <= high <= 1) == ("mute", True)
    assert mutes.layers
    for path, (indices, gains) in mutes.layers.items():
        assert (indices.dtype, gains.dtype) == (torch.int32, torch.float32)
        neurons = indices.tolist()
        assert neurons == sorted(set(neurons))
        assert len(gains) == len(neurons) > 0
        assert 0 <= neurons[0] <= neurons[-1] < mutes.widths[path] <= 2**24
        assert all(map(math.isfinite, gains.tolist()))
        assert ((gains >= low) & (gains <= high)).all()  # in float32
    assert mutes.widths.keys() == mutes.fingerprint.keys()
    for path, sketch in (mutes.fingerprint | mutes.adapter).items():
        assert len(sketch) == (64 if path in mutes.layers or path in mutes.adapter else 32)
        assert all(map(math.isfinite, sketch))
        assert not {"/", "\\", "..", "\0"} & {*path, *(path[i : i + 2] for i in range(len(path)))}
    json.dumps([mutes.method, mutes.metrics, mutes.seed], allow_nan=False)


def check_saved(mutes, path):
    """What loads can be saved, and says the same again."""
    mutes.save(path)
    again, first = MuteSet.load(path), path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first
    for name in (
        "widths",
        "architecture",
        "fingerprint",
        "adapter",
        "mode",
        "gain_range",
        "method",
        "seed",
        "metrics",
    ):
        assert getattr(again, name) == getattr(mutes, name), name
    assert again.layers.keys() == mutes.layers.keys()
    for name, layer in mutes.layers.items():
        assert all(torch.equal(x, y) for x, y in zip(again.layers[name], layer, strict=True))


def load_each(memory, files, count, seed, saved):
    """Load that many files, each as the memory file ``memory``. Returns what happened."""
    path, loaded, messages = Path(f"/proc/self/fd/{memory}"), 0, set()
    for number in range(count):
        data = mutated(files, seed, number)
        os.truncate(memory, 0)
        os.pwrite(memory, data, 0)
        start = time.process_time()
        try:
            mutes = MuteSet.load(path)
        except MuteFileError as error:
            messages.add(str(error).split("valid mute file: ")[-1][:24])
        else:
            loaded += 1
            check(mutes)
            if loaded % SAVED == 0:
                check_saved(mutes, saved)
        if (seconds := time.process_time() - start) > SLOW:
            raise TimeoutError(f"file {number} took {seconds:.1f} s of CPU time")
    return {"loaded": loaded, "messages": len(messages)}


def limit_memory(room):
    """From here on, allocations beyond ``room`` bytes fail."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + room, resource.RLIM_INFINITY))


def fuzz(folder, count, seed):
    """``load_each`` in little memory; keeps the file at which it ended early."""
    folder = Path(folder)
    for number, mutes in enumerate(corpus()):
        mutes.save(folder / f"{number}.safetensors")
        check(MuteSet.load(folder / f"{number}.safetensors"))
    files = [path.read_bytes() for path in sorted(folder.iterdir())]
    memory = os.memfd_create("mutated")
    limit_memory(ROOM)
    try:
        return load_each(memory, files, count, seed, folder / "saved.safetensors")
    except BaseException:
        (folder / "culprit.safetensors").write_bytes(os.pread(memory, os.fstat(memory).st_size, 0))
        raise


def load_largest_header(folder):
    """The most memory that a header can ask for: lists in lists, of 3 bytes and 64 in memory each."""
    path, text = Path(folder) / "header.safetensors", "[" + "[]," * ((MAX_HEADER_BYTES - 100) // 3) + "[]]"
    path.write_bytes(join({"__metadata__": {"neumuter": text}}, b""))
    limit_memory(HEADER_ROOM)
    try:
        MuteSet.load(path)
    except MuteFileError as error:
        return str(error)


def in_a_process(call, seconds):
    """The value of ``call``, an expression in this module's names, in a process with that much CPU time."""
    code = f"""
import json
from tests.neumuter.test_mute_file_fuzz import *
resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
print(json.dumps({call}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def test_a_mutated_file_loads_as_valid_or_raises_our_error(tmp_path):
    found = in_a_process(f"fuzz({str(tmp_path)!r}, {FILES}, {SEED})", 600 + FILES // 100)
    assert 0.02 * FILES < found["loaded"] < 0.5 * FILES, found  # both outcomes are common
    assert found["messages"] > 60, found  # and many checks refuse


def test_memory_for_a_header_is_bounded(tmp_path):
    assert "is not a dict" in in_a_process(f"load_largest_header({str(tmp_path)!r})", 600)
    path = tmp_path / "header.safetensors"
    with open(path, "r+b") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
    with pytest.raises(MuteFileError, match=f"header has {MAX_HEADER_BYTES + 1} bytes"):
        MuteSet.load(path)


def test_a_set_that_could_not_be_loaded_is_not_saved(tmp_path):
    mutes = replace(next(corpus()), method={"texts": ["x" * MAX_HEADER_BYTES]})
    with pytest.raises(ValueError, match="its header has"):
        mutes.save(tmp_path / "large.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_loaded_set_does_not_change_with_its_file(tmp_path):
    path = tmp_path / "mutes.safetensors"
    next(corpus()).save(path)
    mutes = MuteSet.load(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    check(mutes)
    assert mutes.layers["model.layers.1.mlp"].indices.tolist() == [2, 17, 71]
