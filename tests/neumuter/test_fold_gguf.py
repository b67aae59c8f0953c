"""Mute sets folded into GGUF files: dequantised, they are the muted model, and no other byte has changed."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import neumuter
from neumuter.cli.app import main
from neumuter.models.families import find_ffns
from neumuter.serving import fold_gguf as folding
from neumuter.serving.fold_gguf import PLAIN, SCALES, fold_gguf
from neumuter.serving.gguf_file import TOLERANCES
from neumuter.serving.gguf_lora import export_gguf_lora
from tests.memory import growth
from tests.models import WIDTH, batch, build

gguf = pytest.importorskip("gguf")
from tests import gguf_files  # noqa: E402

GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "qwen2_moe", "qwen3_moe")
# Blocks are 256 weights wide at most.
WIDE = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2)


def some_mutes(model, gains=(0.0, -1.5, 0.3, 1.75)):
    """Neurons of the first FFN, and of the last: its first, its last, and those between."""
    with neumuter.attach(model, start_layer=0) as masked:
        (first, _), *_, (last, scores) = masked.scores.items()
        neurons = {first: ([5, 7], gains[:2]), last: ([0, 2, 17, len(scores) - 1], gains[:4])}
        return masked.mute_set(neurons, mode="modulate", gain_range=(-1e9, 1e9))


def differing(one, other):
    """How many bytes differ, of files of the same size."""
    before, after = (np.frombuffer(path.read_bytes(), np.uint8) for path in (one, other))
    assert len(before) == len(after)
    return int((before != after).sum())


def logits(model, mutes=None):
    if mutes is None:
        return model(batch()).logits
    with neumuter.mute(model, mutes):
        return model(batch()).logits


@pytest.mark.parametrize("name", GATED)
def test_the_folded_file_is_the_muted_model(tmp_path, name):
    model = gguf_files.quantised(tmp_path / "model.gguf", name)
    mutes = some_mutes(model)
    found = fold_gguf(tmp_path / "model.gguf", mutes, tmp_path / "out.gguf")
    assert (found.neurons, found.coarse) == (6, {})
    untouched, expected = logits(model), logits(model, mutes)
    folded = gguf_files.load_ffns(model, tmp_path / "out.gguf")
    torch.testing.assert_close(logits(folded), expected, rtol=1e-5, atol=1e-5)
    assert (expected - untouched).abs().max() > 0.01


def rows(model, path, mutes):
    """{tensor: {row of it: gain}} of what is muted in a llama."""
    return {
        f"blk.{path.split('.')[2]}.ffn_up.weight": dict(zip(*map(torch.Tensor.tolist, layer), strict=True))
        for path, layer in mutes.layers.items()
    }


@pytest.mark.parametrize("kind", [*SCALES, *PLAIN])
def test_only_the_scales_of_muted_rows_change(tmp_path, kind):
    model = gguf_files.quantised(tmp_path / "model.gguf", "llama", up=kind, **WIDE)
    mutes = some_mutes(model)
    fold_gguf(tmp_path / "model.gguf", mutes, tmp_path / "out.gguf")
    before, after = (gguf_files.tensors(tmp_path / name) for name in ("model.gguf", "out.gguf"))
    most = 0
    for name, gains in rows(model, tmp_path, mutes).items():
        source, result = (
            gguf.dequantize(found[name].data, found[name].tensor_type) for found in (before, after)
        )
        rest = np.ones(len(source), bool)
        for row, gain in gains.items():
            rest[row] = False
            error = np.linalg.norm(result[row] - source[row] * np.float32(gain))
            assert error <= (2**-8 if kind == "BF16" else 2**-9) * abs(gain) * np.linalg.norm(source[row])
            assert np.array_equal(result[row], 0 * source[row]) == (gain == 0)
        assert np.array_equal(result[rest], source[rest])
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        scales = 2 * SCALES[kind][1] if kind in SCALES else size
        most += len(gains) * 256 // block * scales
    changed = differing(tmp_path / "model.gguf", tmp_path / "out.gguf")
    assert most / 3 < changed <= most


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_1"])
def test_quantised_experts_are_the_muted_model(tmp_path, kind):
    model = gguf_files.quantised(tmp_path / "model.gguf", "qwen3_moe", up=kind)
    mutes = some_mutes(model)
    fold_gguf(tmp_path / "model.gguf", mutes, tmp_path / "out.gguf")
    expected = logits(model, mutes)
    folded = gguf_files.load_ffns(model, tmp_path / "out.gguf")
    torch.testing.assert_close(logits(folded), expected, rtol=2e-3, atol=2e-3)


def measure(file, mutes, small, small_mutes):
    """Print by how many bytes the resident memory grows at most; ``small`` has everything imported first."""
    fold_gguf(small, small_mutes, f"{small}-out")
    print(growth(lambda: fold_gguf(file, mutes, f"{file}-out")))


def test_memory_is_that_of_a_few_pieces(tmp_path):
    for name, sizes in {
        "small": {},
        "large": dict(hidden_size=512, intermediate_size=4096, num_hidden_layers=6),
    }.items():
        model = build("llama", **sizes)
        gguf_files.write_gguf(tmp_path / name, "llama", model)
        some_mutes(model).save(tmp_path / f"{name}.safetensors")
    size = (tmp_path / "large").stat().st_size
    assert size > 150e6
    arguments = [str(tmp_path / x) for x in ("large", "large.safetensors", "small", "small.safetensors")]
    code = "import sys; from tests.neumuter.test_fold_gguf import measure; measure(*sys.argv[1:])"
    result = subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE)
    assert int(result.stdout.split()[-1]) < size / 4


def test_the_command(tmp_path, capsys):
    model = gguf_files.quantised(tmp_path / "model.gguf", "llama", up="Q8_0")
    some_mutes(model).save(tmp_path / "mutes.safetensors")
    fold_gguf(tmp_path / "model.gguf", tmp_path / "mutes.safetensors", tmp_path / "expected.gguf")
    files = [str(tmp_path / name) for name in ("model.gguf", "mutes.safetensors", "out.gguf")]
    for code, words in ((0, "6 neurons folded; the new file is"), (1, "out.gguf exists; name another file")):
        with pytest.raises(SystemExit) as stop:
            main(["fold", *files[:2], "--out", files[2]])
        assert stop.value.code == code
        assert words in " ".join("".join(capsys.readouterr()).split())
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["expected.gguf", "model.gguf", "mutes.safetensors", "out.gguf"]
    )


def test_a_disk_that_loses_bits_leaves_nothing(tmp_path, monkeypatch):
    model = gguf_files.quantised(tmp_path / "model.gguf", "llama", up="Q8_0")
    size = (tmp_path / "model.gguf").stat().st_size
    lose = lambda file, *_: os.pwrite(file, b"\xff\xfe", size - 64)  # noqa: E731
    monkeypatch.setattr(os, "posix_fadvise", lose)
    with pytest.raises(OSError, match="reads back other than it was written"):
        fold_gguf(tmp_path / "model.gguf", some_mutes(model), tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("spoil", ["another byte", "another factor"])
def test_a_wrong_product_is_noticed(tmp_path, monkeypatch, spoil):
    model = gguf_files.quantised(tmp_path / "model.gguf", "llama", up="Q8_0")
    fold = folding._Row._fold

    def spoilt(row, data):
        fold(row, data)
        if spoil == "another byte":
            data[5] ^= 1
        elif row.gain:
            factors = row.factors(data)
            factors.copy_(factors * 1.01)

    monkeypatch.setattr(folding._Row, "_fold", spoilt)
    with pytest.raises(OSError, match="reads back other"):
        fold_gguf(tmp_path / "model.gguf", some_mutes(model), tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


# --- Whose weights they are ------------------------------------------------------------------


@pytest.mark.parametrize("down", ["F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4"])
def test_quantised_weights_are_known_and_those_of_others_are_not(tmp_path, down):
    model = build("llama", intermediate_size=96)
    mutes = some_mutes(model)
    gguf_files.write_gguf(tmp_path / "own.gguf", "llama", model, up="Q8_0", down=down)
    other = build("llama", seed=1, intermediate_size=96)
    gguf_files.write_gguf(tmp_path / "other.gguf", "llama", other, up="Q8_0", down=down)
    fold_gguf(tmp_path / "own.gguf", mutes, tmp_path / "out.gguf")
    with pytest.raises(neumuter.MuteMismatchError, match=r"weights differ by 1\d\d"):
        fold_gguf(tmp_path / "other.gguf", mutes, tmp_path / "out2.gguf")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4"])
def test_a_tolerance_is_twice_what_the_quantiser_does(kind):
    weights = np.random.default_rng(0).normal(size=(64, 4096)).astype(np.float32)
    number = gguf.GGMLQuantizationType[kind]
    error = np.linalg.norm(gguf.dequantize(gguf.quantize(weights, number), number) - weights)
    share = error / np.linalg.norm(weights)
    assert 1.8 * share <= TOLERANCES[kind]
    # 2 % is what a rounded model may be away from the one that a set was made for.
    assert TOLERANCES[kind] <= max(2.4 * share, 0.02)


def test_a_set_that_was_folded_by_columns_is_noticed(tmp_path):
    model = build("llama", intermediate_size=1024)
    mutes = some_mutes(model, gains=(0.0, 0.0, -1.0, 2.5))
    neumuter.fold(model, mutes)
    gguf_files.write_gguf(tmp_path / "model.gguf", "llama", model, up="Q8_0", down="Q4_0")
    with pytest.raises(neumuter.MuteMismatchError, match="muted columns"):
        fold_gguf(tmp_path / "model.gguf", mutes, tmp_path / "out.gguf")


def test_a_set_that_was_folded_by_rows_is_noticed_by_its_silent_neurons(tmp_path):
    model = gguf_files.quantised(tmp_path / "model.gguf", "llama", up="Q4_0")
    mutes = some_mutes(model)
    fold_gguf(tmp_path / "model.gguf", mutes, tmp_path / "out.gguf")
    with pytest.raises(ValueError, match="all neurons to silence are silent"):
        fold_gguf(tmp_path / "out.gguf", mutes, tmp_path / "twice.gguf")


# --- What is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["MXFP4", "IQ1_M", "NVFP4"])
def test_types_without_float16_scales_are_refused(tmp_path, kind):
    model = build("llama", **WIDE)
    gguf_files.write_gguf(tmp_path / "model.gguf", "llama", model, up=kind)
    with pytest.raises(ValueError, match=rf"blk.0.ffn_up.weight is of type {kind}, which has no float16"):
        fold_gguf(tmp_path / "model.gguf", some_mutes(model), tmp_path / "out.gguf")


def test_plain_ffns_take_gains_of_0_alone(tmp_path):
    model = gguf_files.quantised(tmp_path / "model.gguf", "starcoder2", up="Q8_0", use_bias=False)
    with pytest.raises(ValueError, match=r"layers.0.mlp is not gated, so rows of blk.0.ffn_up.weight can"):
        fold_gguf(tmp_path / "model.gguf", some_mutes(model), tmp_path / "out.gguf")
    mutes = some_mutes(model, gains=(0, 0, 0, 0))
    fold_gguf(tmp_path / "model.gguf", mutes, tmp_path / "out.gguf")
    expected = logits(model, mutes)
    folded = gguf_files.load_ffns(model, tmp_path / "out.gguf")
    torch.testing.assert_close(logits(folded), expected, rtol=1e-5, atol=1e-5)


def test_biases_are_refused(tmp_path):
    model = build("starcoder2")
    gguf_files.write_gguf(tmp_path / "model.gguf", "starcoder2", model)
    with pytest.raises(ValueError, match=r"blk.0.ffn_up.weight has a bias"):
        fold_gguf(tmp_path / "model.gguf", some_mutes(model), tmp_path / "out.gguf")
    biased = build("llama")
    more = [("blk.2.ffn_up.bias", np.zeros(WIDTH, np.float32))]
    gguf_files.write_gguf(tmp_path / "biased.gguf", "llama", biased, more=more)
    with pytest.raises(ValueError, match=r"blk.2.ffn_up.weight has a bias"):
        fold_gguf(tmp_path / "biased.gguf", some_mutes(biased), tmp_path / "out.gguf")


def test_scales_out_of_range_are_refused_and_coarse_ones_counted(tmp_path):
    model = gguf_files.quantised(tmp_path / "model.gguf", "llama", up="Q8_0")
    with pytest.raises(ValueError, match=r"blk.2.ffn_up.weight, row 71: its scales times 1e\+08 are out of"):
        fold_gguf(tmp_path / "model.gguf", some_mutes(model, (0, 1, 1, 1e8)), tmp_path / "out.gguf")
    found = fold_gguf(tmp_path / "model.gguf", some_mutes(model, (0, 1e-4, 1e-3, 1)), tmp_path / "out.gguf")
    assert found.coarse == {"blk.0.ffn_up.weight": 1, "blk.2.ffn_up.weight": 1}


def rename(architecture):
    def change(data):
        return data.replace(b"llama", architecture)

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: b"GGML" + data[4:], "is not a GGUF file"),
        (lambda data: data[:3000], "cannot be read: .*; it is damaged"),
        (rename(b"grok2"), "transformers cannot read the architecture grok2 from GGUF"),
        (rename(b"qwen2"), "class: mute set LlamaForCausalLM, model Qwen2ForCausalLM"),
        (lambda data: data.replace(b"blk.1.ffn_down", b"blk.1.ffn_gone"), "no tensor for model.layers.1.mlp"),
    ],
    ids=["magic", "damaged", "unknown", "another", "missing"],
)
def test_files_that_cannot_be_used(tmp_path, spoil, message):
    model = build("llama")
    gguf_files.write_gguf(tmp_path / "model.gguf", "llama", model)
    (tmp_path / "spoilt.gguf").write_bytes(spoil((tmp_path / "model.gguf").read_bytes()))
    with pytest.raises(ValueError, match=message):
        fold_gguf(tmp_path / "spoilt.gguf", some_mutes(model), tmp_path / "out.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "spoilt.gguf"]


def test_one_part_of_several_is_refused(tmp_path):
    model = build("llama")
    gguf_files.write_gguf(tmp_path / "model.gguf", "llama", model, more=[("split.count", 3)])
    with pytest.raises(ValueError, match="is one of 3 parts; merge them first"):
        fold_gguf(tmp_path / "model.gguf", some_mutes(model), tmp_path / "out.gguf")


def test_experts_that_add_to_up_are_refused(tmp_path, monkeypatch):
    """transformers reads no small gpt-oss from GGUF, so the same is made of another mixture."""
    model = gguf_files.quantised(tmp_path / "model.gguf", "qwen3_moe")
    mutes = some_mutes(model)
    experts = type(find_ffns(model)[0].module)
    monkeypatch.setattr(experts, "_apply_gate", lambda self, x: x)
    with pytest.raises(ValueError, match=r"mlp.experts computes something else than φ\(gate\)·up"):
        fold_gguf(tmp_path / "model.gguf", mutes, tmp_path / "out.gguf")


def test_without_the_package(tmp_path, monkeypatch):
    model = gguf_files.quantised(tmp_path / "model.gguf", "llama")
    mutes = some_mutes(model)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install gguf"):
        fold_gguf(tmp_path / "model.gguf", mutes, tmp_path / "out.gguf")


# --- LoRA adapters for llama.cpp -------------------------------------------------------------


@pytest.mark.parametrize(("name", "up"), [("llama", "Q8_0"), ("llama", "MXFP4"), ("starcoder2", "F32")])
def test_the_adapter_makes_the_muted_model(tmp_path, name, up):
    model = gguf_files.quantised(tmp_path / "model.gguf", name, up=up, down="Q8_0", intermediate_size=96)
    mutes = some_mutes(model)
    export_gguf_lora(tmp_path / "model.gguf", mutes, tmp_path / "lora.gguf")
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    fields = {"general.type": "adapter", "general.architecture": name, "adapter.type": "lora"}
    for key, value in (fields | {"adapter.lora.alpha": 0.0}).items():
        assert reader.get_field(key).contents() == value
    expected, found = logits(model, mutes), gguf_files.tensors(tmp_path / "lora.gguf")
    assert {tensor.shape[1] for key, tensor in found.items() if key.endswith("lora_a")} == {2, 4}
    for ffn in find_ffns(model):
        key = f"blk.{ffn.path.split('.')[2]}.ffn_down.weight.lora_"
        if ffn.path in mutes.layers:
            a, b = (torch.from_numpy(found[key + which].data.copy()) for which in "ab")
            with torch.no_grad():
                # With alpha 0 llama.cpp adds B·A as it is.
                ffn.down.weight += b @ a
    assert len(found) == 4
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_adapters_of_experts_are_refused(tmp_path):
    model = gguf_files.quantised(tmp_path / "model.gguf", "qwen3_moe")
    with pytest.raises(ValueError, match="holds experts"):
        export_gguf_lora(tmp_path / "model.gguf", some_mutes(model), tmp_path / "lora.gguf")
