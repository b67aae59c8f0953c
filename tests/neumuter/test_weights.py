"""The methods that tune weights, and selection by activation: what masks are compared with."""

import math

import peft
import pytest
import torch

import neumuter
from neumuter.evaluation import mean_token_loss
from neumuter.recipes import mute_by_activation
from neumuter.training.weights import METHODS, WeightsConfig, forget_loss, text_losses, tune_weights
from neumuter.types import IGNORED
from tests import models


def text_batch(seed, samples=4, tokens=9):
    ids = models.batch(samples, tokens, seed)
    labels = ids.clone()
    labels[0, 6:] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_forget_losses_by_hand():
    losses, lengths = torch.tensor([2.0, 6.0]), torch.tensor([2, 4])
    reference = torch.tensor([1.0, 6.0])

    def value(method, **options):
        return forget_loss(losses, lengths, reference, WeightsConfig(method, **options)).item()

    assert value("ascent") == value("difference") == pytest.approx(-8 / 6)
    sigmoid = [1 / (1 + math.exp(-0.5 * x)) for x in (1.0, 0.0)]
    expected = -2 / 0.5 * (math.log(sigmoid[0]) + math.log(sigmoid[1])) / 2
    assert value("npo", beta=0.5) == pytest.approx(expected)
    sigmoid = [1 / (1 + math.exp(-(2 * x - 0.3))) for x in (1.0, 1.5)]
    expected = -2 / 2 * (math.log(sigmoid[0]) + math.log(sigmoid[1])) / 2
    assert value("simnpo", beta=2.0, gamma=0.3) == pytest.approx(expected)
    with pytest.raises(ValueError, match="method must be one of ascent"):
        WeightsConfig("descent")


def test_npo_starts_as_gradient_ascent():
    """At π = π_ref the gradient of NPO is that of −ln π, the mean over texts (Zhang et al. 2024)."""
    losses = torch.tensor([3.0, 5.0], requires_grad=True)
    forget_loss(losses, torch.tensor([2, 2]), losses.detach(), WeightsConfig("npo")).backward()
    torch.testing.assert_close(losses.grad, torch.tensor([-0.5, -0.5]))


def test_text_losses_are_sums_over_counted_tokens():
    model, batch = models.build("llama"), text_batch(1)
    log_p = model(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    log_p = log_p.gather(-1, batch["input_ids"][:, 1:, None])[:, :, 0]
    expected = -torch.stack([log_p[0, :5].sum(), *log_p[1:].sum(1)])
    torch.testing.assert_close(text_losses(model, batch), expected)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "relearn"])
def test_texts_are_forgotten(method):
    model, forget, retain = models.build("llama"), text_batch(1), text_batch(2)
    before = mean_token_loss(model, forget), mean_token_loss(model, retain)
    seen = []
    config = WeightsConfig(method, steps=12, batch_size=4, lr=1e-3, beta=2.5 if method == "simnpo" else 0.1)
    recorded = tune_weights(model, forget, retain, config, callback=lambda *step: seen.append(step))
    assert recorded["method"] == method
    assert [step for step, _, _ in seen] == list(range(1, 13))
    assert mean_token_loss(model, forget) > before[0] + 0.1
    if method != "ascent":
        assert mean_token_loss(model, retain) < before[1]
        assert seen[-1][2].keys() == {"loss", "forget_loss", "retain_loss"}


def test_only_an_adapter_is_tuned():
    base = models.build("llama")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))
    start = mean_token_loss(model, text_batch(1))
    tune_weights(model, text_batch(1), text_batch(2), WeightsConfig("npo", steps=5, lr=1e-2))
    assert mean_token_loss(model, text_batch(1)) > start
    after = model.unload().state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_frozen_model_is_refused():
    model = models.build("llama").requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        tune_weights(model, text_batch(1), text_batch(2))


def test_selection_by_activation():
    model, forget, retain = models.build("llama"), text_batch(1), text_batch(2)
    inputs = {}
    layer = model.model.layers[1].mlp
    handle = layer.down_proj.register_forward_pre_hook(lambda _, args: inputs.setdefault("x", args[0]))
    means = []
    for batch in (forget, retain):
        inputs.clear()
        model(batch["input_ids"])
        means.append(inputs["x"].detach().abs().mean((0, 1)))
    handle.remove()
    with neumuter.attach(model) as masked:
        mutes = mute_by_activation(masked, forget, retain, 9)
    chosen = mutes.layers["model.layers.1.mlp"].indices.tolist()
    assert mutes.count == 9
    assert set(chosen) == set((means[0] / (means[1] + 1e-8)).topk(len(chosen)).indices.tolist())
    with (
        neumuter.attach(models.build("mixtral")) as masked,
        pytest.raises(ValueError, match=r"layers.1.mlp.experts has experts"),
    ):
        mute_by_activation(masked, forget, retain, 9)
