"""The share of the neurons that a request takes where none is given."""

import logging

import pytest

import neumuter
from neumuter.recipes import FittedConfig, GainsConfig, mute_random
from neumuter.recipes import share as shares
from neumuter.recipes.share import choose_share
from tests.models import build, tokenizer

TEXTS = [f"Client {number} lives at {number * 37 % 91} Mill Road" for number in range(8)]


@pytest.mark.parametrize(
    ("texts", "share"), [(1, 0.01), (24, 0.01), (48, 0.02), (240, 0.1), (2_400, 1.0), (1_000_000, 1.0)]
)
def test_more_texts_take_more_neurons(texts, share):
    assert choose_share(texts, "modulate") == pytest.approx(share)
    assert choose_share(texts, "mute") == 0.01


@pytest.fixture
def few(monkeypatch):
    """As if three texts took 5 % of the neurons."""
    monkeypatch.setattr(shares, "TEXTS", 0.6)


def unlearn(model, **options):
    given = {"samples": 0, "start_layer": 0, "callback": lambda *_: None}
    recipe = FittedConfig(GainsConfig(steps=1))
    return neumuter.unlearn(model, tokenizer(), TEXTS, ["Tea at four"], recipe=recipe, **given | options)


def test_windows_count(few, caplog):
    caplog.set_level(logging.INFO, "neumuter")
    model = build("llama")
    found = unlearn(model, max_length=64)
    assert found.mutes.share == pytest.approx(0.133, abs=0.01)
    assert "For 8 texts to forget, 13.33% of the neurons may be touched." in caplog.text
    assert unlearn(model, max_length=20).mutes.share == pytest.approx(0.4, abs=0.01)
    assert "For 24 windows of texts to forget, 40.00% of" in caplog.text
    assert unlearn(model, mode="mute").mutes.share == pytest.approx(0.01, abs=0.01)


def test_no_more_are_taken_than_are_free(few):
    model = build("llama")
    with neumuter.attach(model, start_layer=0) as masked:
        earlier = mute_random(masked, 0.95, 0)
    found = unlearn(model, existing=earlier, max_length=64)
    assert found.mutes.share == pytest.approx(0.05, abs=0.01)
