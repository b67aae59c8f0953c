"""Every family: attach, gradients, muting, folding and detach on a small model built from its config."""

import copy
import functools
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import neumuter
import neumuter.models.hooks
from neumuter.models.families import REGISTERED, find_ffns
from neumuter_kernels import hard_concrete
from tests.models import EXPERTS, FAMILIES, OF_EXPERTS, WIDTH, batch, build, build_double, randomise

every_family = pytest.mark.parametrize("name", FAMILIES)
SEAMS = {"activation", "ffn", "experts", "repeated_experts", "routing_experts", "down"}
PLAIN = ("gpt2", "gpt_neo", "gptj", "gpt_neox", "phi", "opt", "starcoder2", "bloom")
# FFNs that do more than the kernels know: Gemma 3n's first layers drop small gates.
NOT_FUSED = {"llama_mish": "012", "modernbert_decoder": "012", "gemma3n": "0"}


def generated(model, ids):
    model.generation_config.pad_token_id = 0
    return model.generate(
        ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, return_dict_in_generate=True,
        output_logits=True,
    ).logits  # fmt: skip


def pre_hooks(model, gates):
    """Masks at every down projection by hooks: {path: [B, F] or [B, E, F]}. Returns what undoes it.

    The slow oracle. Of experts, a loop over them as transformers' eager code has it.
    """
    undo = []
    for ffn in find_ffns(model):
        if ffn.path not in gates:
            continue
        mask = gates[ffn.path]
        if ffn.is_dense:

            def hook(module, arguments, mask=mask):
                (x,) = arguments
                rows = mask.repeat_interleave(x.shape[:-1].numel() // len(mask), 0)
                return (x * rows.view(x.shape).to(x.dtype),)

            undo.append(ffn.down.register_forward_pre_hook(hook).remove)
        else:
            loop = LOOPS.get(type(ffn.module).__name__, looped)
            ffn.module.forward = functools.partial(loop, ffn.module, mask)
            undo.append(lambda module=ffn.module: delattr(module, "forward"))
    return lambda: [function() for function in undo]


def looped_llama4(experts, mask, hidden):
    """Every expert sees every token, times its weight."""
    number = experts.num_experts
    tokens = len(hidden) // number
    mask = mask.view(len(mask), number, -1).repeat_interleave(tokens // len(mask), 0).to(hidden.dtype)
    outputs = []
    for e, x in enumerate(hidden.split(tokens)):
        gate, up = (x @ experts.gate_up_proj[e]).chunk(2, -1)
        outputs += [(experts.act_fn(gate) * up * mask[:, e]) @ experts.down_proj[e]]
    return torch.cat(outputs)


def looped_jetmoe(moe, mask, hidden):
    flat = hidden.flatten(0, 1)
    _, token, weights, counts, _ = moe.router(flat)
    mask = mask.view(len(mask), len(counts), -1).repeat_interleave(len(flat) // len(mask), 0).to(hidden.dtype)
    output = torch.zeros_like(flat)
    expert = [e for e, count in enumerate(counts) for _ in range(int(count))]
    for t, e, weight in zip(token.tolist(), expert, weights, strict=True):
        gate, up = (moe.input_linear.weight[e] @ flat[t]).chunk(2)
        h = moe.activation(gate) * up * mask[t, e]
        output[t] += moe.output_linear.weight[e] @ h * weight
    return output.view(hidden.shape) + moe.bias


def looped(experts, mask, hidden, chosen, weights):
    mask = mask.view(len(mask), experts.num_experts, -1).to(hidden.dtype)
    mask = mask.repeat_interleave(len(hidden) // len(mask), 0)
    output = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
            if not experts.is_transposed:
                up, down = up.T, down.T
            h = hidden[token] @ up + (experts.gate_up_proj_bias[expert] if experts.has_bias else 0)
            h = experts._apply_gate(h) * mask[token, expert]
            y = h @ down + (experts.down_proj_bias[expert] if experts.has_bias else 0)
            output[token] += y * weight
    return output


LOOPS = {"Llama4TextExperts": looped_llama4, "JetMoeMoE": looped_jetmoe}


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_off_has_the_bits_of_the_untouched_model(name, dtype):
    model, ids = build(name, dtype), batch()
    modules, keys = dict(model.named_modules()), model.state_dict().keys()
    logits, continued = model(ids).logits, generated(model, ids)
    with neumuter.attach(model) as masked:
        randomise(masked)
        assert set(masked.seams.values()) <= SEAMS
        assert torch.equal(model(ids).logits, logits)
        assert all(torch.equal(a, b) for a, b in zip(generated(model, ids), continued, strict=True))
        with masked.evaluating():
            assert not torch.equal(model(ids).logits, logits)
            with masked.off():
                assert torch.equal(model(ids).logits, logits)
        assert {key for key in model.state_dict() if not key.endswith("neumuter.scores")} == keys
    assert model.state_dict().keys() == keys
    assert dict(model.named_modules()) == modules
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(ids).logits, logits)


@every_family
def test_the_fused_seam_is_found(name):
    with neumuter.attach(build(name), 0) as masked:
        for path, seam in masked.seams.items():
            if name in OF_EXPERTS and (path.endswith(".experts") or name == "jetmoe"):
                wanted = {"llama4": "repeated_experts", "jetmoe": "routing_experts"}
                assert seam == wanted.get(name, "experts")
                assert len(masked.scores[path]) == EXPERTS * WIDTH
            elif any(f".{layer}." in path for layer in NOT_FUSED.get(name, "")):
                assert seam == "down"
            else:
                assert seam == ("activation" if name in PLAIN else "ffn")
        assert len(masked.seams) == {"qwen2_moe": 6, "llama4": 5, "deepseek_v3": 5}.get(name, 3)


@every_family
def test_gradients_are_those_of_a_hook_on_the_down_projection(name):
    model, ids = build_double(name), batch()
    samples = torch.arange(4) + 10
    with neumuter.attach(model) as masked:
        randomise(masked)
        with masked.sampling(seed=5, step=2, sample_ids=samples):
            loss = model(ids, labels=ids).loss
            loss.backward()
        got = {path: score.grad.clone() for path, score in masked.scores.items()}
        scores = {path: score.detach().clone().requires_grad_() for path, score in masked.scores.items()}
    layers = {ffn.path: ffn.layer for ffn in find_ffns(model)}
    gates = {path: hard_concrete(s, 4, 5, 2, layers[path], samples).double() for path, s in scores.items()}
    undo = pre_hooks(model, gates)
    expected = model(ids, labels=ids).loss
    expected.backward()
    undo()
    torch.testing.assert_close(loss, expected)
    for path, score in scores.items():
        assert score.grad.abs().max() > 0
        torch.testing.assert_close(
            got[path], score.grad, rtol=1e-4, atol=1e-6 * score.grad.abs().max().item()
        )


@every_family
def test_muting_zeroes_columns_and_survives_folding_and_saving(name, tmp_path):
    model, ids = build(name), batch()
    plain = model(ids).logits
    with neumuter.attach(model) as masked:
        randomise(masked)
        mutes = masked.select(budget=0.3)
    mutes.save(tmp_path / "forget.mute")
    zeroed = copy.deepcopy(model)
    for ffn in find_ffns(zeroed):
        if ffn.path in mutes.layers:
            indices, gains = mutes.layers[ffn.path]
            weight = ffn.down_weight.flatten(1) if ffn.is_dense else ffn.down_weight
            if ffn.is_dense:
                weight[:, indices.long()] *= gains
            else:
                width = weight.shape[2]
                weight[:, indices // width, indices % width] *= gains
    expected = zeroed(ids).logits
    assert not torch.allclose(expected, plain, atol=1e-3)
    with neumuter.mute(model, tmp_path / "forget.mute"):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(ids).logits, plain)
    neumuter.fold(model, mutes)
    assert torch.equal(model(ids).logits, expected)
    model.save_pretrained(tmp_path / "folded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    assert torch.equal(again(ids).logits, expected)
    with pytest.raises(neumuter.MuteMismatchError):
        neumuter.mute(again, mutes)


def tokens(ids, length=None):
    """A batch of unpadded texts, or of texts of which the first ``length`` tokens are no padding."""
    attention = torch.ones_like(ids)
    attention[:, length:] = 0 if length else 1
    return {"input_ids": ids, "attention_mask": attention}


@pytest.mark.parametrize("name", OF_EXPERTS)
def test_experts_that_padding_reaches_are_not_reached(name):
    model, ids = build(name), batch(1, 12)
    found = []
    for given in (tokens(ids[:, :1]), tokens(ids, 1), tokens(ids)):
        with neumuter.attach(model, 0) as masked:
            masked.keep_unreached_open([given])
            found += [{path: score.isfinite() for path, score in masked.scores.items()}]
    for path, alone in found[0].items():
        assert torch.equal(found[1][path], alone)
    assert any(not torch.equal(found[2][path], alone) for path, alone in found[0].items())


@pytest.mark.parametrize("name", OF_EXPERTS)
def test_unreached_experts_are_never_muted(name):
    model = build(name)
    with neumuter.attach(model, 0) as masked:
        masked.keep_unreached_open([tokens(batch(1, 1))])
        total, reached = 0, 0
        for path, score in masked.scores.items():
            total += len(score)
            reached += int(score.isfinite().sum())
            if masked.seams[path].endswith("experts"):
                by_expert = score.view(EXPERTS, WIDTH).isfinite()
                assert by_expert.all(1).sum() == by_expert.any(1).sum() == 2  # of one token
        with torch.no_grad():
            for score in masked.scores.values():
                score -= 5
        assert masked.select(budget=reached).count == reached < total
        with pytest.raises(ValueError, match=f"asks for {reached + 1} neurons, but the experts"):
            masked.select(budget=reached + 1)
        samples = torch.arange(4)
        with masked.sampling(0, 0, samples):
            loss = model(batch(), labels=batch()).loss
        loss.backward()
        for score in masked.scores.values():
            assert score.grad.isfinite().all()
            assert (score.grad[score.isinf()] == 0).all()


# --- Layouts that nobody told us of ----------------------------------------------------------


class Odd(nn.Module):
    """A gated FFN under names of its own."""

    def __init__(self, d=8, width=24):
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(d, width), nn.Linear(d, width), nn.Linear(width, d)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


def test_unknown_layouts_are_named_and_can_be_described():
    model = nn.Sequential(Odd())
    with pytest.raises(ValueError, match=r"0, a Odd, looks like an FFN.*register_family.*are: w1, w3, w2"):
        neumuter.attach(model, 0)
    neumuter.register_family(gate="w1", up="w3", down="w2", activation="act")
    try:
        (ffn,) = find_ffns(model)
        assert (ffn.path, ffn.width, ffn.activation) == ("0", 24, "silu")
        x = torch.randn(2, 3, 8)
        expected = model(x)
        with neumuter.attach(model, 0) as masked:
            assert torch.equal(model(x), expected)
            mask = torch.rand(24)
            with masked.applying({"0": mask}):
                down = model[0]
                hidden = down.act(down.w1(x)) * down.w3(x) * mask
                torch.testing.assert_close(model(x), hidden @ down.w2.weight.T + down.w2.bias)
    finally:
        REGISTERED.clear()


@pytest.mark.parametrize("names", [{}, {"up": "a", "gate_up": "b"}, {"gate": "a", "gate_up": "b"}])
def test_bad_descriptions(names):
    with pytest.raises(ValueError, match="down needs up"):
        neumuter.register_family(down="d", **names)
    assert not REGISTERED


def test_unknown_experts_are_refused():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.zeros(4, 8, 16))

    model = build("llama")
    model.model.layers[1].mixture = Mixture()
    with pytest.raises(ValueError, match=r"model.layers.1.mixture, a Mixture, holds the 3-dimensional"):
        neumuter.attach(model)


def test_an_ffn_that_computes_more_is_masked_at_its_down_projection():
    model, ids = build("llama"), batch()
    mlp = model.model.layers[1].mlp
    plain = type(mlp).forward
    mlp.forward = lambda x: plain(mlp, x) + x
    expected = model(ids).logits
    with neumuter.attach(model) as masked:
        assert masked.seams == {"model.layers.1.mlp": "down", "model.layers.2.mlp": "ffn"}
        assert torch.equal(model(ids).logits, expected)
        with masked.applying({"model.layers.1.mlp": torch.zeros(WIDTH)}):
            off = model(ids).logits
    mlp.forward = lambda x: x
    torch.testing.assert_close(off, model(ids).logits)


def clamped(mlp, x):
    """A gated FFN that differs from Llama's for large inputs only."""
    gate, up = mlp.gate_proj(x).clamp(max=50), mlp.up_proj(x).clamp(-50, 50)
    return mlp.down_proj(mlp.act_fn(gate) * up)


def scaled(mlp, x):
    return 0.97 * type(mlp).forward(mlp, x)


@pytest.mark.parametrize("change", [clamped, scaled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_differences_are_seen(change, dtype):
    model = build("llama", dtype)
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: change(mlp, x)
    with neumuter.attach(model) as masked:
        assert masked.seams == {"model.layers.1.mlp": "down", "model.layers.2.mlp": "ffn"}


def test_children_beside_the_layout_are_not_lost():
    model = build("llama")
    mlp = model.model.layers[1].mlp
    mlp.dropout = nn.Dropout(0.5)
    mlp.forward = lambda x: mlp.dropout(type(mlp).forward(mlp, x))
    with neumuter.attach(model) as masked:
        assert masked.seams["model.layers.1.mlp"] == "down"


def test_an_ffn_with_more_arguments():
    model, ids = build("llama"), batch()
    mlp = model.model.layers[1].mlp
    plain = type(mlp).forward

    class Numbered(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp

        def forward(self, x):
            return self.inner(x, 1)

    mlp.forward = lambda x, number: plain(mlp, x)
    model.model.layers[1].mlp = Numbered()
    with neumuter.attach(model) as masked:
        assert masked.seams["model.layers.1.mlp.inner"] == "down"
        with masked.evaluating():
            model(ids)


def test_a_shared_activation_is_left_alone():
    model, ids = build("gpt2"), batch()
    for block in model.transformer.h[1:]:
        block.mlp.act = model.transformer.h[0].mlp.act
    with neumuter.attach(model, 0) as masked:
        assert set(masked.seams.values()) == {"down"}
        with masked.applying({"transformer.h.0.mlp": torch.zeros(WIDTH)}):
            ours = model(ids).logits
    model.transformer.h[0].mlp.c_proj.weight.data.zero_()
    torch.testing.assert_close(ours, model(ids).logits)


def test_a_layer_that_is_not_understood_is_named():
    class Inline(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.back = nn.Linear(32, 72), nn.Linear(72, 32)

        def forward(self, x):
            return self.back(torch.nn.functional.gelu(self.dense(x)))

    model, ids = build("llama"), batch()
    model.model.layers[1].mlp = Inline()
    with pytest.raises(ValueError, match=r"model.layers.1.mlp, a Inline, looks like an FFN.*dense, back"):
        neumuter.attach(model)
    neumuter.register_family(up="dense", down="back")
    try:
        with neumuter.attach(model) as masked:
            assert masked.seams["model.layers.1.mlp"] == "down"
            with masked.applying({"model.layers.1.mlp": torch.zeros(72)}):
                ours = model(ids).logits
        model.model.layers[1].mlp.back.weight.data.zero_()
        torch.testing.assert_close(ours, model(ids).logits)
    finally:
        REGISTERED.clear()


def test_a_module_around_an_ffn_is_none():
    """As Gemma 3n's decoder layers, which have projections and an activation of their own."""
    model = build("llama")
    layer = model.model.layers[1]
    layer.act, layer.narrow, layer.widen = nn.SiLU(), nn.Linear(32, 8), nn.Linear(8, 32)
    assert [ffn.path for ffn in find_ffns(model)] == [f"model.layers.{i}.mlp" for i in range(3)]


def test_encoder_decoders_are_refused():
    config = T5Config(vocab_size=50, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        neumuter.attach(T5ForConditionalGeneration(config))


def test_a_failed_attach_leaves_nothing_behind(monkeypatch):
    model = build("llama")
    before, flags = dict(model.named_modules()), [p.requires_grad for p in model.parameters()]
    install, calls = neumuter.models.hooks.Gates.install, []

    def failing(self, module):
        calls.append(self)
        if len(calls) == 2:
            raise KeyError
        install(self, module)

    monkeypatch.setattr("neumuter.models.hooks.Gates.install", failing)
    with pytest.raises(KeyError):
        neumuter.attach(model)
    assert dict(model.named_modules()) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_experts_that_are_reached_later_can_be_selected_again():
    model = build("mixtral")
    with neumuter.attach(model) as masked:
        counts = []
        for ids in (batch(1, 1), batch(4, 9)):
            masked.keep_unreached_open([tokens(ids)])
            counts.append(sum(int(score.isfinite().sum()) for score in masked.scores.values()))
        assert counts[0] < counts[1]


def test_the_documentation_lists_every_family():
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", page.split("<!-- made by", 1)[1], re.MULTILINE)
    assert rows == [(name, type(build(name)).__name__) for name in FAMILIES]
