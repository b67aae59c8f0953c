"""Models as people load them: quantised, adapted, offloaded, compiled, checkpointed, padded and packed."""

import contextlib

import accelerate
import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import neumuter
from neumuter.models.families import find_ffns
from neumuter.recipes import FittedConfig, GainsConfig, fit_mutes, mute_random
from neumuter.training.batches import PairedBatches
from tests.models import LAYERS, SMALL, batch, build, build_double, randomise, same
from tests.neumuter import jobs

KINDS = ("llama", "gpt2", "phi3", "opt", "mixtral")


def mask_of(masked, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {path: torch.rand(len(score), generator=generator) for path, score in masked.scores.items()}


def check(model, tolerance=1e-4, trains=True):
    """Off has the same bits; a mask does what it does to the input of the down projection; undo works."""
    ids = batch()

    @torch.no_grad()  # bitsandbytes has another kernel where a gradient is needed
    def logits():
        return model(ids).logits

    logits()  # some quantised kernels pack their weights anew here
    plain = logits()
    with neumuter.attach(model) as masked:
        masks = mask_of(masked)
        assert torch.equal(logits(), plain)
        with masked.applying(masks):
            ours = logits()
        randomise(masked)
        with masked.sampling(0, 0, torch.arange(len(ids))):
            model(ids, labels=ids).loss.backward()
        assert all(score.grad.abs().max() > 0 for score in masked.scores.values()) == trains
        mutes = masked.select(budget=0.2)
    with neumuter.mute(model, mutes):
        muted = logits()
    assert torch.equal(logits(), plain)
    handles = [
        ffn.down.register_forward_pre_hook(lambda _, args, m=masks[ffn.path]: (args[0] * m.to(args[0]),))
        for ffn in find_ffns(model)
        if ffn.path in masks
    ]
    expected = logits()
    for handle in handles:
        handle.remove()
    error = (ours - expected).float().norm() / (plain - expected).float().norm()
    assert error < tolerance
    assert (muted - plain).abs().max() > 0
    return mutes


def linears(model):
    return [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in p]


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(name, dtype):
    check(build(name, dtype), tolerance=0.03)


@pytest.mark.parametrize("bits", [8, 4])
def test_torchao(bits):
    pytest.importorskip("torchao")
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = build("llama", torch.bfloat16, hidden_size=128, intermediate_size=256)
    quantize_(model, IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(32)))
    mutes = check(model, tolerance=0.05)
    with pytest.raises(ValueError, match="it is quantised"):
        neumuter.fold(model, mutes)


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn.modules import has_avx512bf16

    build("llama", torch.bfloat16, hidden_size=128, intermediate_size=256).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map="cpu", quantization_config=config
    ).eval()
    # On a CPU with AVX-512, bitsandbytes 4-bit products have no gradient once they ran without one.
    trains = bits == 8 or not has_avx512bf16()
    mutes = check(model, tolerance=0.1, trains=trains)
    with pytest.raises(ValueError, match="it is quantised"):
        neumuter.fold(model, mutes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers may compute in FP8 here")
def test_fp8_is_plain_where_nothing_computes_with_it(tmp_path):
    """As DeepSeek-V3 is published: blocks of 8 bits with a scale each."""
    model = build("llama", torch.bfloat16)
    model.config.quantization_config = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    model.config.save_pretrained(tmp_path)
    tensors = {}
    for name, weight in model.state_dict().items():
        tensors[name] = weight.contiguous()
        if name.endswith("proj.weight"):
            tensors[name] = weight.to(torch.float8_e4m3fn)
            scales = torch.full((weight.shape[0] // 8, weight.shape[1] // 8), 0.5)
            tensors[name.replace("weight", "weight_scale_inv")] = scales
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not hasattr(loaded.config, "quantization_config")
    weights = dict(loaded.named_parameters())
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            assert torch.equal(weights[name], tensor.bfloat16() / 2)
    check(loaded, tolerance=0.03)


@pytest.mark.parametrize("kind", jobs.QUANTISED)
def test_quantised_by_device_map(kind, tmp_path):
    """Accelerate's hooks, which place inputs on the device of each layer, change nothing."""
    jobs.need_library(kind)
    build("llama").save_pretrained(tmp_path)
    plain, spread = (jobs.quantised(tmp_path, kind) for _ in range(2))
    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(LAYERS)), "model.norm", "lm_head"]
    places = dict.fromkeys([*names, "model.rotary_emb"], "cpu")
    accelerate.dispatch_model(spread, places, force_hooks=True)
    assert hasattr(spread.model.layers[1].mlp.down_proj, "_hf_hook")
    outcomes = [jobs.unlearn(model, "modulate") for model in (plain, spread)]
    assert same(*(outcome.mutes for outcome in outcomes))
    # What 4 bits are found to hold is too far from the weights that they were made from.
    fits = contextlib.nullcontext() if kind in ("8bit", "int8") else pytest.raises(neumuter.MuteMismatchError)
    with fits:
        neumuter.mute(build("llama"), outcomes[1].mutes).undo()


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_outliers_at_8_bits_change_other_samples(threshold):
    """Why several processes refuse 8 bits of bitsandbytes with a threshold, and take them without one."""
    jobs.need_library("8bit")
    from bitsandbytes.nn import Linear8bitLt

    layer = Linear8bitLt(64, 8, bias=False, has_fp16_weights=False, threshold=threshold).to("cpu").eval()
    rows = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    alone = layer(rows[:1])
    rows[1, 3] = 50.0
    assert torch.equal(layer(rows)[:1], alone) == (threshold == 0)


def test_quantised_weights_without_a_backward_pass_are_named(tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    build("llama").save_pretrained(tmp_path)
    config = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu"
    ).eval()
    with pytest.raises(ValueError, match="the quantised weights pass no gradient back"):
        jobs.unlearn(model, "modulate")


class Packed(nn.Module):
    """A linear projection with integer weights and a scale per row, as GPTQ and AWQ kernels have it."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scales", scale)

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) * self.scales.to(x.dtype)).T


def test_foreign_quantised_linears():
    model = build("llama")
    original = check(model)
    for path, linear in linears(model):
        model.set_submodule(path, Packed(linear))
    mutes = check(model)
    with pytest.raises(ValueError, match="it is quantised"):
        neumuter.fold(model, mutes)
    neumuter.mute(model, original).undo()  # rounded weights are the same model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora_on_top_and_merged(name):
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(build(name), config).eval()
    mutes = check(model)
    assert not any("base_model" in path for path in mutes.widths)
    with pytest.raises(ValueError, match="adapted"):
        neumuter.fold(model, mutes)
    ids = batch()
    with neumuter.mute(model, mutes):
        expected = model(ids).logits
    merged = model.merge_and_unload()
    with neumuter.mute(merged, mutes):
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-3, atol=1e-3)
    neumuter.fold(merged, mutes)
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_dropout_of_adapters_does_not_change_the_fingerprint():
    config = peft.LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(build("llama"), config).train()
    with neumuter.attach(model) as masked:
        randomise(masked)
        mutes = masked.select(budget=0.2)
    assert model.training
    assert model.base_model.model.model.layers[1].mlp.down_proj.training
    neumuter.mute(model, mutes).undo()


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt"])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_offloaded(name, place, tmp_path):
    expected = check(build(name))
    model = build(name)
    if place == "memory":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    mutes = check(model)
    for path, layer in expected.layers.items():
        assert torch.equal(layer.indices, mutes.layers[path].indices)
    with pytest.raises(ValueError, match="offloaded"):
        neumuter.fold(model, mutes)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_offloading_after_muting_is_taken_off_before_the_mute(name):
    """Else the module would run on weights that are not there, or the mute would come back."""
    model, ids = build(name), batch()
    plain = model(ids).logits
    with neumuter.attach(model) as masked:
        mutes = mute_random(masked, 0.1, seed=0)
    handle = neumuter.mute(model, mutes)
    muted = model(ids).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.equal(model(ids).logits, muted)
    with pytest.raises(RuntimeError, match=r"cannot be put back: Accelerate's .*Hook was put on it since"):
        handle.undo()
    assert torch.equal(model(ids).logits, muted)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(ids).logits, muted)
    handle.undo()
    assert torch.equal(model(ids).logits, plain)
    # The other way round, the mute is gone with the hook that was there before it.
    accelerate.cpu_offload(model, execution_device="cpu")
    handle = neumuter.mute(model, mutes)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    handle.undo()
    assert torch.equal(model(ids).logits, plain)
    neumuter.mute(model, mutes).undo()
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_model_that_was_muted_in_inference_mode_can_be_trained(name):
    model, ids = build(name), batch()
    with neumuter.attach(model) as masked:
        mutes = mute_random(masked, 0.1, seed=0)
    expected = []
    for inference in (False, True):
        model.zero_grad()
        with torch.inference_mode(inference):
            handle = neumuter.mute(model, mutes)
        model(ids, labels=ids).loss.backward()
        expected.append(model.get_input_embeddings().weight.grad.clone())
        handle.undo()
    assert torch.equal(*expected)


def test_a_bank_that_was_made_in_inference_mode_takes_sets_outside_of_it():
    model, ids = build("llama"), batch()[:1]
    with neumuter.attach(model) as masked:
        first, second = (mute_random(masked, 0.1, seed=seed) for seed in range(2))
    with neumuter.mute(model, second):
        expected = model(ids).logits
    with torch.inference_mode():
        bank = neumuter.MuteBank(model)
        bank.add("first", first)
    bank.add("second", second)
    with bank.using(["second"]), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    bank.undo()


def test_a_forward_that_was_replaced_is_not_lost():
    model, ids = build("llama"), batch()
    with neumuter.attach(model) as masked:
        mutes = mute_random(masked, 0.1, seed=0)
    handle = neumuter.mute(model, mutes)
    muted = model(ids).logits
    down = model.model.layers[2].mlp.down_proj
    inner = down.forward
    down.forward = lambda hidden: inner(hidden)
    with pytest.raises(
        RuntimeError, match=r"layers\.2\.mlp cannot be put back: another forward was put on it"
    ):
        handle.undo()
    assert torch.equal(model(ids).logits, muted)
    down.forward = inner
    handle.undo()
    assert "forward" not in vars(down)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_recipe_finds_the_same_on_an_offloaded_model(name):
    """As ``device_map`` loads it: each layer is on the device while it runs."""
    ids, found, logits = batch(), [], []
    one = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    for offloaded in (False, True):
        model = build(name)
        if offloaded:
            accelerate.cpu_offload(model, execution_device="cpu")
        with neumuter.attach(model) as masked:
            config = FittedConfig(GainsConfig(steps=3))
            found.append(fit_mutes(PairedBatches(masked, one, one), 4, config=config))
        with neumuter.mute(model, found[0]):
            logits.append(model(ids).logits)
    assert torch.equal(*logits)
    for path, sketch in found[0].fingerprint.items():
        assert found[1].fingerprint[path] == pytest.approx(sketch, rel=1e-3, abs=1e-4)
    for path, layer in found[0].layers.items():
        assert torch.equal(layer.indices, found[1].layers[path].indices)
        assert torch.equal(layer.gains, found[1].layers[path].gains)
    assert found[0].count == 4
    with pytest.raises(ValueError, match="offloaded"):
        neumuter.fold(model, found[1])


def test_experts_offloaded(tmp_path):
    model, ids = build("mixtral"), batch()
    with neumuter.attach(model) as masked, masked.applying(mask_of(masked)):
        expected = model(ids).logits
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    with neumuter.attach(model) as masked, masked.applying(mask_of(masked)):
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_recomputes_the_same_noise(name):
    gradients = []
    for checkpointing in (False, True):
        model = build(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with neumuter.attach(model) as masked:
            randomise(masked)
            with masked.sampling(0, 4, torch.arange(4)):
                model(batch(), labels=batch()).loss.backward()
            gradients.append([score.grad for score in masked.scores.values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_compiled_without_graph_breaks(name):
    model, ids = build(name), batch()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    with neumuter.attach(model) as masked:
        randomise(masked)
        compiled = torch.compile(model, backend=counter, fullgraph=True)

        def step(function, number):
            for score in masked.scores.values():
                score.grad = None
            with masked.sampling(0, number, torch.arange(4) + number):
                loss = F.cross_entropy(function(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
                loss.backward()
            return loss.detach(), [score.grad.clone() for score in masked.scores.values()]

        for number in range(3):
            loss, gradients = step(compiled, number)
            expected, wanted = step(model, number)
            torch.testing.assert_close(loss, expected)
            for a, b in zip(gradients, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert counter.frame_count <= 2  # the second time, numbers that changed become symbols
        mutes = masked.select(budget=0.2)
    torch._dynamo.reset()
    with neumuter.mute(model, mutes):
        expected = model(ids).logits
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits, expected
        )


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_attaching_a_compiled_model(name):
    model, ids = build(name), batch()
    with neumuter.attach(model) as masked:
        seams = masked.seams
    compiled = torch.compile(model, backend="eager")
    expected = compiled(ids).logits
    with neumuter.attach(compiled) as masked:
        assert masked.seams == seams
        assert torch.equal(compiled(ids).logits, expected)
        with masked.applying(mask_of(masked)):
            ours = compiled(ids).logits
            torch.testing.assert_close(ours, model(ids).logits)
    assert not torch.allclose(ours, expected)


def test_compiled_layers_have_the_paths_of_plain_ones():
    model, ids = build("llama"), batch()
    with neumuter.attach(model) as masked:
        randomise(masked)
        mutes = masked.select(budget=0.2)
    with neumuter.mute(model, mutes):
        expected = model(ids).logits
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")
    with neumuter.mute(model, mutes):
        torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral"])
def test_static_cache(name):
    model, ids = build(name), batch(2)
    model.generation_config.pad_token_id = 0
    with neumuter.attach(model) as masked, masked.applying(mask_of(masked)):
        options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
        expected = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_untouched(attention):
    model, ids = build("llama"), batch()
    model.set_attn_implementation(attention)
    with neumuter.attach(model) as masked, masked.applying(mask_of(masked)):
        ours = model(ids).logits
    assert model.config._attn_implementation == attention
    with neumuter.attach(build("llama")) as masked, masked.applying(mask_of(masked)):
        torch.testing.assert_close(masked.model(ids).logits, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "mixtral"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(name, side):
    """Each sample of a padded batch is as it is alone, with the noise of its own id."""
    model = build_double(name)
    lengths, ids = (7, 4, 6), batch(3)
    shown = torch.zeros_like(ids)
    padded = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(-length, None) if side == "left" else slice(0, length)
        padded[row, place], shown[row, place] = ids[row, :length], 1
    positions = (shown.cumsum(1) - 1).clamp(min=0)
    extra = {} if name == "opt" else {"position_ids": positions}  # OPT counts positions itself
    samples = torch.tensor([5, 9, 2])
    with neumuter.attach(model) as masked:
        randomise(masked)
        with masked.sampling(0, 0, samples):
            together = model(padded, attention_mask=shown, **extra).logits
        for row, length in enumerate(lengths):
            with masked.sampling(0, 0, samples[row : row + 1]):
                alone = model(ids[row : row + 1, :length]).logits[0]
            place = slice(-length, None) if side == "left" else slice(0, length)
            torch.testing.assert_close(together[row, place], alone)


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral"])
def test_packed_sequences(name):
    """Samples packed into one row by position ids, each with its own noise; unmasked tokens stay open."""
    model = build_double(name)
    lengths, ids = (7, 4, 6), batch(3)
    packed = torch.cat([ids[row, :n] for row, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    rows = torch.cat([torch.full((n,), row) for row, n in enumerate((7, 4))] + [torch.full((6,), -1)])[None]
    samples = torch.tensor([5, 9])
    with neumuter.attach(model) as masked:
        randomise(masked)
        with masked.sampling(0, 0, samples, row_ids=rows):
            together = model(packed, position_ids=positions, use_cache=False).logits[0].split(lengths)
        for row, n in enumerate(lengths[:2]):
            with masked.sampling(0, 0, samples[row : row + 1]):
                torch.testing.assert_close(together[row], model(ids[row : row + 1, :n]).logits[0])
        torch.testing.assert_close(together[2], model(ids[2:, :6]).logits[0])
        with masked.sampling(0, 0, samples, row_ids=rows), pytest.raises(ValueError, match="row_ids has 17"):
            model(ids)
        with pytest.raises(ValueError, match="row_ids must be integers from -1 to 1"):
            masked.sampling(0, 0, samples, row_ids=rows + 1)


def test_a_deep_copy_is_a_model_of_its_own():
    import copy

    model, ids = build("llama"), batch()
    with neumuter.attach(model) as masked, masked.applying(mask_of(masked)):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.down_proj.weight.zero_()
        assert not torch.allclose(other(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_pickled_model_is_whole(name, tmp_path):
    model, ids = build(name), batch()
    with neumuter.attach(model) as masked, masked.applying(mask_of(masked)):
        expected = model(ids).logits
        torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(other(ids).logits, expected)
