"""The search for the smallest budget that meets the goals."""

import dataclasses

import pytest

import neumuter
from neumuter import evaluation, recipes
from neumuter.training.batches import PairedBatches
from neumuter.training.neurons import Neurons
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


@pytest.mark.parametrize("goals", [{"extraction": 1.5}, {"ma": -0.1}, {"extraction": None}])
def test_bad_goals_are_named(goals):
    with pytest.raises(ValueError, match="goal"):
        recipes.Goals(**goals)
