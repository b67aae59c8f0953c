"""Mute sets as adapters that PEFT itself loads: the same logits as the live muted model; what is refused."""

import json
import sys
import types

import accelerate
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import neumuter
from neumuter.serving import adapters as exports
from neumuter.serving.adapters import export_ia3, export_lora, largest_difference
from tests.models import HIDDEN, WIDTH, batch, build

FAMILIES = ("llama", "gpt2", "gpt_neo", "phi3")
DOWN = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "gpt_neo": "mlp.c_proj", "phi3": "mlp.down_proj"}
GAINS = {"zero": (0.0, 0.0, 0.0), "signed": (-2.0, 0.5, 1.75)}
WAYS = {
    "ia3": export_ia3,
    "lora": export_lora,
    "one rank": lambda *arguments, **options: export_lora(*arguments, one_rank=True, **options),
}
every_family = pytest.mark.parametrize("name", FAMILIES)
every_way = pytest.mark.parametrize("way", WAYS)
every_gain = pytest.mark.parametrize("gains", GAINS)


def mutes_of(model, neurons):
    """The mute set of {number of the FFN: (neurons, gains)}."""
    with neumuter.attach(model, start_layer=0) as masked:
        paths = list(masked.scores)
        layers = {paths[number]: layer for number, layer in neurons.items()}
        return masked.mute_set(layers, mode="modulate", gain_range=(-2, 2))


def some_mutes(model, gains="signed"):
    """Three neurons of the second FFN and one of the third; none of the first."""
    return mutes_of(model, {1: ([2, 17, 71], GAINS[gains]), 2: ([0], GAINS[gains][:1])})


def muted_logits(model, mutes, ids):
    with neumuter.mute(model, mutes):
        return model(ids).logits


def adapted_paths(adapted):
    return [p for p, m in adapted.get_base_model().named_modules() if hasattr(m, "base_layer")]


def read(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


@every_family
@every_way
@every_gain
def test_peft_gives_the_logits_of_the_live_model(name, way, gains, tmp_path):
    model, ids = build(name), batch()
    mutes, plain = some_mutes(model, gains), model(ids).logits
    expected = muted_logits(model, mutes, ids)
    assert (expected - plain).abs().max() > 0.01
    exported = WAYS[way](model, mutes, tmp_path / "adapter")
    assert exported.path == tmp_path / "adapter"
    assert torch.equal(model(ids).logits, plain)
    adapted = peft.PeftModel.from_pretrained(build(name), exported.path)
    assert adapted_paths(adapted) == [path.replace(".mlp", f".{DOWN[name]}") for path in mutes.layers]
    torch.testing.assert_close(adapted(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


@every_family
@every_way
@every_gain
def test_merging_is_folding(name, way, gains, tmp_path):
    model = build(name)
    mutes = some_mutes(model, gains)
    WAYS[way](model, mutes, tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(build(name), tmp_path / "adapter").merge_and_unload()
    neumuter.fold(model, mutes)
    expected = model.state_dict()
    for key, actual in merged.state_dict().items():
        torch.testing.assert_close(actual, expected[key], rtol=1e-6, atol=1e-7)
        if gains == "zero":
            assert torch.equal(actual, expected[key])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@every_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(name, way, dtype, tmp_path):
    model, ids = build(name, dtype), batch()
    mutes = some_mutes(model)
    expected, plain = muted_logits(model, mutes, ids), model(ids).logits
    WAYS[way](model, mutes, tmp_path / "adapter")
    _, tensors = read(tmp_path / "adapter")
    assert {t.dtype for t in tensors.values()} == {torch.float32 if way == "ia3" else dtype}
    adapted = peft.PeftModel.from_pretrained(build(name, dtype), tmp_path / "adapter")
    error = (adapted(input_ids=ids).logits - expected).float().norm() / (plain - expected).float().norm()
    assert error < (0.15 if dtype == torch.bfloat16 else 1e-6)


@every_way
def test_every_layer_is_matched_and_no_other(way, tmp_path):
    """Layer 1 is not 11 or 21, and PEFT shortens lists of 20 paths or more."""
    model, ids = build("llama", num_hidden_layers=24), batch()
    mutes = mutes_of(model, {n: (list(range(n % 3 + 1)), [0.5] * (n % 3 + 1)) for n in range(24) if n != 1})
    expected = muted_logits(model, mutes, ids)
    WAYS[way](model, mutes, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert adapted_paths(adapted) == [f"{path}.down_proj" for path in mutes.layers]
    torch.testing.assert_close(adapted(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_what_an_ia3_adapter_holds(tmp_path):
    model = build("gpt2")
    model.name_or_path = "somebody/gpt2"
    exported = export_ia3(model, some_mutes(model), tmp_path / "adapter")
    assert (exported.kind, exported.note) == ("ia3", exports.IA3_NOTE)
    config, tensors = read(exported.path)
    paths = ["transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"]
    assert config["target_modules"] == config["feedforward_modules"] == paths
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("IA3", "somebody/gpt2")
    assert config["fan_in_fan_out"]
    assert list(tensors) == [f"base_model.model.{path}.ia3_l" for path in paths]
    gains = torch.ones(1, WIDTH)
    gains[0, [2, 17, 71]] = torch.tensor(GAINS["signed"])
    assert torch.equal(tensors[f"base_model.model.{paths[0]}.ia3_l"], gains)


def test_each_layer_has_a_lora_rank_of_its_own(tmp_path):
    model = build("llama")
    mutes = some_mutes(model)
    exported = export_lora(model, mutes, tmp_path / "adapter")
    assert (exported.kind, exported.note) == ("lora", exports.LORA_NOTE)
    config, tensors = read(exported.path)
    assert config["rank_pattern"] == {f"model.layers.{n}.mlp.down_proj": k for n, k in {1: 3, 2: 1}.items()}
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert not config["fan_in_fan_out"]
    shapes = [tuple(t.shape) for _, t in sorted(tensors.items())]
    assert shapes == [(3, WIDTH), (HIDDEN, 3), (1, WIDTH), (HIDDEN, 1)]


@pytest.mark.parametrize(("neurons", "rank"), [(8, 8), (9, 16), (257, 320), (512, 512)])
def test_one_rank_is_one_that_vllm_allows(neurons, rank, tmp_path):
    model = build("llama", intermediate_size=600)
    mutes = mutes_of(model, {0: (list(range(neurons)), [0.5] * neurons), 2: ([3], [0.0])})
    exported = export_lora(model, mutes, tmp_path / "adapter", one_rank=True)
    assert f"--max-lora-rank {rank} --lora-target-modules down_proj --max-loras 2 " in exported.note
    assert str(exported.path) in exported.note
    config, tensors = read(exported.path)
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    for key, tensor in tensors.items():
        used = neurons if "layers.0" in key else 1
        assert tensor.shape == ((rank, 600) if "lora_A" in key else (HIDDEN, rank))
        assert torch.count_nonzero(tensor.sum(1 if "lora_A" in key else 0)) == used


def test_more_neurons_than_vllm_has_ranks(tmp_path):
    model = build("llama", intermediate_size=600)
    mutes = mutes_of(model, {0: ([3], [0.0]), 1: (list(range(513)), [0.5] * 513)})
    with pytest.raises(ValueError, match=r"one_rank: model.layers.1.mlp.down_proj has 513 .* rank is 512"):
        export_lora(model, mutes, tmp_path / "adapter", one_rank=True)
    export_lora(model, mutes, tmp_path / "adapter")
    assert largest_difference(model, mutes, tmp_path / "adapter") < 1e-4


# --- Verification ----------------------------------------------------------------------------


@every_family
@every_way
def test_verifying_measures_a_small_difference(name, way, tmp_path):
    model = build(name).train()  # GPT-2 has dropout by default
    mutes = some_mutes(model)
    modules = dict(model.named_modules())
    WAYS[way](model, mutes, tmp_path / "adapter")
    assert 0 <= largest_difference(model, mutes, tmp_path / "adapter") < 1e-5
    assert dict(model.named_modules()) == modules
    assert all(module.training for module in model.modules())


@every_way
def test_a_changed_file_is_seen(way, tmp_path):
    model = build("llama")
    mutes = some_mutes(model)
    WAYS[way](model, mutes, tmp_path)
    _, tensors = read(tmp_path)
    path = "base_model.model.model.layers.1.mlp.down_proj."
    key = path + ("ia3_l" if way == "ia3" else "lora_A.weight")
    tensors[key] = tensors[key].roll(1, dims=1)  # each gain on the next neuron
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert largest_difference(model, mutes, tmp_path) > 0.01


def test_the_figure_is_the_largest_difference_of_logits(tmp_path):
    """An adapter of another mute set: exactly as far away as the two muted models are."""
    model = build("llama").double()
    first, second = some_mutes(model), some_mutes(model, "zero")
    export_ia3(model, first, tmp_path)
    ids = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    expected = (muted_logits(model, first, ids) - muted_logits(model, second, ids)).abs().max().item()
    assert largest_difference(model, second, tmp_path) == pytest.approx(expected, rel=1e-6)


# --- Files -----------------------------------------------------------------------------------


@every_way
def test_equal_mutes_give_equal_bytes(way, tmp_path):
    model = build("llama")
    mutes = some_mutes(model)
    mutes.save(tmp_path / "mutes.safetensors")
    (tmp_path / "second").mkdir()
    WAYS[way](model, mutes, tmp_path / "first")
    compiled = torch.compile(model, backend="eager")
    WAYS[way](compiled, tmp_path / "mutes.safetensors", str(tmp_path / "second"))
    assert largest_difference(compiled, tmp_path / "mutes.safetensors", tmp_path / "second") < 1e-5
    files = {file.name: file.read_bytes() for file in (tmp_path / "first").iterdir()}
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "second").iterdir()}


@every_way
def test_a_folder_in_use_is_refused(way, tmp_path):
    model = build("llama")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        WAYS[way](model, some_mutes(model), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_nothing_is_left_of_an_export_that_fails(tmp_path, monkeypatch):
    model = build("llama")
    monkeypatch.setattr(exports, "save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_ia3(model, some_mutes(model), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


# --- What is refused -------------------------------------------------------------------------


@every_way
def test_experts_are_refused(way, tmp_path):
    model = build("mixtral")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts holds experts"):
        WAYS[way](model, some_mutes(model), tmp_path / "adapter")


def test_a_dense_ffn_beside_experts(tmp_path):
    model = build("qwen2_moe")
    with neumuter.attach(model, start_layer=0) as masked:
        path = next(path for path in masked.scores if "shared_expert" in path)
        mutes = masked.mute_set({path: ([3, 5], [0.0, 0.0])})
    for way in WAYS:
        WAYS[way](model, mutes, tmp_path / way)
        assert largest_difference(model, mutes, tmp_path / way) < 1e-5


def test_lora_that_peft_puts_on_the_experts_instead(tmp_path):
    """PEFT takes targets named down_proj for the experts', where the model has experts under another name."""
    model = build("qwen3_moe", mlp_only_layers=[0, 1])
    mutes = mutes_of(model, {0: ([3, 5], [0.0, 0.0])})
    for way in ("lora", "one rank"):
        with pytest.raises(ValueError, match=r"PEFT .* does not adapt model.layers.0.mlp.down_proj; use ano"):
            WAYS[way](model, mutes, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
    export_ia3(model, mutes, tmp_path / "adapter")
    assert largest_difference(model, mutes, tmp_path / "adapter") < 1e-5


@every_way
def test_a_down_projection_that_is_not_called(way, tmp_path):
    """As fast-inference patches make: the FFN reads the weight, and PEFT's layer would do nothing."""
    model = build("llama")
    mutes = some_mutes(model)

    def fused(mlp, x):
        return nn.functional.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)

    mlp = model.model.layers[1].mlp
    mlp.forward = types.MethodType(fused, mlp)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp reads the weights of its down projection"):
        WAYS[way](model, mutes, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@every_way
@pytest.mark.parametrize("change", ["other values", "other scale"])
def test_what_peft_computes_otherwise(way, change, tmp_path, monkeypatch):
    """An adapter of which each neuron is the next one's, or that PEFT scales."""
    model = build("llama")
    mutes = some_mutes(model)
    if change == "other values":
        monkeypatch.setattr(exports, "save_file", lambda tensors, *arguments, **options: save_file(
            {key: tensor.roll(1, dims=-1) for key, tensor in tensors.items()}, *arguments, **options
        ))  # fmt: skip
    elif way == "ia3":
        monkeypatch.setattr(peft.tuners.ia3.layer.Linear, "forward", lambda layer, x: layer.base_layer(x))
    else:
        former = peft.tuners.lora.layer.Linear.forward
        monkeypatch.setattr(
            peft.tuners.lora.layer.Linear,
            "forward",
            lambda layer, x: 1.5 * former(layer, x) - layer.base_layer(x) / 2,
        )
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj gives other values than with muted"):
        WAYS[way](model, mutes, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@every_way
def test_verifying_leaves_the_model_as_it_is(way, tmp_path):
    model = build("llama").train()
    model.model.embed_tokens.weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state, random = model.state_dict(keep_vars=True), torch.get_rng_state()
    before = {name: (parameter, parameter.clone()) for name, parameter in state.items()}
    WAYS[way](model, some_mutes(model), tmp_path / "adapter")
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert torch.equal(torch.get_rng_state(), random)
    for name, parameter in model.state_dict(keep_vars=True).items():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


@every_way
def test_shared_weights_are_refused(way, tmp_path):
    """Merging would multiply them twice, or in an FFN that is not muted."""
    model = build("llama")
    model.model.layers[0].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    with pytest.raises(
        ValueError, match=r"layers.1.mlp shares the weights .* model.layers.0.mlp.down_proj.weight"
    ):
        WAYS[way](model, some_mutes(model), tmp_path / "adapter")
    mutes = mutes_of(model, {2: ([0, 3], [0.5, 0.0])})
    WAYS[way](model, mutes, tmp_path / "adapter")
    assert largest_difference(model, mutes, tmp_path / "adapter") < 1e-5


@every_way
def test_models_that_are_not_plain_are_refused(way, tmp_path):
    model = build("llama")
    mutes, export = some_mutes(model), WAYS[way]
    with neumuter.mute(model, mutes), pytest.raises(RuntimeError, match="attached or muted"):
        export(model, mutes, tmp_path / "adapter")
    with pytest.raises(neumuter.MuteMismatchError, match="weights differ"):
        export(build("llama", seed=1), mutes, tmp_path / "adapter")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj has an adapter already"):
        export(adapted, mutes, tmp_path / "adapter")


@pytest.mark.parametrize("way", ["lora", "one rank"])
def test_weights_that_cannot_be_read(way, tmp_path):
    models = [build("llama") for _ in range(3)]
    accelerate.cpu_offload(models[0], execution_device="cpu")
    for model, dtype in zip(models[1:], (torch.int8, torch.float8_e4m3fn), strict=True):
        for layer in model.model.layers:  # quantised, with one scale
            linear = layer.mlp.down_proj
            linear.weight = nn.Parameter((linear.weight * 64).to(dtype), requires_grad=False)
            linear.forward = lambda x, w=linear.weight: x @ (w.float() / 64).T
    for model in models:
        with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj is quantised or offloaded"):
            WAYS[way](model, some_mutes(model), tmp_path / "adapter")


def test_offloaded_models_are_refused(tmp_path):
    """PEFT loads nothing on them, so nothing could be verified."""
    model = build("llama")
    mutes = some_mutes(model)
    export_ia3(model, mutes, tmp_path / "before")
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match="PEFT loads no adapter on an offloaded model"):
        export_ia3(model, mutes, tmp_path / "adapter")
    with pytest.raises(ValueError, match="PEFT loads no adapter on an offloaded model"):
        largest_difference(model, mutes, tmp_path / "before")
    assert [folder.name for folder in tmp_path.iterdir()] == ["before"]


@pytest.fixture
def mesh():
    """A group of one process."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@every_way
@pytest.mark.parametrize("how", ["fsdp", "fsdp after a forward", "tensor parallel", "zero"])
def test_sharded_models_are_refused(way, how, mesh, tmp_path):
    model = build("llama")
    mutes = some_mutes(model)
    linear = model.model.layers[1].mlp.down_proj
    if how == "tensor parallel":
        split = torch.distributed.tensor.distribute_tensor(
            linear.weight.detach(), mesh, [torch.distributed.tensor.Shard(1)]
        )
        linear.weight = nn.Parameter(split)
    elif how == "zero":
        linear.weight.ds_id = 0
    else:
        torch.distributed.fsdp.fully_shard(model, mesh=mesh)
        if how == "fsdp after a forward":
            model(batch())
    with pytest.raises(ValueError, match=r"(LlamaForCausalLM|down_proj) is sharded"):
        WAYS[way](model, mutes, tmp_path / "adapter")


def test_without_peft(tmp_path, monkeypatch):
    model = build("llama")
    mutes = some_mutes(model)
    monkeypatch.setitem(sys.modules, "peft", None)
    for export in WAYS.values():
        with pytest.raises(ImportError, match="pip install peft"):
            export(model, mutes, tmp_path / "adapter")
