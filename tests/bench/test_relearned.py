"""RELEARNED: its short form, its fit, and what an attack in the fit does."""

import pytest
import torch

import neumuter
from bench.unlearning import relearned
from neumuter import recipes
from neumuter.training import weights
from neumuter.training.batches import PairedBatches
from tests.bench.quick import quick_rows


def test_relearned_runs(tiny, monkeypatch):
    pytest.importorskip("torchao")
    attack = weights.WeightsConfig(method="relearn", steps=20, batch_size=6, lr=1e-2)
    for name, value in (("ATTACK", attack), ("STEPS", (20,)), ("FIT_STEPS", 2)):
        monkeypatch.setattr(relearned, name, value)
    found = quick_rows(relearned.cases(quick=True))
    assert [row["method"] for row in found] == ["before", "first layer", "in the loop"]
    assert len({row["forget_loss"] for row in found}) == 3
    assert all(row["relearned 20 ma"] != row["half ma"] for row in found)


@pytest.fixture
def pair(job):
    with neumuter.attach(job.model, start_layer=0) as masked:
        yield PairedBatches(masked, job.forget, job.retain)


def test_the_first_layer_has_all_neurons_of_its_set(pair):
    mutes = relearned.FITS["first layer"](pair, 3)
    assert list(mutes.layers) == [pair.masked.ffns[0].path]


def test_without_an_attack_relearned_fits_as_the_recipe(pair):
    # This model knows no text: with a usual margin there is nothing to forget.
    config = recipes.GainsConfig(steps=6, batch_size=2, margin=20.0)
    fit = relearned.Attacked(pair, config, 3, lambda *_: None)
    proposed = recipes.propose_by_fisher(pair, relearned.SHARE, times=config.candidates)
    found = fit.find(proposed, fit.neurons.count_of(relearned.SHARE), "relearned")
    wanted = recipes.fit_mutes(pair, relearned.SHARE, config=recipes.FittedConfig(config), seed=3)
    assert wanted.count == found.count > 1
    for path, layer in wanted.layers.items():
        assert torch.equal(found.layers[path].indices, layer.indices)
        torch.testing.assert_close(found.layers[path].gains, layer.gains, atol=1e-5, rtol=0)
        assert (layer.gains - 1).abs().min() > 0.01


@pytest.mark.parametrize("attack", [relearned._relearn, relearned._move_gains, relearned._move_weights])
def test_an_attack_adds_its_hinge_and_leaves_the_weights_alone(pair, attack, monkeypatch):
    before = {name: value.clone() for name, value in pair.masked.model.state_dict().items()}
    seen, known = [], relearned.Attacked.known

    def see(fit, gains, ids):
        seen.append((ids, known(fit, gains, ids)))
        return seen[-1][1]

    monkeypatch.setattr(relearned.Attacked, "known", see)
    fit = relearned.Attacked(pair, recipes.GainsConfig(margin=60.0), 3, attack)
    fit.support = torch.arange(fit.neurons.count)
    gains = torch.ones(fit.neurons.count, requires_grad=True)
    attack(fit, gains, [0, 1, 2, 3])
    assert gains.grad.abs().max() > 0
    ids, attacked = seen[-1]
    if attack is relearned._relearn:
        assert len(ids) == 2
        assert attacked != known(fit, gains, ids)
    else:
        # The worst place near by is where more of the texts comes back.
        assert attacked > known(fit, gains, [0, 1, 2, 3])
    for name, value in pair.masked.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(weight.requires_grad for weight in fit.downs)
