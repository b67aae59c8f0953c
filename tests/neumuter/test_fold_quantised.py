"""Mute sets folded into quantised checkpoints, which the tests write, and dequantise, on their own."""

import json
import logging
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import neumuter
from neumuter.models.families import find_ffns
from neumuter.serving.fold_checkpoint import fold_checkpoint
from neumuter.serving.formats import find_stored
from neumuter.serving.shards import find_places
from tests import models
from tests.models import batch, build

SIZES = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2)
GROUP = 32
GAINS = (0.0, -1.5, 0.3, 1.75)


class Quantised(NamedTuple):
    """Tensors as they are stored, and what gives the weights [N, K] back, given such tensors."""

    tensors: dict
    weights: object


def rounded(weight, bits, zeros):
    """Groups along the inputs: values [N, K] from 0 on, and scales [N, G]; zeros [N, G]."""
    groups = weight.unflatten(1, (-1, GROUP))
    scales = groups.abs().amax(2) * 2 / (2**bits - 1)
    values = (groups / scales[..., None]).round() + zeros[..., None]
    return values.clamp(0, 2**bits - 1).flatten(1).int(), scales


def spread(groups):
    return groups.float().repeat_interleave(GROUP, 1)


def pack(values, bits, order=None):
    """Pack along the last dimension, the lowest bits first."""
    each = 32 // bits
    order = order or range(each)
    parts = values.numpy().astype(np.uint32).reshape(*values.shape[:-1], -1, each)
    packed = sum(parts[..., place] << np.uint32(bits * shift) for shift, place in enumerate(order))
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


def gptq(weight, bits=4, version="gptq", ordered=False):
    generator = torch.Generator().manual_seed(0)
    shape = len(weight), weight.shape[1] // GROUP
    zeros = torch.randint(6, 10, shape, generator=generator) if bits == 4 else torch.full(shape, 128)
    order = torch.randperm(weight.shape[1], generator=generator) if ordered else torch.arange(weight.shape[1])
    values, scales = rounded(weight[:, order], bits, zeros)
    back = order.argsort()
    values, index = values[:, back], back // GROUP
    stored = zeros - (1 if version == "gptq" else 0)
    tensors = {
        "qweight": pack(values, bits).T, "qzeros": pack(stored.T, bits), "scales": scales.T.half(),
        "g_idx": index.int(),
    }  # fmt: skip

    def weights(tensors):
        return (values - zeros[:, index]) * tensors["scales"].T.float()[:, index]

    return Quantised(tensors, weights)


def awq(weight):
    zeros = torch.randint(6, 10, (len(weight), weight.shape[1] // GROUP), generator=torch.manual_seed(0))
    values, scales = rounded(weight, 4, zeros)
    # AutoAWQ packs outputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on.
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {
        "qweight": pack(values.T, 4, order), "qzeros": pack(zeros.T, 4, order), "scales": scales.T.half(),
    }  # fmt: skip
    return Quantised(tensors, lambda tensors: (values - spread(zeros)) * spread(tensors["scales"].T))


def packed(weight):
    values, scales = rounded(weight, 4, torch.full((len(weight), weight.shape[1] // GROUP), 8))
    tensors = {
        "weight_packed": pack(values, 4), "weight_scale": scales.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }  # fmt: skip
    return Quantised(tensors, lambda tensors: (values - 8) * spread(tensors["weight_scale"]))


def int8(weight):
    scales = weight.abs().amax(1, keepdim=True) / 127
    values = (weight / scales).round().to(torch.int8)
    tensors = {"weight": values, "weight_scale": scales.bfloat16()}
    return Quantised(tensors, lambda tensors: values.float() * tensors["weight_scale"].float())


def fp8(weight):
    scales = weight.abs().amax(1, keepdim=True) / 448
    tensors = {"weight": (weight / scales).to(torch.float8_e4m3fn), "weight_scale": scales}
    return Quantised(tensors, lambda tensors: tensors["weight"].float() * tensors["weight_scale"])


def fp8_blocks(weight):
    blocks = weight.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    scales = blocks.abs().amax((1, 3)) / 448
    full = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    tensors = {"weight": (weight / full).to(torch.float8_e4m3fn), "weight_scale_inv": scales}
    return Quantised(tensors, lambda tensors: tensors["weight"].float() * full)


def fp8_whole(weight):
    scale = weight.abs().max() / 448
    tensors = {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale.reshape(1)}
    return Quantised(tensors, lambda tensors: tensors["weight"].float() * scale)


COMPRESSED = {"quant_method": "compressed-tensors"}
FORMATS = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4}),
    "gptq 8 bits": (lambda w: gptq(w, 8), {"quant_method": "gptq", "bits": 8}),
    "gptq v2": (
        lambda w: gptq(w, version="v2"), {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
    ),
    "gptq in order of activations": (lambda w: gptq(w, ordered=True), {"quant_method": "gptq", "bits": 4}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "packed": (packed, COMPRESSED), "int8": (int8, COMPRESSED), "fp8": (fp8, COMPRESSED),
}  # fmt: skip
SHARED = {"blocks": (fp8_blocks, {"quant_method": "fp8"}), "whole": (fp8_whole, COMPRESSED)}


class Checkpoint:
    """A small llama, or another family, with quantised FFNs in ``folder``.

    ``model`` has the dequantised weights, ``mutes`` were made on the original ones.
    """

    def __init__(self, folder, quantise, options, gains=GAINS, name="llama", more=None):
        self.folder, self.stored = folder, {}
        self.model = build(name, **SIZES)
        self.mutes = some_mutes(self.model, gains)
        self.model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        for ffn in find_ffns(self.model):
            for child in filter(None, (ffn.layout.gate, ffn.layout.up, ffn.layout.gate_up, ffn.layout.down)):
                path = f"{ffn.path}.{child}"
                self.stored[path] = quantise(tensors.pop(f"{path}.weight"))
                tensors |= {f"{path}.{part}": t for part, t in self.stored[path].tensors.items()}
        tensors = {key: tensor.contiguous() for key, tensor in (tensors | (more or {})).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": options}))
        self.dequantise(folder)

    @torch.no_grad()
    def dequantise(self, folder):
        """Put the weights in ``folder`` into the model; returns its logits."""
        tensors = load_file(folder / "model.safetensors")
        for path, stored in self.stored.items():
            parts = {part: tensors[f"{path}.{part}"] for part in stored.tensors}
            self.model.get_submodule(path).weight[:] = stored.weights(parts)
        return self.model(batch()).logits


def some_mutes(model, gains):
    with neumuter.attach(model, start_layer=0) as masked:
        (first, _), *_, (last, scores) = masked.scores.items()
        neurons = {first: ([5, 7], gains[:2]), last: ([0, 2, 17, len(scores) - 1], gains)}
        return masked.mute_set(neurons, mode="modulate", gain_range=(-1e9, 1e9))


def test_an_ffn_with_a_norm_before_its_down_projection_is_refused(tmp_path, monkeypatch):
    """The norm takes the scale of a neuron out again."""
    monkeypatch.setitem(models.FAMILIES, "bitnet", ("bitnet", models.LLAMA_LIKE))
    checkpoint = Checkpoint(tmp_path / "model", *FORMATS["int8"], name="bitnet")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp has ffn_sub_norm beside its projections"):
        fold_checkpoint(tmp_path / "model", checkpoint.mutes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_layer_that_has_its_projections_itself_is_folded(tmp_path, monkeypatch):
    """The other children of OPT's layers stand around the projections, and not between them."""
    kind, options = models.FAMILIES["opt"]
    monkeypatch.setitem(models.FAMILIES, "opt", (kind, options | {"enable_bias": False}))
    silent = [0.0] * len(GAINS)
    checkpoint = Checkpoint(tmp_path / "model", *FORMATS["int8"], gains=silent, name="opt")
    with torch.no_grad(), neumuter.mute(checkpoint.model, some_mutes(checkpoint.model, silent)):
        expected = checkpoint.model(batch()).logits
    fold_checkpoint(tmp_path / "model", checkpoint.mutes, tmp_path / "out")
    torch.testing.assert_close(checkpoint.dequantise(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "phi3"])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_folded_checkpoint_is_the_muted_model(tmp_path, kind, name):
    quantise, options = FORMATS[kind]
    checkpoint = Checkpoint(tmp_path / "model", quantise, options, name=name)
    untouched = checkpoint.model(batch()).logits
    with neumuter.mute(checkpoint.model, some_mutes(checkpoint.model, GAINS)):
        expected = checkpoint.model(batch()).logits
    fold_checkpoint(tmp_path / "model", checkpoint.mutes, tmp_path / "out")
    actual = checkpoint.dequantise(tmp_path / "out")
    # Scales are float16 or bfloat16, rounded once.
    error = (actual - expected).norm() / (expected - untouched).norm()
    assert error < (1e-5 if kind == "fp8" else 0.01)
    assert (expected - untouched).abs().max() > 0.1
    before, after = (load_file(tmp_path / where / "model.safetensors") for where in ("model", "out"))
    changed = [key for key in before if not torch.equal(*(t[key].view(torch.uint8) for t in (before, after)))]
    scales = {"gptq": "scales", "awq": "scales"}.get(options["quant_method"], "weight_scale")
    assert changed == sorted(changed)
    assert {key.rpartition(".")[2] for key in changed} == {scales}
    count = sum(int((before[key] != after[key]).sum()) for key in changed)
    assert count == 6 * (before[changed[0]].numel() // max(before[changed[0]].shape))


@pytest.mark.parametrize("kind", [*FORMATS, *SHARED])
def test_our_dequantised_weights_are_those_of_the_format(tmp_path, kind):
    quantise, options = (FORMATS | SHARED)[kind]
    checkpoint = Checkpoint(tmp_path / "model", quantise, options)
    places = find_places([tmp_path / "model/model.safetensors"])
    for path, stored in checkpoint.stored.items():
        found = find_stored(path, places, options).weights()
        torch.testing.assert_close(found, stored.weights(stored.tensors), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", SHARED)
def test_shared_scales_of_fp8_take_0_and_minus_1(tmp_path, kind):
    quantise, options = SHARED[kind]
    checkpoint = Checkpoint(tmp_path / "model", quantise, options, gains=(0.0, -1.0, 1.0, -1.0))
    with neumuter.mute(checkpoint.model, some_mutes(checkpoint.model, (0.0, -1.0, 1.0, -1.0))):
        expected = checkpoint.model(batch()).logits
    fold_checkpoint(tmp_path / "model", checkpoint.mutes, tmp_path / "out")
    torch.testing.assert_close(checkpoint.dequantise(tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)
    other = some_mutes(build("llama", **SIZES), GAINS)
    with pytest.raises(ValueError, match=r"share, so it takes gains of 0 and -1 alone.*mlp has \[-1.5\]"):
        fold_checkpoint(tmp_path / "model", other, tmp_path / "other")


@pytest.mark.parametrize("kind", ["gptq", "int8", "fp8"])
def test_weights_of_another_model_are_refused(tmp_path, kind):
    checkpoint = Checkpoint(tmp_path / "model", *FORMATS[kind])
    other = some_mutes(build("llama", seed=1, **SIZES), GAINS)
    with pytest.raises(neumuter.MuteMismatchError, match="weights differ by 1"):
        fold_checkpoint(checkpoint.folder, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def no_bias(weight):
    quantised = int8(weight)
    return Quantised(quantised.tensors | {"bias": torch.zeros(len(weight))}, quantised.weights)


def test_biases_of_zero_pass_and_others_are_refused(tmp_path):
    checkpoint = Checkpoint(tmp_path / "model", no_bias, COMPRESSED)
    fold_checkpoint(tmp_path / "model", checkpoint.mutes, tmp_path / "out")
    more = {"model.layers.0.mlp.up_proj.bias": torch.ones(256)}
    checkpoint = Checkpoint(tmp_path / "biased", int8, COMPRESSED, more=more)
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj has a bias"):
        fold_checkpoint(tmp_path / "biased", checkpoint.mutes, tmp_path / "other")


@pytest.mark.parametrize("gains", [GAINS, (0.5, -1, 0, 1)])
def test_a_static_input_scale_takes_gains_up_to_1(tmp_path, gains):
    more = {"model.layers.0.mlp.down_proj.input_scale": torch.ones(1)}
    checkpoint = Checkpoint(tmp_path / "model", fp8, COMPRESSED, gains=gains, more=more)
    if gains != GAINS:
        fold_checkpoint(tmp_path / "model", checkpoint.mutes, tmp_path / "out")
        return
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj has a static input_scale.*has -1.5"):
        fold_checkpoint(tmp_path / "model", checkpoint.mutes, tmp_path / "out")


def test_scales_out_of_range_are_refused_and_coarse_ones_said(tmp_path, caplog):
    checkpoint = Checkpoint(tmp_path / "model", *FORMATS["gptq"], gains=(0, 1, 1, 1e8))
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj: its scales .* out of range of F16"):
        fold_checkpoint(tmp_path / "model", checkpoint.mutes, tmp_path / "out")
    coarse = some_mutes(build("llama", **SIZES), (0, 1, 1e-5, 1))
    with caplog.at_level(logging.WARNING, "neumuter"):
        fold_checkpoint(tmp_path / "model", coarse, tmp_path / "out")
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["model.layers.1.mlp.up_proj"]


BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize(
    ("quantise", "options"),
    [
        (lambda w: Quantised({"weight": torch.zeros(64, 1, dtype=torch.uint8)}, None), BITSANDBYTES),
        (gptq, {"quant_method": "gptq", "bits": 3}),
        (awq, {"quant_method": "awq", "bits": 4, "version": "gemv"}),
    ],
    ids=["bitsandbytes", "gptq of 3 bits", "awq gemv"],
)  # fmt: skip
def test_other_forms_are_refused_by_name(tmp_path, quantise, options, monkeypatch):
    monkeypatch.setattr(Checkpoint, "dequantise", lambda self, folder: None)
    checkpoint = Checkpoint(tmp_path / "model", quantise, options)
    with pytest.raises(
        ValueError, match=rf"down_proj is stored by {options['quant_method']} in a form that is"
    ):
        fold_checkpoint(tmp_path / "model", checkpoint.mutes, tmp_path / "out")


def test_experts_are_refused(tmp_path):
    model = build("gpt_oss")
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"quantization_config": COMPRESSED}))
    with pytest.raises(ValueError, match="holds experts; fold into the checkpoint that it was made from"):
        fold_checkpoint(tmp_path / "model", some_mutes(model, GAINS), tmp_path / "out")


def test_a_wrong_product_is_noticed(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "model", *FORMATS["gptq"])

    def wrong(factors, gains):
        return (factors.float() * gains * 1.01).to(factors.dtype)

    monkeypatch.setattr("neumuter.serving.fold_quantised.scaled", wrong)
    with pytest.raises(OSError, match="reads back other"):
        fold_checkpoint(tmp_path / "model", checkpoint.mutes, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
