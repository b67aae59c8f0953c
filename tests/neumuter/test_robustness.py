"""Texts forgotten by a mute set, after quantisation and after learning some of them again."""

import math

import pytest
import torch

import neumuter
from neumuter import evaluation
from neumuter.evaluation.robustness import quantise, robustness
from neumuter.training.weights import WeightsConfig, tune_weights
from neumuter.types import IGNORED
from tests import models


def texts(count, seed=1):
    ids = models.batch(count, 8, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def measure(model, batch):
    return {"texts": len(batch["labels"]), "loss": evaluation.mean_token_loss(model, batch)}


@pytest.fixture(scope="module")
def muted():
    model = models.build("llama")
    with neumuter.attach(model, start_layer=0) as masked:
        mutes = neumuter.recipes.mute_random(masked, 0.2)
    return model, mutes


def test_states_are_copies_with_the_mutes_folded_in(muted):
    model, mutes = muted
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = texts(5)
    config = WeightsConfig(method="relearn", steps=6, batch_size=2, lr=1e-2)
    found = robustness(model, mutes, [batch], measure, config, (2, 6))
    assert list(found) == ["int8", "int4", "half", "relearned 2", "relearned 6"]
    assert [state["texts"] for state in found.values()] == [5, 5, 3, 3, 3]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    half = {
        key: value[torch.randperm(5, generator=torch.Generator().manual_seed(0))[:3]]
        for key, value in batch.items()
    }
    with neumuter.mute(model, mutes):
        plain = evaluation.mean_token_loss(model, batch)
        assert found["half"]["loss"] == pytest.approx(evaluation.mean_token_loss(model, half), rel=1e-5)
    assert found["int8"]["loss"] == pytest.approx(plain, rel=0.02)
    assert found["relearned 6"]["loss"] != found["relearned 2"]["loss"]


def test_relearning_learns_and_never_sees_what_it_is_asked(muted, monkeypatch):
    model, mutes = muted
    asked, learned = [], []

    def keep(model, batch):
        asked.append(batch["input_ids"])
        return measure(model, batch)

    def tuned(model, forget, *rest):
        learned.append(forget["input_ids"])
        return tune_weights(model, forget, *rest)

    monkeypatch.setattr("neumuter.evaluation.robustness.tune_weights", tuned)
    batch = texts(5)
    robustness(model, mutes, [batch], keep, WeightsConfig(method="relearn", steps=1, batch_size=1), (1,))
    assert torch.equal(asked[2], asked[3])
    both = torch.cat([asked[2], learned[0]])
    assert (len(asked[2]), len(learned[0])) == (3, 2)
    assert sorted(both.tolist()) == sorted(batch["input_ids"].tolist())
    # Nor another window of the same text; of a sample of texts the numbers have gaps.
    for numbers in (torch.tensor([0, 0, 1, 2, 2]), torch.tensor([5, 5, 1, 9, 9])):
        asked.clear()
        learned.clear()
        config = WeightsConfig(method="relearn", steps=1, batch_size=1)
        robustness(model, mutes, [batch | {"texts": numbers}], keep, config, (1,))
        where = [
            {numbers[(batch["input_ids"] == row).all(1)].item() for row in rows}
            for rows in (asked[2], learned[0])
        ]
        assert not where[0] & where[1]
        assert where[0] | where[1] == set(numbers.tolist())
    learner = models.build("llama")
    before = evaluation.mean_token_loss(learner, batch)
    tune_weights(learner, batch, None, WeightsConfig(method="relearn", steps=20, batch_size=4, lr=1e-2))
    assert evaluation.mean_token_loss(learner, batch) < before - 1


@pytest.mark.parametrize(("bits", "levels"), [(8, 256), (4, 16)])
def test_weights_are_rounded_to_so_many_levels(bits, levels):
    torch.manual_seed(0)
    model = models.build("llama")
    kept = model.lm_head.weight.clone()
    plain = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    rounded = quantise(model, bits).model.layers[0].mlp.up_proj.weight.dequantize()
    rows = rounded if bits == 8 else rounded.unflatten(1, (-1, 32))[:, 0]
    assert max(len(row.unique()) for row in rows) <= levels
    apart = (rounded - plain).norm() / plain.norm()
    assert 0 < apart < {8: 0.01, 4: 0.15}[bits]
    assert torch.equal(model.lm_head.weight, kept)


def test_bad_arguments_are_named(muted):
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 2"):
        quantise(models.build("llama"), 2)
    with pytest.raises(ValueError, match="two forget texts or more"):
        robustness(*muted, [texts(1)], measure)
    with pytest.raises(ValueError, match="retain_batch must be given"):
        tune_weights(models.build("llama"), texts(1), None, WeightsConfig(method="npo"))


def test_extraction_by_sampling_by_hand():
    model, batch = models.build("llama"), texts(2)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].double()
    chosen = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    batch["labels"][:, :3] = IGNORED
    chances = chosen[:, 2:].sum(1).exp().tolist()
    expected = sum(1 - (1 - p) ** 1000 for p in chances) / 2
    assert evaluation.sampled_extraction(model, batch, 1000) == pytest.approx(expected, rel=1e-4)
    assert 0 < evaluation.sampled_extraction(model, batch, 10**9) <= 1
    assert math.isclose(evaluation.sampled_extraction(model, batch, 1), sum(chances) / 2, rel_tol=1e-4)
