"""Silenced neurons removed: the same logits from a smaller model, in memory and saved."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import neumuter
from neumuter.models.families import find_ffns
from neumuter.serving.shrink import Shrunk, shrink
from tests.models import HIDDEN, LAYERS, WIDTH, batch, build

FAMILIES = ("llama", "llama_bias", "qwen2", "gpt2", "gpt_neo", "phi3", "opt")
SILENT = (17, 23, 30)  # neurons per layer
MOST = WIDTH - min(SILENT)  # that a layer keeps: 55


def some_mutes(model, silent=SILENT):
    """Silenced neurons in each layer, spread over it, and two others that are modulated."""
    neurons = {}
    with neumuter.attach(model, start_layer=0) as masked:
        for layer, (path, count) in enumerate(zip(masked.scores, silent, strict=True)):
            order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(layer))
            gains = torch.tensor([0.0] * count + [-0.7, 1.6])
            chosen, at = order[: count + 2].sort()
            neurons[path] = (chosen.int(), gains[at])
        return masked.mute_set(neurons, mode="modulate", gain_range=(-2, 2))


def muted_logits(model, mutes):
    untouched = model(batch()).logits
    with neumuter.mute(model, mutes):
        expected = model(batch()).logits
    assert (expected - untouched).abs().max() > 0.05
    return expected


@pytest.mark.parametrize(("multiple", "width"), [(1, 55), (8, 56), (64, 64)])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_logits_from_fewer_neurons(tmp_path, name, multiple, width):
    model = build(name)
    mutes = some_mutes(model)
    expected = muted_logits(model, mutes)
    weights, size = model.state_dict(), sum(p.nbytes for p in model.parameters())
    result = shrink(model, mutes, multiple)
    paths = [ffn.path for ffn in find_ffns(model)]
    after = sum(p.nbytes for p in model.parameters())
    assert result == Shrunk(dict.fromkeys(paths, (WIDTH, width)), size, after)
    projections = [p for p in weights.values() if WIDTH in p.shape or 2 * WIDTH in p.shape]
    per_neuron = sum(p.nbytes // WIDTH for p in projections)
    assert size - after == (WIDTH - width) * per_neuron
    torch.testing.assert_close(model(batch()).logits, expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded(batch()).logits, model(batch()).logits)
    assert [sizes(ffn.module) for ffn in find_ffns(loaded)] == [sizes(f.module) for f in find_ffns(model)]


def sizes(module):
    """What the modules of an FFN say about themselves."""
    return {
        f"{path}.{name}": value
        for path, child in module.named_modules()
        for name, value in vars(child).items()
        if type(value) is int
    }


def test_what_is_left_are_the_very_weights():
    """Columns are removed, scaled or left; a layer that could lose more keeps silenced ones as filling."""
    model, original = build("llama"), build("llama")
    mutes = some_mutes(model)
    shrink(model, mutes, 8)
    for ffn, old, silent in zip(find_ffns(model), find_ffns(original), SILENT, strict=True):
        gains = torch.ones(WIDTH)
        gains[mutes.layers[ffn.path].indices.long()] = mutes.layers[ffn.path].gains
        columns = (old.down_weight * gains)[:, 0].unbind(1)
        rows = old.module.up_proj.weight.unbind(0)
        kept = [
            next(i for i, r in enumerate(rows) if torch.equal(r, row)) for row in ffn.module.up_proj.weight
        ]
        assert kept == sorted(kept)
        assert (gains[kept] == 0).sum() == 56 - (WIDTH - silent)
        assert set(kept) >= set(gains.nonzero()[:, 0].tolist())
        for column, neuron in zip(ffn.down_weight[:, 0].unbind(1), kept, strict=True):
            assert torch.equal(column, columns[neuron])
        assert torch.equal(ffn.module.gate_proj.weight, old.module.gate_proj.weight[kept])


def test_the_width_of_a_config_that_leaves_it_open(tmp_path):
    """GPT-2's n_inner is None for 4 · n_embd."""
    model = build("gpt2", n_inner=None)
    with neumuter.attach(model, start_layer=0) as masked:
        mutes = masked.mute_set({path: (list(range(20)), [0.0] * 20) for path in masked.scores})
    expected = muted_logits(model, mutes)
    shrink(model, mutes, 4)
    assert model.config.n_inner == 4 * HIDDEN - 20
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(batch()).logits, expected, rtol=1e-4, atol=1e-5)


def test_another_size_of_the_same_number():
    """The vocabulary, the hidden size and the width are equal; only the width changes."""
    model = build("llama", hidden_size=WIDTH, vocab_size=WIDTH, head_dim=8)
    ids = batch() % WIDTH
    mutes = some_mutes(model)
    with neumuter.mute(model, mutes):
        expected = model(ids).logits
    shrink(model, mutes, 8)
    config = model.config
    assert (config.intermediate_size, config.hidden_size, config.vocab_size) == (56, WIDTH, WIDTH)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_from_a_file_in_bfloat16_and_still_frozen(tmp_path):
    model = build("llama", torch.bfloat16).requires_grad_(False)
    mutes = some_mutes(model)
    mutes.save(tmp_path / "mutes.safetensors")
    expected = muted_logits(model, mutes)
    untouched = model(batch()).logits
    shrink(model, tmp_path / "mutes.safetensors", 8)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    error = (model(batch()).logits - expected).float().norm() / (untouched - expected).float().norm()
    assert error < 0.05
    with pytest.raises(neumuter.MuteMismatchError, match="mute set 72 neurons, model 56"):
        neumuter.mute(model, mutes)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 8)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Normed(Block):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)


def bare(block, layers=LAYERS):
    """A model without a config."""
    return nn.Sequential(*(block() for _ in range(layers)))


def test_without_a_config_each_layer_has_its_own_width():
    model, x = bare(Block), torch.randn(5, 8)
    mutes = some_mutes(model, (0, 23, 30))
    with neumuter.mute(model, mutes):
        expected = model(x)
    result = shrink(model, mutes, 4)
    assert result.widths == {"0": (WIDTH, WIDTH), "1": (WIDTH, 52), "2": (WIDTH, 44)}
    assert [block.down.in_features for block in model] == [WIDTH, 52, 44]
    torch.testing.assert_close(model(x), expected)


# --- What is refused -------------------------------------------------------------------------


def refused(model, mutes, message, multiple=8):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        shrink(model, mutes, multiple)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("silent", "multiple", "message"),
    [
        ((3, 20, 20), 64, r"model.layers.0.mlp keeps 69 of its 72 neurons, and widths are multiples of 64"),
        (
            (20, 20, 7),
            8,
            r"model.layers.2.mlp keeps 65 of its 72 neurons, and widths are multiples of 8, the",
        ),
        ((0, 0, 0), 1, r"model.layers.0.mlp keeps 72 of its 72 neurons"),
    ],
)
def test_nothing_to_remove(silent, multiple, message):
    model = build("llama")
    refused(model, some_mutes(model, silent), message, multiple)


def test_a_layer_that_the_set_leaves_out():
    model = build("llama")
    with neumuter.attach(model, start_layer=1) as masked:
        mutes = masked.mute_set({path: (list(range(30)), [0.0] * 30) for path in masked.scores})
    refused(model, mutes, "model.layers.0.mlp keeps 72 of its 72 neurons")


def test_nothing_to_remove_without_a_config():
    model = bare(Block)
    refused(
        model, some_mutes(model, (0, 1, 2)), "2 keeps 70 of its 72 neurons, and widths are multiples of 8$"
    )


def test_experts_are_refused():
    model = build("mixtral")
    with neumuter.attach(model, start_layer=0) as masked:
        mutes = masked.mute_set({path: (list(range(30)), [0.0] * 30) for path in masked.scores})
    refused(model, mutes, "has experts; only dense FFNs")


def test_quantised_weights_are_refused():
    torchao = pytest.importorskip("torchao.quantization")
    model = build("llama", torch.bfloat16)
    torchao.quantize_(
        model, torchao.IntxWeightOnlyConfig(torch.int8), lambda module, path: path.endswith("up_proj")
    )
    with pytest.raises(ValueError, match="is quantised, adapted, sharded or offloaded"):
        shrink(model, some_mutes(model), 8)
    assert model.config.intermediate_size == WIDTH


def test_what_depends_on_all_neurons_is_refused():
    model = bare(Normed)
    refused(model, some_mutes(model), r"cannot shrink 0: its norm.weight depends on all of the neurons")


def test_shared_weights_are_refused():
    model = build("llama")
    first, second, _ = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    with pytest.raises(
        ValueError,
        match=r"layers.0.mlp: its up_proj.weight shares its weights with model.layers.1.mlp.up_proj.weight",
    ):
        shrink(model, some_mutes(model))


def test_other_weights_are_refused():
    refused(build("llama", seed=1), some_mutes(build("llama")), "weights differ")


def test_a_config_that_does_not_say_the_width():
    model = build("llama")
    model.config.intermediate_size = WIDTH + 1
    refused(
        model, some_mutes(model), "no attribute of LlamaConfig makes all FFNs 56 instead of 72 neurons wide"
    )


@pytest.mark.parametrize("multiple", [0, -8, 8.0, True])
def test_a_multiple_that_is_none(multiple):
    model = build("llama")
    refused(model, some_mutes(model), "multiple must be an integer of at least 1", multiple)
