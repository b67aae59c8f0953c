"""A mask that does nothing is refused when it is put on, or noticed by the next forward pass."""

import copy
import pickle
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neumuter
from tests.models import WIDTH, batch, build


def fused(mlp, x):
    """An FFN as fast-inference patches have it: it reads weights and calls no module."""
    hidden = mlp.act_fn(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight)
    return F.linear(hidden, mlp.down_proj.weight)


def patch(model, layers=(1, 2)):
    for layer in layers:
        mlp = model.model.layers[layer].mlp
        mlp.forward = types.MethodType(fused, mlp)
    return model


def silencing(model):
    """The first 20 neurons of each FFN but the first."""
    with neumuter.attach(model) as masked:
        return masked.mute_set({path: (torch.arange(20), torch.zeros(20)) for path in masked.scores})


def folded(model, mutes):
    model = copy.deepcopy(model)
    neumuter.fold(model, mutes)
    return model


def put_on(how, model, mutes):
    """A handle whose mask is in force, and what takes it off."""
    if how == "mute":
        return neumuter.mute(model, mutes).undo
    if how == "attach":
        masked = neumuter.attach(model)
        masked.evaluating().__enter__()
        return masked.detach
    bank = neumuter.MuteBank(model)
    bank.add("a", mutes)
    context = bank.using("a")
    context.__enter__()

    def undo():
        context.__exit__(None, None, None)
        bank.undo()

    return undo


every_handle = pytest.mark.parametrize("how", ["mute", "attach", "bank"])


def test_a_pass_that_failed_in_another_thread_hides_nothing():
    """It would count as going on, and code that was compiled since would be trusted for ever."""
    model, ids = build("mixtral"), batch()
    with neumuter.attach(model) as masked:
        mutes = masked.mute_set({path: (torch.arange(20), torch.zeros(20)) for path in masked.scores})
    handle = neumuter.mute(model, mutes)

    def fail(*_):
        raise ArithmeticError("on purpose")

    def run():
        hook = model.model.layers[0].register_forward_hook(fail)
        with pytest.raises(ArithmeticError, match="on purpose"):
            model(ids)
        hook.remove()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    torch.compile(model, backend="eager")(ids)
    torch._dynamo.reset()
    del model.model.layers[1].mlp.experts.forward
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp.* was replaced, wrapped or passed by"):
        model(ids)
    handle.undo()


# --- When it is put on -----------------------------------------------------------------------


def test_an_ffn_that_reads_its_weights_is_masked_where_its_own_forward_is_called():
    model, ids = build("llama"), batch()
    mutes = silencing(model)
    plain, expected = model(ids).logits, folded(model, mutes)(ids).logits
    patch(model)
    with neumuter.mute(model, mutes):
        torch.testing.assert_close(model(ids).logits, expected)
    with neumuter.attach(model) as masked:
        assert set(masked.seams.values()) == {"ffn"}
        masks = {path: torch.ones(WIDTH).index_fill(0, torch.arange(20), 0) for path in masked.scores}
        with masked.applying(masks):
            torch.testing.assert_close(model(ids).logits, expected)
    torch.testing.assert_close(model(ids).logits, plain)


def test_an_ffn_without_any_seam_is_refused_by_name():
    model = build("llama_mish")
    mutes = silencing(model)
    patch(model, [1])
    modules = dict(model.named_modules())
    for refused in (lambda: neumuter.attach(model), lambda: neumuter.mute(model, mutes)):
        with pytest.raises(ValueError, match=r"model.layers.1.mlp, a LlamaMLP, .* does not call its down"):
            refused()
    with pytest.raises(ValueError, match=r"model.layers.1.mlp cannot be masked: a mask at its down"):
        neumuter.MuteBank(model)
    assert dict(model.named_modules()) == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_ffn_whose_output_is_not_used_is_refused_by_name():
    model = build("llama")
    layer = model.model.layers[1]
    run = layer.mlp.forward

    def ignoring(x):
        run(x)
        return fused(layer.mlp, x)

    layer.mlp.forward = ignoring
    with pytest.raises(ValueError, match=r"model.layers.1.mlp cannot be masked: a mask at its down"):
        neumuter.MuteBank(model)


def test_an_ffn_of_zeros_can_be_masked():
    model = build("llama")
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    neumuter.attach(model).detach()
    neumuter.MuteBank(model).undo()


# --- Afterwards ------------------------------------------------------------------------------


def lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    return peft.get_peft_model(model, config).eval()


@torch.no_grad()
@every_handle
@pytest.mark.parametrize("leave", ["merge_and_unload", "unload"])
def test_an_adapter_that_is_merged_or_removed_is_noticed(how, leave):
    model, ids = lora(build("llama_mish")), batch()
    mutes = silencing(model)
    undo = put_on(how, model, mutes)
    model(ids)
    inner = getattr(model, leave)()
    with pytest.raises(RuntimeError, match=r"the down of model.layers.[01].mlp was replaced, wrapped"):
        inner(ids)
    undo()
    expected = folded(inner, again := silencing(inner))(ids).logits
    with neumuter.mute(inner, again):
        torch.testing.assert_close(inner(ids).logits, expected)


@torch.no_grad()
@every_handle
def test_an_adapter_that_comes_later_is_noticed(how):
    """It would see neurons without their mask."""
    model, ids = build("llama_mish"), batch()
    mutes = silencing(model)
    expected = lora(copy.deepcopy(model))
    undo = put_on(how, model, mutes)
    adapted = lora(model)
    with pytest.raises(RuntimeError, match=r"the down of model.layers.[01].mlp was replaced, wrapped"):
        adapted(ids)
    undo()
    for path in mutes.layers:
        down = expected.base_model.model.get_submodule(path).down_proj
        down.register_forward_pre_hook(lambda _, given: (given[0].index_fill(-1, torch.arange(20), 0),))
    with neumuter.mute(adapted, silencing(adapted)):
        torch.testing.assert_close(adapted(ids).logits, expected(ids).logits)


def test_quantised_copies_are_noticed():
    model, ids = build("llama"), batch()
    mutes = silencing(model)
    with neumuter.mute(model, mutes):
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
        with pytest.raises(RuntimeError, match=r"the down of model.layers.1.mlp"):
            quantised(ids)
        model(ids)


@torch.no_grad()
@every_handle
@pytest.mark.parametrize("name", ["llama", "llama_mish"])
def test_a_patch_that_comes_later_is_noticed(how, name):
    model, ids = build(name), batch()
    undo = put_on(how, model, silencing(model))
    model(ids)
    patch(model, [2])
    with pytest.raises(RuntimeError, match=r"of model.layers.2.mlp was replaced, wrapped"):
        model(ids)
    undo()


def test_wrappers_that_pass_everything_on_are_none():
    model, ids = build("llama"), batch()
    mutes = silencing(model)
    with neumuter.mute(model, mutes):
        expected = model(ids).logits
        for layer in model.model.layers:
            layer.mlp.down_proj = torch.compile(layer.mlp.down_proj, backend="eager")
        torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_are_checked_when_they_are_compiled(whole):
    model, ids = build("llama"), batch()
    mutes = silencing(model)
    with neumuter.mute(model, mutes), torch.no_grad():
        expected = model(ids).logits
        if whole:
            run = torch.compile(model, backend="eager")
        else:
            run = model
            for layer in model.model.layers:
                layer.compile(backend="eager")
        for _ in range(2):
            torch.testing.assert_close(run(ids).logits, expected)
        patch(model, [1])
        for one in (run, model):
            with pytest.raises(RuntimeError, match=r"the down of model.layers.1.mlp"):
                one(ids)


def test_a_failed_forward_pass_does_not_disturb_the_next():
    model, ids = build("llama"), batch()
    with neumuter.mute(model, silencing(model)):
        with pytest.raises(IndexError):
            model(ids + 1000)
        model(ids)


def test_copies_pickles_and_threads_keep_watch():
    model, ids = build("llama"), batch()
    with neumuter.mute(model, silencing(model)):
        expected = model(ids).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(ids).logits, expected)
            patch(other, [1])
            with pytest.raises(RuntimeError, match=r"of model.layers.1.mlp was replaced"):
                other(ids)
        failed = []

        def work():
            try:
                for _ in range(20):
                    model(ids)
            except RuntimeError as error:
                failed.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed


def test_frozen_scores_are_not_trained():
    model, ids = build("llama"), batch()
    with neumuter.attach(model) as masked:
        lora(model)
        with masked.sampling(0, 0, torch.arange(4)):
            with pytest.raises(RuntimeError, match=r"the scores of model.layers.1.mlp are frozen"):
                model(ids)
            with torch.no_grad():
                model(ids)
