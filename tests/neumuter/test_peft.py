"""What PEFT puts around FFNs: mute sets move between a model and its adapted forms."""

import copy

import pytest
import torch

import neumuter
from neumuter.models.families import find_ffns
from neumuter.recipes import PaperConfig, train_gates
from neumuter.training.batches import PairedBatches
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


def lora(model):
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def test_adapters_go_on_before_gates_and_train_again_afterwards():
    """The gradients of the scores are those of a model with the adapters merged."""
    ids, rows = batch(), torch.arange(4)
    adapted = lora(build("llama")).eval()
    own = {name for name, p in adapted.named_parameters() if p.requires_grad}
    found = []
    for model in (adapted, copy.deepcopy(adapted).merge_and_unload()):
        with neumuter.attach(model, start_layer=0) as masked, masked.sampling(0, 0, rows):
            model(ids, labels=ids).loss.backward()
            assert sum(p.grad is not None for p in model.parameters()) == len(masked.scores)
            found.append({path: score.grad for path, score in masked.scores.items()})
    for path, gradient in found[0].items():
        assert gradient.any()
        torch.testing.assert_close(gradient, found[1][path], rtol=1e-3, atol=1e-6)
    assert own == {name for name, p in adapted.named_parameters() if p.requires_grad}


def train_with_gates_first(use, folder):
    ids = batch()
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    model = build("llama")
    if use == "trainer":
        config = neumuter.NeuMuterConfig(output_dir=str(folder), use_cpu=True, report_to=[])
        trainer = neumuter.NeuMuterTrainer(model, config, texts, texts)
        lora(model)
        trainer.train()
    else:
        pair = PairedBatches(neumuter.attach(model), texts, texts)
        lora(model)
        train_gates(pair, PaperConfig(epochs=1))


@pytest.mark.parametrize("use", ["recipe", "trainer"])
def test_gates_before_adapters_are_refused(use, tmp_path):
    """PEFT freezes their scores: training would change nothing."""
    with pytest.raises(RuntimeError, match="detach, wrap the model, then attach it"):
        train_with_gates_first(use, tmp_path)
