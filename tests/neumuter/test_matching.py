"""Mute sets on live models and folded into weights; what is refused."""

import copy

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import neumuter
from neumuter.models.families import find_ffns
from tests.models import HIDDEN, SMALL, WIDTH, batch, build

every_family = pytest.mark.parametrize("name", SMALL)
DTYPES = [torch.float32, torch.bfloat16]


def some_mutes(model, gains=(0.0, 0.0, 0.0), **options):
    with neumuter.attach(model, start_layer=0) as masked:
        paths = list(masked.scores)
        return masked.mute_set({paths[1]: ([2, 17, 71], gains), paths[2]: ([0], gains[:1])}, **options)


def modulations(model):
    return some_mutes(model, (-2.0, 0.5, 1.75), mode="modulate", gain_range=(-2, 2))


@every_family
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_muting_equals_zeroing_the_columns(name, dtype):
    model, ids = build(name, dtype), batch()
    mutes = some_mutes(model)
    untouched, keys = model(ids).logits, list(model.state_dict())
    with neumuter.mute(model, mutes):
        muted = model(ids).logits
        assert list(model.state_dict()) == keys
    assert torch.equal(model(ids).logits, untouched)
    for ffn in find_ffns(model):
        if ffn.path in mutes.layers:
            neurons = mutes.layers[ffn.path].indices.long()
            ffn.down_weight[:, neurons // WIDTH, neurons % WIDTH] = 0
    expected = model(ids).logits
    error = (muted - expected).float().norm() / (untouched - expected).float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.15)


@every_family
def test_fold_equals_mute(name):
    model, ids = build(name), batch()
    mutes = modulations(model)
    with neumuter.mute(model, mutes):
        expected = model(ids).logits
    assert (expected - model(ids).logits).abs().max() > 0.01
    neumuter.fold(model, mutes)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def share(model, how):
    """The third FFN has the down projection of the second."""
    second, third = (layer.mlp for layer in model.model.layers[1:])
    if how == "one parameter":
        third.down_proj.weight = second.down_proj.weight
    elif how == "one memory":
        third.down_proj.weight.data = second.down_proj.weight.data
    elif how == "a part of the memory":
        both = second.down_proj.weight.data
        whole = both.new_empty(len(both) + 1, WIDTH).normal_(std=0.15)
        second.down_proj.weight.data, third.down_proj.weight.data = whole[:-1], whole[1:]
    return model


def shared_mutes(model, *gains):
    with neumuter.attach(model, start_layer=0) as masked:
        paths = list(masked.scores)
        layers = {p: (range(20), [g] * 20) for p, g in zip(paths, gains, strict=True) if g != 1}
        return masked.mute_set(layers, mode="modulate", gain_range=(-2, 2))


@pytest.mark.parametrize("how", ["one parameter", "one memory"])
def test_ffns_that_share_weights_are_folded_once(how):
    model, ids = share(build("llama"), how), batch()
    mutes = shared_mutes(model, 1, 0.5, 0.5)
    with neumuter.mute(model, mutes):
        expected = model(ids).logits
    assert (expected - model(ids).logits).abs().max() > 0.01
    neumuter.fold(model, mutes)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gains", [(1, 0.5, 1), (1, 1, 0.5), (1, 0.5, 0.25)])
@pytest.mark.parametrize("how", ["one parameter", "one memory", "a part of the memory"])
def test_ffns_that_share_weights_and_are_not_muted_alike_are_not_folded(how, gains):
    model = share(build("llama"), how)
    mutes, weight = shared_mutes(model, *gains), model.model.layers[1].mlp.down_proj.weight
    before = weight.clone()
    with pytest.raises(
        ValueError, match=r"shares its weights with model.layers.\d.mlp.down_proj.weight, which"
    ):
        neumuter.fold(model, mutes)
    assert torch.equal(weight, before)


def test_weights_that_something_else_reads_are_not_folded_into():
    model = build("llama", intermediate_size=97)
    model.model.embed_tokens.weight = torch.nn.Parameter(model.model.layers[1].mlp.down_proj.weight.data.T)
    with pytest.raises(
        ValueError, match=r"layers.1.mlp: it shares its weights with model.embed_tokens.weight"
    ):
        neumuter.fold(model, shared_mutes(model, 1, 0.5, 1))


def test_an_ffn_in_two_places_is_folded():
    model, ids = build("llama"), batch()
    model.model.layers[2].mlp = model.model.layers[1].mlp
    mutes = shared_mutes(model, 1, 0.5)
    with neumuter.mute(model, mutes):
        expected = model(ids).logits
    neumuter.fold(model, mutes)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_down_projection_of_two_ffns_is_refused():
    """A mask there would reach both."""
    model = build("llama")
    mutes = shared_mutes(model, 1, 0.5, 1)
    model.model.layers[2].mlp.down_proj = model.model.layers[1].mlp.down_proj
    for use in (neumuter.mute, neumuter.fold):
        with pytest.raises(
            ValueError, match=r"model.layers.1.mlp.down_proj is a part of another module, too"
        ):
            use(model, mutes)
    with pytest.raises(ValueError, match="a mask there would reach both"):
        neumuter.attach(model)


def embedded(model, ids):
    return model.get_input_embeddings()(ids).detach().requires_grad_()


@every_family
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_activations_and_many_and_gradients_have_the_same_bits(name, dtype, monkeypatch):
    model, ids = build(name, dtype), batch()
    mutes = modulations(model)
    folded = copy.deepcopy(model)
    neumuter.fold(folded, mutes)
    inputs, expected = embedded(model, ids), embedded(folded, ids)
    folded(inputs_embeds=expected).logits.float().square().mean().backward()
    with neumuter.mute(model, mutes) as muted:
        seams = {gates.seam for gates in muted._way.gates}
        assert seams == {"experts" if name == "mixtral" else "down"}
        with torch.no_grad():
            few = model(ids).logits
            monkeypatch.setattr("neumuter.serving.live.FEW", 0)
            assert torch.equal(model(ids).logits, few)
        logits = model(inputs_embeds=inputs).logits
        assert torch.equal(logits.detach(), few)
        logits.float().square().mean().backward()
    off = (inputs.grad - expected.grad).float().norm() / expected.grad.float().norm()
    assert off < (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_nothing_that_somebody_else_reads_is_changed(name):
    """An FFN of a kind that is not known may use its activations twice."""
    model, ids = build(name), batch()
    mutes = modulations(model)
    ffn = find_ffns(model)[1]
    down = ffn.layout.down

    class Twice(type(ffn.module)):
        def forward(self, x):
            seen = []
            with getattr(self, down).register_forward_pre_hook(lambda _, given: seen.append(given[0])):
                output = super().forward(x)
            return output + seen[0][..., :HIDDEN]

    ffn.module.__class__ = Twice
    folded = copy.deepcopy(model)
    neumuter.fold(folded, mutes)
    with torch.no_grad(), neumuter.mute(model, mutes):
        torch.testing.assert_close(model(ids).logits, folded(ids).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fold_rounds_once_in_bfloat16(name):
    model = build(name, torch.bfloat16)
    mutes = modulations(model)
    path = next(iter(mutes.layers))
    ffn = next(f for f in find_ffns(model) if f.path == path)
    before = ffn.down_weight.clone()
    neumuter.fold(model, mutes)
    gains = torch.ones(WIDTH)
    gains[mutes.layers[path].indices.long()] = mutes.layers[path].gains
    assert torch.equal(ffn.down_weight, (before.float() * gains).bfloat16())


def test_undo_restores_the_objects():
    model = build("gpt_neo")
    before = dict(model.named_modules())
    handle = neumuter.mute(model, some_mutes(model))
    assert handle.model is model
    with pytest.raises(RuntimeError, match="attached or muted"):
        neumuter.mute(model, handle.mutes)
    with pytest.raises(RuntimeError, match="attached or muted"):
        neumuter.fold(model, handle.mutes)
    with pytest.raises(RuntimeError, match="attached or muted"):
        neumuter.attach(model)
    handle.undo()
    handle.undo()
    assert all(module is before[key] for key, module in model.named_modules())


def test_only_layers_with_muted_neurons_are_touched():
    model = build("llama")
    before = dict(model.named_modules())
    with neumuter.mute(model, some_mutes(model)):
        added = {key for key in dict(model.named_modules()) if key not in before}
        patched = {key for key, module in model.named_modules() if "forward" in vars(module)}
    assert patched == {"model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"}
    assert added == {f"{key}.neumuter" for key in patched}
    assert dict(model.named_modules()) == before


def test_off_is_the_untouched_model():
    model, ids = build("llama"), batch()
    plain = model(ids).logits
    with neumuter.mute(model, some_mutes(model)) as muted:
        changed = model(ids).logits
        with muted.off():
            assert torch.equal(model(ids).logits, plain)
        assert torch.equal(model(ids).logits, changed)
    assert not torch.equal(changed, plain)


def test_gains_stay_float32_when_the_model_is_moved():
    model, ids = build("llama"), batch()
    mutes = some_mutes(model, (0.3, 0.7, 0.1))
    with neumuter.mute(model, mutes):
        model.to(torch.bfloat16)
        gates = model.get_submodule("model.layers.1.mlp.down_proj.neumuter")
        assert gates.gains[[2, 17, 71]].tolist() == torch.tensor([0.3, 0.7, 0.1]).tolist()
        assert model(ids).logits.dtype == torch.bfloat16


def test_generation_of_a_muted_model():
    model, ids = build("llama"), batch(2)
    mutes = some_mutes(model)
    with neumuter.mute(model, mutes):
        muted = model.generate(ids, max_new_tokens=5, do_sample=False)
    neumuter.fold(model, mutes)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), muted)


@pytest.mark.parametrize(("name", "backend"), [("llama", "inductor"), ("gpt2", "aot_eager")])
def test_compiled_equals_eager(name, backend):
    model, ids = build(name), batch()
    with neumuter.mute(model, modulations(model)), torch.no_grad():
        expected = model(ids).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_rounded_weights_are_the_same_model():
    mutes = some_mutes(build("llama"))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        neumuter.mute(build("llama", dtype), mutes).undo()


def test_eight_bit_rounding_is_the_same_model():
    model = build("llama")
    mutes = some_mutes(model)
    for ffn in find_ffns(model):
        scale = ffn.down_weight.abs().amax(2, keepdim=True) / 127
        ffn.down_weight.copy_((ffn.down_weight / scale).round() * scale)
    neumuter.mute(model, mutes).undo()


def test_other_weights_are_refused():
    mutes = some_mutes(build("llama"))
    other = build("llama", seed=1)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    for apply in (neumuter.mute, neumuter.fold):
        with pytest.raises(
            neumuter.MuteMismatchError, match=r"model.layers.0.mlp: .* weights differ by 1\d\d\.\d%"
        ):
            apply(other, mutes)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    assert not any(isinstance(m, neumuter.models.hooks.Gates) for m in other.modules())


def test_one_changed_layer_is_named():
    model = build("gpt2")
    mutes = some_mutes(model)
    find_ffns(model)[2].down_weight.mul_(1.05)
    with pytest.raises(neumuter.MuteMismatchError, match=r"transformer.h.2.mlp: .* differ by 5.0%") as error:
        neumuter.mute(model, mutes)
    assert "transformer.h.1.mlp" not in str(error.value)


def test_folding_twice_is_refused():
    model = build("llama")
    mutes = some_mutes(model)
    neumuter.fold(model, mutes)
    with pytest.raises(neumuter.MuteMismatchError, match="folded in already"):
        neumuter.fold(model, mutes)


def test_other_architecture_is_refused(tmp_path):
    some_mutes(build("llama")).save(tmp_path / "m.safetensors")
    with pytest.raises(neumuter.MuteMismatchError) as error:
        neumuter.mute(build("gpt_neo"), tmp_path / "m.safetensors")
    for part in (
        "class: mute set LlamaForCausalLM, model GPTNeoForCausalLM",
        "model_type: mute set llama, model gpt_neo",
        "model.layers.1.mlp: mute set 72 neurons, model has no FFN there",
    ):
        assert part in str(error.value)


def test_other_width_is_refused():
    mutes = some_mutes(build("llama"))
    other = build("llama", intermediate_size=80)
    with pytest.raises(neumuter.MuteMismatchError, match=r"layers.2.mlp: mute set 72 neurons, model 80"):
        neumuter.mute(other, mutes)


def test_a_small_set_cannot_be_folded_twice():
    """One neuron of thousands moves the down projection by less than the tolerance."""
    model = build("llama", intermediate_size=4096)
    with neumuter.attach(model, start_layer=0) as masked:
        path = next(iter(masked.scores))
        neurons = {path: (torch.tensor([7]), torch.tensor([-0.5]))}
        mutes = masked.mute_set(neurons, mode="modulate", gain_range=(-2, 2))
    neumuter.fold(model, mutes)
    with pytest.raises(neumuter.MuteMismatchError, match="muted columns"):
        neumuter.fold(model, mutes)


# --- Several mute sets -----------------------------------------------------------------------


def of(model, neurons, **options):
    with neumuter.attach(model, start_layer=0) as masked:
        return masked.mute_set(neurons, **options)


PATHS = [f"model.layers.{i}.mlp" for i in range(3)]


def test_combining_takes_the_lower_gain(tmp_path):
    model, ids = build("llama"), batch()
    first = of(model, {PATHS[0]: ([3, 9], [0.5, 0.0]), PATHS[1]: ([4], [0.2])}, method={"number": 1})
    second = of(
        model, {PATHS[0]: ([9, 20], [-1.0, 1.5]), PATHS[2]: ([7], [0.0])}, mode="modulate", gain_range=(-2, 2)
    )
    second.save(tmp_path / "second.safetensors")
    both = neumuter.combine(model, [first, tmp_path / "second.safetensors"])
    assert {path: (i.tolist(), g.tolist()) for path, (i, g) in both.layers.items()} == {
        PATHS[0]: ([3, 9, 20], [0.5, -1.0, 1.5]),
        PATHS[1]: ([4], [torch.tensor(0.2).item()]),
        PATHS[2]: ([7], [0.0]),
    }
    assert (both.mode, both.gain_range, both.widths) == ("modulate", (-2.0, 2.0), first.widths)
    assert both.method["combined"][0] == {"number": 1}
    both.save(tmp_path / "both.safetensors")
    with neumuter.mute(model, tmp_path / "both.safetensors"):
        expected = model(ids).logits
    other = build("llama")
    for path, (indices, gains) in both.layers.items():
        other.get_submodule(path).down_proj.weight.data[:, indices.long()] *= gains
    torch.testing.assert_close(other(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_taking_one_set_out_of_another():
    model = build("llama")
    whole = of(model, {PATHS[0]: ([3, 9], [0.5, 0.0]), PATHS[1]: ([4], [0.2])})
    part = of(model, {PATHS[0]: ([9], [0.0]), PATHS[2]: ([1], [0.0])})
    left = neumuter.subtract(model, whole, part)
    assert {path: layer.indices.tolist() for path, layer in left.layers.items()} == {
        PATHS[0]: [3],
        PATHS[1]: [4],
    }
    with pytest.raises(ValueError, match="no neuron is muted"):
        neumuter.subtract(model, whole, whole)


def test_sets_of_other_models_are_not_combined():
    model = build("llama")
    mutes, others = some_mutes(model), some_mutes(build("llama", seed=1))
    for attempt in (
        lambda: neumuter.combine(model, [mutes, others]),
        lambda: neumuter.subtract(model, mutes, others),
    ):
        with pytest.raises(neumuter.MuteMismatchError, match="weights differ"):
            attempt()
    with pytest.raises(ValueError, match="at least one mute set"):
        neumuter.combine(model, [])


def test_a_model_sharded_by_fsdp_is_not_folded_into(tmp_path):
    """Its weights are whole for a while after a forward pass, but what is written there is lost."""
    model = build("llama")
    mutes = some_mutes(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        model(input_ids=batch())
        for use in (neumuter.fold, lambda *given: neumuter.mute(*given, how="fold")):
            with pytest.raises(ValueError, match="cannot fold"):
                use(model, mutes)
    finally:
        torch.distributed.destroy_process_group()
