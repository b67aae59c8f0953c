"""Checkpoints that went through a loaded model, as programs read them that are not transformers 5."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import neumuter
from neumuter.cli.app import main
from neumuter.serving.saved import save_verified
from tests.models import build, tokenizer

THETA = 500000.0


@pytest.fixture
def folder(tmp_path):
    """A checkpoint as transformers 4 wrote it, with two mute files."""
    model = build("llama", rope_parameters={"rope_type": "default", "rope_theta": THETA})
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "model/config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    file.write_text(
        json.dumps(config | {"rope_theta": THETA, "rope_scaling": None, "torch_dtype": "float32"})
    )
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [2, 5], "temperature": 0.6}')
    (tmp_path / "model/special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "model/LICENSE").write_text("free")
    (tmp_path / "model/README.md").write_text("# A model\n")
    with neumuter.attach(model, start_layer=0) as masked:
        for name, first in (("a", 0), ("b", 9)):
            neurons = {path: (range(first, first + 8), torch.zeros(8)) for path in masked.scores}
            masked.mute_set(neurons).save(tmp_path / name)
    return tmp_path


def theta(file):
    """What transformers 4, mistral.rs and ctranslate2 read: at the top level, or else 10000."""
    return json.loads(file.read_text()).get("rope_theta", 10000.0)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 0


@pytest.mark.parametrize("sets", ["a", "ab"])
def test_a_folded_checkpoint_keeps_all_files(folder, sets):
    """With one set, the model is not loaded; with two, it is."""
    run("fold", folder / "model", *(folder / name for name in sets), "--out", folder / "out")
    before, after = files(folder / "model"), files(folder / "out")
    assert after.pop("README.md").startswith(before.pop("README.md"))
    assert after == before
    assert theta(folder / "out/config.json") == THETA


def test_a_shrunk_checkpoint_keeps_all_but_the_width(folder):
    run("export", folder / "model", folder / "a", "--to", "shrink", "--out", folder / "out", "--verify")
    before, after = files(folder / "model"), files(folder / "out")
    configs = [json.loads(found.pop("config.json")) for found in (before, after)]
    assert after == before
    assert configs[1] == configs[0] | {"intermediate_size": 64}
    assert theta(folder / "out/config.json") == THETA


def test_without_files_to_copy_the_theta_is_in_both_places(tmp_path):
    model = build("llama", rope_parameters={"rope_type": "default", "rope_theta": THETA})
    expected = model(torch.arange(8)[None]).logits
    save_verified(model, tokenizer(), tmp_path / "out")
    assert theta(tmp_path / "out/config.json") == THETA
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(torch.arange(8)[None]).logits, expected)
    assert loaded.config.rope_parameters["rope_theta"] == THETA
