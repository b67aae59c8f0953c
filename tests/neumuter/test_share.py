"""The share of the neurons that a request takes where none is given."""

import logging
import re

import pytest

import neumuter
from neumuter import unlearning
from neumuter.recipes import FittedConfig, GainsConfig, mute_random
from neumuter.recipes import share as shares
from neumuter.recipes.share import choose_share
from tests.models import build, tokenizer

TEXTS = [f"Client {number} lives at {number * 37 % 91} Mill Road" for number in range(8)]


@pytest.mark.parametrize(
    ("texts", "neurons", "share"),
    [
        (1, 4_096, 0.01),
        (12, 4_096, 0.0586),
        (240, 4_096, 1.0),
        (24, 46_080, 0.0104),
        (99, 46_080, 0.0430),
        (100, 46_080, 0.1302),
        (240, 46_080, 0.3125),
        (24, 458_752, 0.01),
        (1_000_000, 458_752, 1.0),
    ],
)
def test_each_text_takes_some_neurons(texts, neurons, share):
    assert choose_share(texts, neurons, "modulate") == pytest.approx(share, rel=5e-3)
    assert choose_share(texts, neurons, "mute") == 0.01


def unlearn(model, **options):
    given = {"samples": 0, "start_layer": 0, "callback": lambda *_: None}
    recipe = FittedConfig(GainsConfig(steps=1))
    return neumuter.unlearn(model, tokenizer(), TEXTS, ["Tea at four"], recipe=recipe, **given | options)


@pytest.fixture
def few(monkeypatch):
    """As if a text took two neurons."""
    for module in (shares, unlearning):
        monkeypatch.setattr(module, "NEURONS_PER_TEXT", 2)


def test_windows_count(few, caplog):
    caplog.set_level(logging.INFO, "neumuter")
    model = build("llama")
    found = unlearn(model, max_length=64)
    assert found.mutes.count == pytest.approx(16, abs=1)
    assert re.search(r"For 8 texts to forget, \d+\.\d\d% of the neurons may be touched", caplog.text)
    assert unlearn(model, max_length=20).mutes.count == pytest.approx(48, abs=1)
    assert "For 24 windows of texts to forget, " in caplog.text
    assert "neurons may be too few" not in caplog.text
    assert unlearn(model, mode="mute").mutes.share == pytest.approx(0.01, abs=0.01)
    assert "neurons may be too few for 8 texts to forget" in caplog.text


@pytest.mark.parametrize(("budget", "warned"), [(7, True), (8, False), (0.02, True), (0.5, False)])
def test_too_few_neurons_are_said(few, caplog, budget, warned):
    unlearn(build("llama"), budget=budget, max_length=64)
    assert ("neurons may be too few for 8 texts to forget: in" in caplog.text) == warned


def test_no_more_are_taken_than_are_free(few, caplog):
    model = build("llama")
    with neumuter.attach(model, start_layer=0) as masked:
        earlier = mute_random(masked, 0.98, 0)
    found = unlearn(model, existing=earlier, max_length=64)
    free = sum(earlier.widths.values()) - earlier.count
    assert 0 < free < 8
    assert found.mutes.count == pytest.approx(free, abs=1)
    assert "neurons may be too few" in caplog.text
