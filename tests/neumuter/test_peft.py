"""What PEFT puts around FFNs: mute sets move between a model and its adapted forms."""

import pytest
import torch

import neumuter
from neumuter.models.families import find_ffns
from tests.models import batch, build, randomise

peft = pytest.importorskip("peft")


def muted(name):
    """A model, token ids, a mute set of it, and its muted logits."""
    model, ids = build(name), batch()
    with neumuter.attach(model, 0) as masked:
        randomise(masked)
        mutes = masked.select(budget=0.3)
    with neumuter.mute(model, mutes):
        return model, ids, mutes, model(ids).logits


def test_modules_that_are_trained_whole_count_once():
    model, ids, plain, _ = muted("llama")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).eval()
    expected = adapted(ids).logits
    with neumuter.mute(adapted, plain):
        assert not torch.allclose(adapted(ids).logits, expected, atol=1e-3)
    for ffn in find_ffns(adapted):
        ffn.down.weight.data.mul_(1.5)
    with neumuter.attach(adapted, 0) as masked:
        assert set(masked.scores) == {f"model.layers.{i}.mlp" for i in range(3)}
        mutes = masked.mute_set({path: (torch.arange(9), torch.zeros(9)) for path in masked.scores})
    with neumuter.mute(adapted, mutes):
        logits = adapted(ids).logits
    with adapted.disable_adapter(), neumuter.mute(adapted, plain):
        assert not torch.allclose(adapted(ids).logits, logits, atol=1e-3)
    merged = adapted.merge_and_unload()
    with neumuter.mute(merged, mutes):
        torch.testing.assert_close(merged(ids).logits, logits)


def test_mute_sets_move_to_adapted_experts_and_back():
    model, ids, mutes, expected = muted("qwen3_moe")
    config = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    adapted = peft.get_peft_model(model, config).eval()
    with neumuter.mute(adapted, mutes):
        torch.testing.assert_close(adapted(ids).logits, expected)
    with neumuter.attach(adapted, 0) as masked:
        again = masked.mute_set(mutes.layers)
    with pytest.raises(ValueError, match=r"cannot fold into the down projection of .*0.mlp.experts"):
        neumuter.fold(adapted, mutes)
    with neumuter.mute(adapted.unload(), again):
        torch.testing.assert_close(model(ids).logits, expected)


def test_mute_sets_move_to_mixed_adapters():
    model, ids, mutes, expected = muted("llama")
    mixed = peft.PeftMixedModel(model, peft.LoraConfig(r=2, target_modules=["down_proj"]), "first").eval()
    with neumuter.mute(mixed, mutes):
        torch.testing.assert_close(mixed(ids).logits, expected)
