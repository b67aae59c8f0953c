"""The search for the smallest budget that meets the goals."""

import dataclasses
import functools

import pytest
import torch

import neumuter
from neumuter import evaluation, recipes
from neumuter.training.batches import PairedBatches
from neumuter.training.neurons import Neurons
from neumuter.types import IGNORED
from tests.neumuter.test_recipes import FORGET, KEEP, QUICK_SUPPORT, llama

__all__ = ["llama"]  # a fixture


def test_the_smallest_budget_that_meets_the_goals_is_found(llama):
    goals, budgets = recipes.Goals(extraction=None, ma=0.6), (0.02, 0.1, 0.3)
    with neumuter.attach(llama, start_layer=0) as masked:
        pair, config = PairedBatches(masked, FORGET, KEEP), recipes.FittedConfig(support=QUICK_SUPPORT)
        mutes, points = recipes.search_budget(pair, goals, budgets, "mute", config)
    met = [point for point in points if point["met"]]
    assert [point["share"] for point in points] == sorted(point["share"] for point in points)
    assert not points[0]["met"]
    assert met
    assert met[0]["neurons"] == mutes.count
    assert all(point["met"] == (point["forget_ma"] <= 0.6) for point in points)
    with neumuter.mute(llama, mutes):
        assert evaluation.memorization_accuracy(llama, FORGET) == pytest.approx(met[0]["forget_ma"])


@pytest.mark.parametrize(("taken", "with_slopes"), [(0.7, False), (0.7, True), (1.0, True)])
def test_budgets_beyond_the_neurons_that_are_free_are_those_that_are(llama, taken, with_slopes):
    """A budget of all neurons is among those that are tried, whatever earlier requests have taken."""
    out_of_reach, budgets = recipes.Goals(ma=0.0), (0.1, 0.4, 1.0)
    config = recipes.FittedConfig(recipes.GainsConfig(steps=2, batch_size=None))
    with neumuter.attach(llama, start_layer=0) as masked:
        existing = recipes.mute_random(masked, taken, seed=5)
        pair, count = PairedBatches(masked, FORGET, KEEP), Neurons(masked).count
        former = [recipes.measure_slopes(pair, existing)] if with_slopes else []
        options = dict(config=config, existing=existing, former=former)
        mutes, points = recipes.search_budget(pair, out_of_reach, budgets, **options)
        free = count - existing.count
        shares = [0.1, pytest.approx(free / count)] if free else [0.1]
        assert [point["share"] for point in points] == shares
        assert mutes.count == (count if with_slopes else pytest.approx(free, abs=1))
        if not with_slopes:
            everything = recipes.mute_random(masked, 1.0)
            with pytest.raises(ValueError, match="only 0 may be selected"):
                recipes.search_budget(pair, out_of_reach, budgets, config=config, existing=everything)


def test_goals_out_of_reach_keep_the_largest_budget(llama):
    with neumuter.attach(llama) as masked:
        config = recipes.FittedConfig(support=dataclasses.replace(QUICK_SUPPORT, steps=2))
        pair = PairedBatches(masked, FORGET, KEEP)
        mutes, points = recipes.search_budget(pair, recipes.Goals(ma=0.0), (0.01, 0.02), "mute", config)
    assert [point["met"] for point in points] == [False, False]
    assert mutes.count == points[-1]["neurons"]


def test_secrets_are_a_goal_of_their_own(llama):
    """Every second token is a secret; no text has to go."""
    ceilings = torch.full(FORGET["labels"].shape, torch.inf)
    ceilings[:, ::2] = -5.0
    secrets = evaluation.only_secrets(FORGET, ceilings)
    config = recipes.FittedConfig(recipes.GainsConfig(steps=20, batch_size=None))
    with neumuter.attach(llama, start_layer=0) as masked:
        pair = PairedBatches(masked, FORGET, KEEP, ceilings)
        known = evaluation.secret_extraction(llama, secrets)
        assert known > 0.5
        search = functools.partial(recipes.search_budget, pair, budgets=(0.02, 0.5), config=config)
        with pytest.raises(ValueError, match="goal secrets needs texts to forget whose secrets are known"):
            search(recipes.Goals(secrets=0.1))
        _, points = search(recipes.Goals(1.0, secrets=0.1), secrets=secrets)
        mutes, easy = search(recipes.Goals(1.0, secrets=1.0), secrets=secrets)
    assert [point["met"] for point in points] == [point["forget_secrets"] <= 0.1 for point in points]
    assert not points[0]["met"]
    assert [point["met"] for point in easy] == [True]
    with neumuter.mute(llama, mutes):
        assert evaluation.secret_extraction(llama, secrets) == pytest.approx(easy[0]["forget_secrets"])


def test_only_secrets_leaves_those_that_may_not_stay():
    ceilings = torch.full(FORGET["labels"].shape, torch.inf)
    assert evaluation.only_secrets(FORGET, None) is None
    assert evaluation.only_secrets(FORGET, ceilings) is None
    ceilings[0, 2], ceilings[1, 3] = -1.0, -torch.inf
    secrets = evaluation.only_secrets(FORGET, ceilings)
    assert (secrets["labels"] != IGNORED).nonzero().tolist() == [[0, 2], [1, 3]]


@pytest.mark.parametrize("goals", [{"extraction": 1.5}, {"ma": -0.1}, {"secrets": 2}, {"extraction": None}])
def test_bad_goals_are_named(goals):
    with pytest.raises(ValueError, match="goal"):
        recipes.Goals(**goals)
