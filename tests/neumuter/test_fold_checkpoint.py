"""Mute sets folded into checkpoints on disk, beside the same done to the loaded model."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.hub import CHAT_TEMPLATE_DIR

import neumuter
from neumuter.files import new_folder
from neumuter.models.loading import load_model
from neumuter.serving import fold_checkpoint as folding
from neumuter.serving.companions import list_companions
from neumuter.serving.fold_checkpoint import fold_checkpoint
from neumuter.training.plan import load_config
from tests.memory import growth
from tests.models import WIDTH, batch, build, tokenizer

SHARD = "30KB"
INDEX = "model.safetensors.index.json"


def some_mutes(model):
    with neumuter.attach(model, start_layer=0) as masked:
        paths = list(masked.scores)
        neurons = {paths[0]: ([5], [0.0]), paths[2]: ([0, 2, 17, WIDTH - 1], [-2.0, 0.3, 0.0, 1.75])}
        return masked.mute_set(neurons, mode="modulate", gain_range=(-2, 2))


@pytest.fixture
def saved(tmp_path):
    """A llama in several shards, and a mute set for it."""
    model = build("llama")
    model.save_pretrained(tmp_path / "model", max_shard_size=SHARD)
    return tmp_path / "model", some_mutes(model)


def weights(folder):
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.suffix == ".safetensors" or file.name == INDEX
    }


def expected_weights(mutes, folder):
    model = build("llama")
    neumuter.fold(model, mutes)
    model.save_pretrained(folder, max_shard_size=SHARD)
    return weights(folder)


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("shard", [SHARD, "1GB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neo", "gpt_oss"])
def test_the_same_bytes_as_folding_the_loaded_model(tmp_path, name, dtype, shard):
    model = build(name, dtype)
    model.save_pretrained(tmp_path / "model", max_shard_size=shard)
    before = weights(tmp_path / "model")
    mutes = some_mutes(model)
    mutes.save(tmp_path / "mutes.safetensors")
    fold_checkpoint(tmp_path / "model", tmp_path / "mutes.safetensors", tmp_path / "out")
    neumuter.fold(model, mutes)
    model.save_pretrained(tmp_path / "expected", max_shard_size=shard)
    assert len(before) == 1 if shard == "1GB" else len(before) > 2
    assert weights(tmp_path / "out") == weights(tmp_path / "expected") != before
    assert weights(tmp_path / "model") == before


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_result_loads_and_is_the_muted_model(tmp_path, name):
    model, ids = build(name), batch()
    model.save_pretrained(tmp_path / "model", max_shard_size=SHARD)
    mutes = some_mutes(model)
    fold_checkpoint(tmp_path / "model", mutes, tmp_path / "out")
    untouched = model(ids).logits
    with neumuter.mute(model, mutes):
        expected = model(ids).logits
    assert (expected - untouched).abs().max() > 0.01
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_that_was_saved_without_its_head(tmp_path):
    """GPT-2 on the Hub has h.0.mlp, not transformer.h.0.mlp."""
    model, ids = build("gpt2"), batch()
    model.transformer.save_pretrained(tmp_path / "model")
    assert "h.0.mlp.c_proj.weight" in load_file(tmp_path / "model/model.safetensors")
    mutes = some_mutes(model)
    fold_checkpoint(tmp_path / "model", mutes, tmp_path / "out")
    neumuter.fold(model, mutes)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_other_files_come_along_but_no_other_weights(saved, tmp_path):
    folder, mutes = saved
    tokenizer().save_pretrained(folder)
    left = ["pytorch_model.bin", "consolidated.safetensors", "pytorch_model.bin.index.json"]
    for name in left:
        (folder / name).write_bytes(b"weights")
    (folder / CHAT_TEMPLATE_DIR).mkdir()
    (folder / CHAT_TEMPLATE_DIR / "tool.jinja").write_text("{{ messages }}")
    fold_checkpoint(folder, mutes, tmp_path / "out")
    files, copies = (
        {file.relative_to(where).as_posix() for file in where.rglob("*") if file.is_file()}
        for where in (folder, tmp_path / "out")
    )
    assert copies == files - set(left) | {"README.md"}
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "additional_chat_templates/tool.jinja",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_the_model_card(saved, tmp_path):
    folder, mutes = saved
    card = "---\nlicense: mit\n---\n\n# A model\n"
    (folder / "README.md").write_text(card)
    metrics = {"before": {"forget_ma": 0.98}, "after": {"forget_ma": 0.21, "x|`y`": {"z": None}}}
    mutes = replace(mutes, method={"recipe": "gains"}, seed=7, metrics=metrics)
    fold_checkpoint(folder, mutes, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert text.startswith(card)
    for line in (
        "- Mode: modulate, gains from -2 to 2",
        "- Neurons: 5 of 216 (2.31%)",
        "- Seed: 7",
        "| `model.layers.0.mlp` | 1 | 72 | 1.39% |",
        "| `model.layers.1.mlp` | 0 | 72 | 0.00% |",
        '| `"forget_ma"` | `0.98` | `0.21` |',
        '| `"x\\|\'y\'"` | `null` | `{"z": null}` |',
        '  "recipe": "gains"',
    ):
        assert line in text.splitlines()
    assert "suppresses the texts; it does not prove that they are deleted" in " ".join(text.split())


# --- What can go wrong on the way ------------------------------------------------------------


def run(folder, mutes, out):
    """Fold, and die without a word after half of the bytes."""

    def callback(done, total):
        if done > total / 2:
            os.kill(os.getpid(), signal.SIGKILL)

    fold_checkpoint(folder, mutes, out, callback=callback)


def test_a_killed_fold_starts_anew(saved, tmp_path):
    folder, mutes = saved
    mutes.save(tmp_path / "mutes.safetensors")
    arguments = [str(folder), str(tmp_path / "mutes.safetensors"), str(tmp_path / "out")]
    code = "import sys; from tests.neumuter.test_fold_checkpoint import run; run(*sys.argv[1:])"
    result = subprocess.run([sys.executable, "-c", code, *arguments], check=False)
    assert result.returncode == -signal.SIGKILL
    (left,) = {file.name for file in tmp_path.iterdir()} - {"model", "mutes.safetensors"}
    assert re.fullmatch(r"\.out\.\w{8}\.tmp", left)
    assert 0 < len(shards(tmp_path / left)) < len(shards(folder))
    calls = []
    fold_checkpoint(*arguments, callback=lambda done, total: calls.append((done, total)))
    size = sum(file.stat().st_size for file in shards(folder))
    assert calls[-1] == (size, size)
    assert calls == sorted(calls)
    assert {file.name for file in tmp_path.iterdir()} == {"model", "mutes.safetensors", "out"}
    assert weights(tmp_path / "out") == expected_weights(mutes, tmp_path / "expected")


def test_an_exception_leaves_nothing(saved, tmp_path):
    folder, mutes = saved

    def callback(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fold_checkpoint(folder, mutes, tmp_path / "out", callback=callback)
    assert list(tmp_path.iterdir()) == [folder]


def test_places_that_cannot_be_renamed_to_are_refused_before_the_work(saved, tmp_path, monkeypatch):
    folder, mutes = saved
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (tmp_path / "link", ".", "/"):
        with pytest.raises(ValueError, match="must be a new folder, or an empty one"):
            fold_checkpoint(folder, mutes, out)
        with pytest.raises(ValueError, match="must be a new folder, or an empty one"), new_folder(out):
            pass
    assert not any((tmp_path / "here").iterdir())
    assert not any((tmp_path / "elsewhere").iterdir())


def test_only_known_files_are_copied_and_no_links_to_elsewhere(saved, tmp_path):
    folder, mutes = saved
    (tmp_path / "secret.txt").write_text("private")
    for name in ("notes.txt", "config.json"):
        file = folder / name
        kept = file.read_bytes() if file.exists() else b""
        file.unlink(missing_ok=True)
        file.symlink_to(tmp_path / "secret.txt")
        # Left out, a configuration would be missed only when somebody loads the result.
        with pytest.raises(ValueError, match=rf"{name} would be copied, but is a link out of its folder"):
            list_companions(folder)
        file.unlink()
        file.write_bytes(kept)
    (folder / "notes.txt").unlink()
    for name in ("model.onnx.data", "MODEL.BIN", "weights.tflite", "LICENSE", "chat_template.jinja"):
        (folder / name).write_text("x")
    fold_checkpoint(folder, mutes, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "chat_template.jinja", "config.json"} <= names
    assert not names & {"model.onnx.data", "MODEL.BIN", "weights.tflite"}


@pytest.mark.parametrize(
    "changed",
    [
        {"num_attention_heads": 0},
        {"hidden_act": "nope"},
        {"intermediate_size": "big"},
        {"quantization_config": "gptq"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_damaged_configuration_is_an_error_of_one_line(saved, tmp_path, changed):
    folder, mutes = saved
    config = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps(config))
    for use in (lambda: fold_checkpoint(folder, mutes, tmp_path / "out"), lambda: load_config(folder)):
        with pytest.raises(ValueError, match=r"cannot be loaded: \w+: [^\n]*$"):
            use()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "index", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 7}}', '{"weight_map": {}}']
)
def test_a_damaged_index_is_refused(saved, tmp_path, index):
    folder, mutes = saved
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    (folder / INDEX).write_text(index)
    with pytest.raises(ValueError, match="must name shards in its own folder"):
        fold_checkpoint(folder, mutes, tmp_path / "out")


def test_a_file_is_no_model(saved):
    with pytest.raises(ValueError, match=r"config\.json is a file: give the folder of a model"):
        load_model(str(saved[0] / "config.json"))


def test_a_disk_that_loses_bits_is_noticed(saved, tmp_path, monkeypatch):
    folder, mutes = saved
    with monkeypatch.context() as broken:
        broken.setattr(os, "posix_fadvise", lambda file, *_: os.pwrite(file, b"\xff\xff", 20000))
        with pytest.raises(OSError, match="reads back other than it was written"):
            fold_checkpoint(folder, mutes, tmp_path / "out")
        assert list(tmp_path.iterdir()) == [folder]
    fold_checkpoint(folder, mutes, tmp_path / "out")
    assert weights(tmp_path / "out") == expected_weights(mutes, tmp_path / "expected")


def forget_them(weight):
    weight[:] = build("llama").model.layers[0].mlp.down_proj.weight


def round_again(weight):
    weight[:] = weight.bfloat16()


def touch_another(weight):
    weight[:, 30] = 0


@pytest.mark.parametrize("spoil", [forget_them, round_again, touch_another])
def test_a_wrong_product_is_noticed(saved, tmp_path, monkeypatch, spoil):
    """The columns are compared with the original too, not only the bytes with what was to be written."""
    folder, mutes = saved
    fold_columns = folding.fold_columns

    def spoilt(weight, layer):
        fold_columns(weight, layer)
        with torch.no_grad():
            spoil(weight[:, 0])

    monkeypatch.setattr(folding, "fold_columns", spoilt)
    with pytest.raises(OSError, match="reads back other"):
        fold_checkpoint(folder, mutes, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [folder]


def test_two_at_a_time_are_refused(saved, tmp_path):
    folder, mutes = saved
    refused = []

    def callback(done, total):
        if not refused:
            with pytest.raises(BlockingIOError, match="another process"):
                fold_checkpoint(folder, mutes, tmp_path / "out")
            refused.append(done)

    fold_checkpoint(folder, mutes, tmp_path / "out", callback=callback)
    assert refused
    assert weights(tmp_path / "out") == expected_weights(mutes, tmp_path / "expected")


def test_what_another_process_has_written_meanwhile_stays(saved, tmp_path):
    folder, mutes = saved

    def callback(done, total):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/theirs").write_text("whole")

    with pytest.raises(FileExistsError, match="not an empty folder"):
        fold_checkpoint(folder, mutes, tmp_path / "out", callback=callback)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]


def measure(folder, mutes, small, small_mutes):
    """Print by how many bytes the resident memory grows at most; ``small`` has everything imported first."""
    fold_checkpoint(small, small_mutes, f"{small}-out")
    print(growth(lambda: fold_checkpoint(folder, mutes, f"{folder}-out")))


def test_memory_is_that_of_a_few_tensors(saved, tmp_path):
    small, small_mutes = saved
    small_mutes.save(tmp_path / "small.safetensors")
    model = build("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    some_mutes(model).save(tmp_path / "mutes.safetensors")
    folder = tmp_path / "large"
    model.save_pretrained(folder, max_shard_size="40MB")
    size = sum(len(data) for data in weights(folder).values())
    assert size > 120e6
    arguments = map(str, [folder, tmp_path / "mutes.safetensors", small, tmp_path / "small.safetensors"])
    code = "import sys; from tests.neumuter.test_fold_checkpoint import measure; measure(*sys.argv[1:])"
    result = subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE)
    assert int(result.stdout.split()[-1]) < size / 3


# --- What is refused -------------------------------------------------------------------------


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(folder, name, change):
    """Replace the tensor ``name`` in its shard by ``change(it)``."""
    shard = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, shard, metadata={"format": "pt"})


DOWN = "model.layers.1.mlp.down_proj.weight"
REFUSED = {
    "other weights": (lambda f: build("llama", seed=1).save_pretrained(f), "weights differ by 1"),
    "one other layer": (lambda f: rewrite(f, DOWN, lambda w: w * 1.05), r"layers.1.mlp: .* differ by 5.0%"),
    "NaN": (lambda f: rewrite(f, DOWN, lambda w: w * float("nan")), r"layers.1.mlp: .* differ by nan"),
    "other class": (
        lambda f: build("qwen2").save_pretrained(f),
        "class: mute set LlamaForCausalLM, model Qwen2ForCausalLM\n  model_type: mute set llama, model qwen2",
    ),
    "other width": (
        lambda f: build("llama", intermediate_size=80).save_pretrained(f),
        "layers.2.mlp: mute set 72 neurons, model 80",
    ),
    "fewer layers": (
        lambda f: build("llama", num_hidden_layers=2).save_pretrained(f),
        "layers.2.mlp: mute set 72 neurons, model has no FFN there",
    ),
    "integers": (lambda f: rewrite(f, DOWN, lambda w: w.to(torch.int8)), f"{DOWN} is stored as I8"),
    "shape": (
        lambda f: rewrite(f, DOWN, lambda w: w.T),
        r"has shape \[72, 32\], config.json says \[32, 72\]",
    ),
    "damaged shard": (
        lambda f: os.truncate(shards(f)[1], 9000),
        r"model-00002-of-\d+.safetensors is not a valid safetensors file",
    ),
    "elsewhere": (
        lambda f: edit(f / INDEX, weight_map={DOWN: "../model-00001-of-00007.safetensors"}),
        "must name shards in its own folder",
    ),
    "twice": (
        lambda f: shards(f)[0].write_bytes(shards(f)[1].read_bytes()),
        "which another shard of .* holds too",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_written(saved, tmp_path, spoil, message):
    folder, mutes = saved
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        fold_checkpoint(folder, mutes, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [folder]


def test_a_set_that_is_folded_already_is_refused(tmp_path):
    """One neuron of thousands moves the down projection by less than the tolerance."""
    model = build("llama", intermediate_size=4096)
    model.save_pretrained(tmp_path / "model")
    with neumuter.attach(model, start_layer=0) as masked:
        mutes = masked.mute_set({"model.layers.1.mlp": ([7], [-0.5])}, mode="modulate", gain_range=(-2, 2))
    fold_checkpoint(tmp_path / "model", mutes, tmp_path / "once")
    with pytest.raises(neumuter.MuteMismatchError, match="muted columns"):
        fold_checkpoint(tmp_path / "once", mutes, tmp_path / "twice")


@pytest.mark.parametrize("gains", [(0.5, 1), (0.5, 0.5), (0.5, 0.25)])
def test_ffns_that_share_weights(tmp_path, gains):
    """Zamba2 stores the FFN that all its layers share once; whoever saved it may have stored it twice."""
    blocks = dict(num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2, num_mem_blocks=1)
    mamba = dict(mamba_d_state=8, n_mamba_heads=2, mamba_headdim=32, adapter_rank=4)
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=72, num_attention_heads=4, pad_token_id=0)
    config = AutoConfig.for_model("zamba2", num_key_value_heads=4, **sizes, **blocks, **mamba)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    with neumuter.attach(model, start_layer=0) as masked:
        layers = {p: ([3, 5], [g, g]) for p, g in zip(masked.scores, gains, strict=True) if g != 1}
        mutes = masked.mute_set(layers, mode="modulate", gain_range=(-2, 2))
    file = tmp_path / "model/model.safetensors"
    stored = load_file(file)
    first, second = (f"{path}.down_proj.weight" for path in mutes.widths)
    assert (first in stored, second in stored) == (True, False)
    save_file(stored | {second: stored[first].clone()}, file, metadata={"format": "pt"})
    if gains[0] != gains[1]:
        with pytest.raises(ValueError, match="shares its weights with"):
            fold_checkpoint(tmp_path / "model", mutes, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    fold_checkpoint(tmp_path / "model", mutes, tmp_path / "out")
    with neumuter.mute(model, mutes):
        expected = model(batch()).logits
    actual = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(batch()).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_experts_that_are_stored_one_by_one_are_refused(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"has no tensor model.layers.0.mlp.experts.down_proj"):
        fold_checkpoint(tmp_path / "model", some_mutes(model), tmp_path / "out")


def test_folders_that_cannot_be_used(saved, tmp_path):
    folder, mutes = saved
    with pytest.raises(FileExistsError, match="not an empty folder"):
        fold_checkpoint(folder, mutes, folder)
    (folder / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor"):
        fold_checkpoint(folder, mutes, tmp_path / "out")
