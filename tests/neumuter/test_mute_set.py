"""The mute file: round trip, atomic save, and that a damaged or hostile file can only fail."""

import contextlib
import json
import os
import struct
from dataclasses import replace

import pytest
import torch

import neumuter
from neumuter import MuteFileError, MuteSet
from neumuter import files as files_module
from neumuter.mutes.mute_set import MutedLayer
from tests.models import WIDTH, build

PATH = "model.layers.2.mlp"


@pytest.fixture(scope="module")
def mutes():
    with neumuter.attach(build("llama")) as masked:
        return masked.mute_set(
            {PATH: ([2, 17, 71], [0.0, 0.25, 0.5])}, method={"steps": 120, "lr": 0.1}, seed=2**63 + 1
        )


@pytest.fixture
def saved(mutes, tmp_path):
    mutes.save(tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_round_trip(mutes, saved):
    loaded = MuteSet.load(saved)
    for name in ("widths", "architecture", "fingerprint", "mode", "gain_range", "method", "seed", "metrics"):
        assert getattr(loaded, name) == getattr(mutes, name), name
    assert list(loaded.widths) == list(mutes.widths)
    assert loaded.layers.keys() == mutes.layers.keys()
    assert torch.equal(loaded.layers[PATH].indices, mutes.layers[PATH].indices)
    assert torch.equal(loaded.layers[PATH].gains, mutes.layers[PATH].gains)
    assert (loaded.count, loaded.share) == (3, 3 / (2 * WIDTH))
    assert loaded.architecture == {"class": "LlamaForCausalLM", "model_type": "llama"}


def test_layers_may_share_their_tensors(tmp_path):
    with neumuter.attach(build("llama")) as masked:
        indices, gains = torch.tensor([2, 17, 71], dtype=torch.int32), torch.tensor([0.0, 0.25, 0.5])
        layers = dict.fromkeys(masked.scores, (indices, gains))
        mutes = masked.mute_set(layers)
    shared = replace(mutes, layers=dict.fromkeys(mutes.layers, MutedLayer(indices, gains)))
    shared.save(tmp_path / "shared.safetensors")
    mutes.save(tmp_path / "apart.safetensors")
    assert (tmp_path / "shared.safetensors").read_bytes() == (tmp_path / "apart.safetensors").read_bytes()


def test_equal_content_gives_equal_bytes(mutes, saved):
    MuteSet.load(str(saved)).save(saved.with_name("b.safetensors"))
    assert saved.read_bytes() == saved.with_name("b.safetensors").read_bytes()


def test_metrics_that_are_not_numbers_do_not_lose_the_result(mutes, tmp_path):
    mutes.metrics["after"]["ppl"] = float("nan")
    mutes.save(tmp_path / "n.safetensors")
    assert MuteSet.load(tmp_path / "n.safetensors").metrics["after"] == {"ppl": None}
    del mutes.metrics["after"]["ppl"]


def test_failed_save_leaves_the_former_file(mutes, saved, monkeypatch):
    before = saved.read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(files_module.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        mutes.save(saved)
    assert os.listdir(saved.parent) == [saved.name]
    assert saved.read_bytes() == before


def split(data):
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])


def join(header, payload):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(payload)


def in_header(change):
    """A tampering that edits our metadata."""

    def tamper(header, payload):
        metadata = json.loads(header["__metadata__"]["neumuter"])
        change(metadata)
        header["__metadata__"]["neumuter"] = json.dumps(metadata)

    return tamper


def in_tensor(kind, index, value):
    def tamper(header, payload):
        start = header[f"{PATH}.{kind}"]["data_offsets"][0] + 4 * index
        payload[start : start + 4] = struct.pack("<i" if kind == "indices" else "<f", value)

    return tamper


def other_dtype(header, payload):
    header[f"{PATH}.gains"]["dtype"] = "I32"


def two_dimensional(header, payload):
    header[f"{PATH}.indices"]["shape"] = [3, 1]


def renamed(header, payload):
    header["model.layers.1.mlp.gains"] = header.pop(f"{PATH}.gains")


def no_metadata(header, payload):
    del header["__metadata__"]


def not_json(header, payload):
    header["__metadata__"]["neumuter"] = "{"


def deep_json(header, payload):
    header["__metadata__"]["neumuter"] = "[" * 100_000


def twice_in_json(header, payload):
    text = header["__metadata__"]["neumuter"]
    header["__metadata__"]["neumuter"] = '{"seed":1,' + text[1:]


def nan_in_json(header, payload):
    text = header["__metadata__"]["neumuter"]
    header["__metadata__"]["neumuter"] = text.replace('"lr":0.1', '"lr":NaN')


def infinite_in_a_wide_range(header, payload):
    """Beyond float32's range, in which gains are compared."""
    entry("mode", "modulate")(header, payload)
    entry("gain_range", [-1e300, 1e300])(header, payload)
    in_tensor("gains", 0, float("inf"))(header, payload)


def wide_range_of_integers(header, payload):
    entry("mode", "modulate")(header, payload)
    entry("gain_range", [0, 10**30])(header, payload)
    in_tensor("gains", 0, -1.0)(header, payload)


def number_too_large_in_json(header, payload):
    text = header["__metadata__"]["neumuter"]
    header["__metadata__"]["neumuter"] = text.replace('"after":{}', '"after":{"ma":1e999}')


def entry(key, value):
    return in_header(lambda metadata: metadata.__setitem__(key, value))


def layer_entry(key, value):
    return in_header(lambda metadata: metadata["layers"][1].__setitem__(key, value))


TAMPERINGS = {
    "index out of range": in_tensor("indices", 2, WIDTH),
    "negative index": in_tensor("indices", 0, -1),
    "indices not ascending": in_tensor("indices", 1, 2),
    "NaN gain": in_tensor("gains", 0, float("nan")),
    "infinite gain": in_tensor("gains", 0, float("inf")),
    "gain out of range": in_tensor("gains", 2, 1.5),
    "infinite gain in a wide range": infinite_in_a_wide_range,
    "wide range of integers": wide_range_of_integers,
    "number too large in JSON": number_too_large_in_json,
    "wrong dtype": other_dtype,
    "two-dimensional": two_dimensional,
    "unknown tensor": renamed,
    "no metadata": no_metadata,
    "not JSON": not_json,
    "deep JSON": deep_json,
    "key twice in JSON": twice_in_json,
    "NaN in JSON": nan_in_json,
    "unknown version": entry("format", 2),
    "no version": in_header(lambda metadata: metadata.pop("format")),
    "missing entry": in_header(lambda metadata: metadata.pop("seed")),
    "extra entry": entry("code", "import os"),
    "unknown mode": entry("mode", "shout"),
    "gain range too wide for the mode": entry("gain_range", [-2, 2]),
    "seed is text": entry("seed", "0"),
    "huge seed": entry("seed", 10**40),
    "gain range reversed": entry("gain_range", [1, 0]),
    "gain range too large": entry("gain_range", [-1e999, 1e999]),
    "gain range is a number": entry("gain_range", 1),
    "architecture is text": entry("architecture", "llama"),
    "architecture with control characters": entry(
        "architecture", {"class": "\x1b[2J", "model_type": "llama"}
    ),
    "method is a list": entry("method", []),
    "metrics is null": entry("metrics", None),
    "layers is a dict": entry("layers", {}),
    "no layers": entry("layers", []),
    "path is a number": layer_entry("path", 3),
    "path twice": layer_entry("path", "model.layers.1.mlp"),
    "path with a slash": layer_entry("path", "../../etc"),
    "width is text": layer_entry("width", "72"),
    "width is negative": layer_entry("width", -72),
    "width too small": layer_entry("width", 71),
    "width is huge": layer_entry("width", 2**40),
    "count is wrong": layer_entry("muted", 2),
    "count is a bool": layer_entry("muted", True),
    "count is negative": layer_entry("muted", -3),
    "sketch too short": layer_entry("sketch", [1.0]),
    "sketch of text": layer_entry("sketch", ["1"] * 32),
    "sketch too large": layer_entry("sketch", [10**400] + [0] * 31),
    "sketch is a number": layer_entry("sketch", 1),
}


@pytest.mark.parametrize("tamper", TAMPERINGS.values(), ids=TAMPERINGS.keys())
def test_tampered_file(saved, tamper):
    header, payload = split(saved.read_bytes())
    saved.write_bytes(join(header, payload))
    MuteSet.load(saved)
    tamper(header, payload)
    saved.write_bytes(join(header, payload))
    with pytest.raises(MuteFileError, match=saved.name):
        MuteSet.load(saved)


def test_truncated_anywhere(saved):
    data = saved.read_bytes()
    for size in [*range(0, len(data), 97), len(data) - 1]:
        saved.write_bytes(data[:size])
        with pytest.raises(MuteFileError):
            MuteSet.load(saved)


def test_flipped_bytes_fail_or_load_a_valid_set(saved):
    data = saved.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(len(data), (300,), generator=generator).tolist():
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        saved.write_bytes(damaged)
        with contextlib.suppress(MuteFileError):
            MuteSet.load(saved)


@pytest.mark.parametrize("size", [2**63, 2**40, 2**31, 100_000_001])
def test_huge_header_length(saved, size):
    saved.write_bytes(struct.pack("<Q", size) + saved.read_bytes()[8:])
    with pytest.raises(MuteFileError):
        MuteSet.load(saved)


def test_huge_file(saved):
    os.truncate(saved, 1 << 40)  # sparse
    with pytest.raises(MuteFileError, match="1099511627776 bytes"):
        MuteSet.load(saved)


def test_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(MuteFileError, match="not a regular file"):
            MuteSet.load(path)
    with pytest.raises(FileNotFoundError):
        MuteSet.load(tmp_path / "absent")


def test_pickle_is_not_a_mute_file(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "p.safetensors")
    with pytest.raises(MuteFileError):
        MuteSet.load(tmp_path / "p.safetensors")


def test_method_must_be_json(mutes):
    with pytest.raises(ValueError, match="method must hold JSON values"):
        MuteSet(
            mutes.layers, mutes.widths, mutes.architecture, mutes.fingerprint, method={"lr": torch.ones(1)}
        )
