"""TRIED: its own fits, on models that know no text, so that only the fits themselves can be looked at."""

import functools

import pytest
import torch

import neumuter
from bench.unlearning import capacity, page, tried
from neumuter.demo.model import Training
from neumuter.recipes import schedule
from neumuter.training import losses
from tests.bench.quick import quick_rows


@pytest.fixture
def small(tiny, monkeypatch):
    monkeypatch.setattr(capacity, "TRAINING", Training(steps=1))
    monkeypatch.setattr(schedule, "LEAST_STEPS", 2)
    monkeypatch.setattr(schedule, "MOST_STEPS", 2)
    for name, value in (("COUNT", 4), ("GROUPS", 2), ("DRAWS", 4), ("PROGRAMMES", 2), ("SEARCH_STEPS", 2)):
        monkeypatch.setattr(tried, name, value)
    # So low that something is left to forget of a model that has learned nothing.
    monkeypatch.setattr(capacity, "CEILING", -60.0)
    monkeypatch.setattr(losses, "LEAST_ODDS", -60.0)
    monkeypatch.setattr(capacity, "ASKING", 6)
    monkeypatch.setattr(capacity, "STAYING", 4)
    for name in ("fewer", "faster", "shorter", "longer"):
        monkeypatch.setitem(tried.METHODS, name, functools.partial(tried._fit, steps=2))


def test_tried_runs(small):
    found = {row["method"]: row for row in quick_rows(tried.cases(quick=True))}
    assert list(found) == ["before", *tried.METHODS]
    assert all(
        row["share"] == pytest.approx(0.1, abs=0.01) for name, row in found.items() if name != "before"
    )
    default = found["neumuter, modulate"]["loss"]
    assert found["search"]["loss"] < default
    assert found["programmes"]["loss"] <= default
    lines = page.tried([*found.values()], "").splitlines()
    assert len(lines) == 2 + len(found)
    assert "loss" in lines[0]


def test_the_loss_of_all_texts_is_that_of_a_step(small):
    setting = capacity.Crowd(3, 4)
    with neumuter.attach(setting.full, start_layer=0) as masked:
        pair = capacity.make_pair(setting, masked, setting.forget)
        whole = tried.Whole(pair, tried._fit(setting, pair))
        gains = whole.gains.clone().requires_grad_()
        loss, slope = whole.find_slope(gains)
        ids = [*range(pair.forget_count + pair.retain_count)]
        inputs = pair.take(ids)
        with whole.applying(gains):
            found, divergences = pair.token_losses(ids)
        runs = torch.cat([pair.runs_of(i) + 1000 * i for i in range(pair.forget_count)])
        left = losses.hinge_runs(found, inputs.ceilings, runs, whole.config.margin).mean()
        harm = (divergences * (1 + 0.3 * divergences)).mean()
        expected = left + whole.eta * harm
        (wanted,) = torch.autograd.grad(expected, gains)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-6)


def test_a_programme_knows_the_loss_near_by(small):
    setting = capacity.Crowd(3, 4)
    with neumuter.attach(setting.full, start_layer=0) as masked:
        pair = capacity.make_pair(setting, masked, setting.forget)
        whole = tried.Whole(pair, tried._fit(setting, pair))
        gains = whole.gains
        programme = tried._Programme(setting, whole, gains, torch.Generator().manual_seed(0))
        moved = programme.solve(1e-3)
        step = moved - gains
        assert step.abs().max() <= 1e-3 + 1e-6
        left = (programme.weights * (programme.over + programme.slopes @ step).relu()).sum()
        harm = sum(whole.harm(gains)).item() + (programme.harm @ step).item()
        predicted = left + whole.eta * harm
        assert whole.loss(moved).item() == pytest.approx(predicted.item(), rel=1e-3)
    assert torch.equal(programme.information, programme.information.T)
