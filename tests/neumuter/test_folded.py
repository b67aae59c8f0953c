"""Mute sets folded into the weights of a live model for a while: what sees them, and undoing bit for bit."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

import neumuter
from neumuter.serving.fold import Columns
from tests.models import FAMILIES, SMALL, WIDTH, batch, build
from tests.neumuter.test_bank import logits, sets_of
from tests.neumuter.test_installed import lora, patch
from tests.neumuter.test_matching import share, shared_mutes


def modulating(model, share=0.1):
    """A set with gains of many values."""
    (mutes,) = sets_of(model, 1, share)
    for layer in mutes.layers.values():
        layer.gains.copy_(torch.linspace(0, 0.9, len(layer.gains)))
    return mutes


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(model, before):
    """Whether the weights are those, and -0 is not 0."""
    after = model.state_dict()
    return after.keys() == before.keys() and all(
        value.dtype == after[name].dtype
        and torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (value, after[name])))
        for name, value in before.items()
    )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in FAMILIES] + [(name, torch.bfloat16) for name in SMALL],
    ids=str,
)
def test_it_is_folding_and_undone_bit_for_bit(name, dtype):
    model, ids = build(name, dtype), batch()
    mutes, before, plain = modulating(model), bits(model), logits(model, ids)
    modules = dict(model.named_modules())
    expected = copy.deepcopy(model)
    neumuter.fold(expected, mutes)
    with neumuter.mute(model, mutes, how="fold") as muted:
        assert same_bits(model, bits(expected))
        assert torch.equal(logits(model, ids), logits(expected, ids))
        assert dict(model.named_modules()) == modules
        for _ in range(2):
            with muted.off(), muted.off():
                assert same_bits(model, before)
            assert same_bits(model, bits(expected))
    assert same_bits(model, before)
    assert torch.equal(logits(model, ids), plain)
    assert not torch.equal(logits(expected, ids), plain)
    muted.undo()
    neumuter.mute(model, mutes).undo()


@pytest.mark.parametrize("how", ["live", "fold"])
def test_off_holds_until_its_own_end(how):
    model, ids = build("llama"), batch()
    plain = logits(model, ids)
    with neumuter.mute(model, modulating(model), how) as muted:
        expected = logits(model, ids)
        with muted.off():
            with muted.off():
                pass
            assert torch.equal(logits(model, ids), plain)
        assert torch.equal(logits(model, ids), expected)
        with muted.off():
            muted.undo()
        assert torch.equal(logits(model, ids), plain)
    assert torch.equal(logits(model, ids), plain)


def test_the_originals_are_those_of_the_muted_columns_alone():
    model = build("llama", torch.bfloat16)
    mutes = modulating(model)
    muted = neumuter.mute(model, mutes, how="fold")
    kept = [one.originals for one in muted._way.columns]
    assert [tuple(x.shape) for x in kept] == [(32, len(layer.indices)) for layer in mutes.layers.values()]
    assert all(x.dtype == torch.bfloat16 and x.untyped_storage().nbytes() == x.nbytes for x in kept)


@pytest.mark.parametrize("name", SMALL)
def test_saved_copied_and_pickled_models_are_folded_for_good(name, tmp_path):
    model, ids = build(name), batch()
    mutes = modulating(model)
    with neumuter.mute(model, mutes, how="fold"):
        expected = logits(model, ids)
        model.save_pretrained(tmp_path)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    for other in copies:
        assert torch.equal(logits(other, ids), expected)
        with pytest.raises(neumuter.MuteMismatchError, match="folded in already"):
            neumuter.mute(other, mutes, how="fold")
        neumuter.attach(other).detach()
    assert not torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("how", ["live", "fold"])
def test_a_folded_model_is_muted(how):
    model = build("llama")
    mutes, others = sets_of(model, 2)
    first = neumuter.mute(model, mutes, how="fold")
    for refused in (
        lambda: neumuter.mute(model, mutes, how),
        lambda: neumuter.mute(model, others, how),
        lambda: neumuter.fold(model, others),
        lambda: neumuter.attach(model),
        lambda: neumuter.MuteBank(model),
        lambda: neumuter.combine(model, [others]),
        lambda: neumuter.shrink(model, others),
    ):
        with pytest.raises(RuntimeError, match=r"folded into model.layers.0.mlp for a while.*undo\(\)"):
            refused()
        with first.off(), pytest.raises(RuntimeError, match="for a while"):
            refused()
    first.undo()
    second = neumuter.mute(model, others, how)
    with pytest.raises(RuntimeError, match="attached or muted"):
        neumuter.mute(model, mutes, how="fold")
    second.undo()


def failing_at(call, monkeypatch):
    """Let that write of columns fail, of those from now on."""
    real, calls = Columns.write, []

    def write(one, columns):
        calls.append(one)
        if len(calls) == call:
            raise MemoryError
        real(one, columns)

    monkeypatch.setattr(Columns, "write", write)


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_an_exception_in_the_middle_changes_nothing(name, call, monkeypatch):
    model = build(name)
    mutes, before = modulating(model), bits(model)
    for use in (neumuter.fold, lambda *given: neumuter.mute(*given, how="fold")):
        with monkeypatch.context() as patched:
            failing_at(call, patched)
            with pytest.raises(MemoryError):
                use(model, mutes)
        assert same_bits(model, before)
    muted = neumuter.mute(model, mutes, how="fold")
    with monkeypatch.context() as patched:
        failing_at(call, patched)
        with pytest.raises(MemoryError):
            muted.undo()
    muted.undo()
    assert same_bits(model, before)


def test_a_fold_without_effect_is_refused():
    model = build("llama")
    mutes, before = modulating(model), bits(model)
    mlp = model.model.layers[1].mlp
    down = mlp.down_proj.weight.detach().clone()
    mlp.down_proj.forward = lambda x: x @ down.T  # as prepacked weights
    with pytest.raises(ValueError, match=r"down projection of model.layers.1.mlp has no effect"):
        neumuter.mute(model, mutes, how="fold")
    assert same_bits(model, before)
    with neumuter.mute(model, mutes):
        pass
    del mlp.down_proj.forward
    patch(model)  # reads weights, and calls no module
    with neumuter.mute(model, mutes, how="fold"):
        assert not torch.equal(logits(model, batch()), logits(build("llama"), batch()))


def test_what_cannot_be_folded_in_place_is_refused():
    model = lora(build("llama"))
    mutes = modulating(model)
    with pytest.raises(ValueError, match=r"cannot fold into the down projection of model.layers.0.mlp"):
        neumuter.mute(model, mutes, how="fold")
    model = share(build("llama"), "one parameter")
    with pytest.raises(ValueError, match=r"shares its weights with model.layers.2.mlp.down_proj"):
        neumuter.mute(model, shared_mutes(model, 1, 0.5, 1), how="fold")
    for how in ("folded", None, ["fold"]):
        with pytest.raises(ValueError, match="how must be 'live' or 'fold', got"):
            neumuter.mute(model, mutes, how)


def test_ffns_that_share_weights_are_folded_and_undone_once():
    model = share(build("llama"), "one memory")
    mutes, before = shared_mutes(model, 1, 0.5, 0.5), bits(model)
    expected = copy.deepcopy(model)
    neumuter.fold(expected, mutes)
    with neumuter.mute(model, mutes, how="fold"):
        assert same_bits(model, bits(expected))
    assert same_bits(model, before)


# --- What happens meanwhile ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_model_that_is_converted_meanwhile(dtype):
    model = build("llama")
    mutes = modulating(model)
    expected = bits(copy.deepcopy(model).to(dtype))
    with neumuter.mute(model, mutes, how="fold"):
        model.to(dtype)
        assert not same_bits(model, expected)
    assert same_bits(model, expected)


def test_original_weights_that_are_loaded_meanwhile():
    model = build("llama")
    mutes, before = modulating(model), bits(model)
    with neumuter.mute(model, mutes, how="fold"):
        model.load_state_dict(before)
    assert same_bits(model, before)


def test_other_neurons_that_are_trained_meanwhile():
    model = build("llama")
    mutes = modulating(model)
    path, layer = next(iter(mutes.layers.items()))
    weight = model.get_submodule(path).down_proj.weight
    others = torch.ones(WIDTH).index_fill(0, layer.indices.long(), 0)
    expected = weight.detach() + others
    with neumuter.mute(model, mutes, how="fold"), torch.no_grad():
        weight += others
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("how", ["trained", "loaded", "assigned", "on meta", "merged"])
def test_changed_weights_are_not_undone(how):
    model = build("llama")
    mutes, others = modulating(model), bits(build("llama", seed=1))
    muted = neumuter.mute(model, mutes, how="fold")
    path = list(mutes.layers)[1]
    weight = model.get_submodule(path).down_proj.weight
    if how == "trained":
        model(batch(), labels=batch()).loss.backward()
        torch.optim.SGD([weight], lr=0.1).step()
    elif how == "loaded":
        model.load_state_dict(others)
    elif how == "assigned":
        model.load_state_dict(others, assign=True)
    elif how == "on meta":
        model.to("meta")
    else:
        model = lora(model).merge_and_unload()
    changed = bits(model)
    with pytest.raises(
        RuntimeError, match=r"cannot be taken off: .*down projection of model.layers.[01].mlp"
    ):
        muted.undo()
    with pytest.raises(RuntimeError, match="cannot be taken off"), muted.off():
        pass
    assert how == "on meta" or same_bits(model, changed)


def test_an_adapter_that_comes_later_reads_neurons_that_are_not_muted():
    model, ids = build("llama"), batch()
    (mutes,) = sets_of(model, 1)
    before, expected = bits(model), copy.deepcopy(model)
    neumuter.fold(expected, mutes)
    with neumuter.mute(model, mutes, how="fold"):
        adapted, expected = lora(model), lora(expected)
        assert torch.equal(logits(adapted, ids), logits(expected, ids))
        seen = []
        factor = model.model.layers[1].mlp.down_proj.lora_A["default"]
        with factor.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
            logits(adapted, ids)
        neurons = mutes.layers["model.layers.1.mlp"].indices.long()
        assert (seen[0][..., neurons] != 0).all()
    adapted.unload()
    assert same_bits(model, before)


@pytest.mark.parametrize(("name", "backend"), [("llama", "inductor"), ("gpt2", "aot_eager")])
def test_compiled_code_sees_it_without_compiling_again(name, backend):
    model, ids = build(name), batch()
    mutes, plain = modulating(model), logits(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(logits(compiled, ids), plain, rtol=1e-5, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        for target in (model, compiled):
            with neumuter.mute(target, mutes, how="fold"):
                expected = logits(copy.deepcopy(model), ids)
                assert not torch.allclose(expected, plain, rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(logits(compiled, ids), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(logits(compiled, ids), plain, rtol=1e-5, atol=1e-5)


def test_a_backward_pass_across_it_is_noticed():
    model, ids = build("llama"), batch()
    mutes = modulating(model)
    loss = model(ids, labels=ids).loss
    with neumuter.mute(model, mutes, how="fold"), pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_zero_gains_have_the_bits_of_live_ones_and_others_are_rounded_elsewhere():
    for name in ("llama", "gpt2"):
        model, ids = build(name, torch.bfloat16), batch()
        (silenced,) = sets_of(model, 1)
        for mutes, equal in ((silenced, True), (modulating(model), False)):
            with neumuter.mute(model, mutes):
                live = logits(model, ids)
            with neumuter.mute(model, mutes, how="fold"):
                found = logits(model, ids)
            assert torch.equal(found, live) == equal
            assert (found - live).float().norm() < 0.02 * live.float().norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_captured_cuda_graph_sees_it():
    model, ids = build("llama", torch.bfloat16).cuda(), batch(2, 6).cuda()
    mutes = modulating(model)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            plain = model(input_ids=ids, use_cache=False).logits
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(input_ids=ids, use_cache=False).logits
        with neumuter.mute(model, mutes, how="fold"):
            graph.replay()
            assert torch.equal(captured, logits(model, ids))
            assert not torch.equal(captured, plain)
        graph.replay()
        assert torch.equal(captured, plain)
