"""How many steps a search takes, whom they visit, and how long that is said to take."""

import dataclasses
import logging

import pytest

import neumuter
from neumuter import recipes
from neumuter.cli.common import print_log
from neumuter.recipes import schedule
from neumuter.recipes.schedule import choose_samples, count_steps
from neumuter.report import progress
from neumuter.training.batches import PairedBatches
from neumuter.training.sources import HardFirst
from tests.models import build
from tests.neumuter.test_recipes import samples

GAINS, SUPPORT = recipes.GainsConfig(batch_size=2), recipes.SupportConfig(batch_size=2)


class Pair:
    """As many samples as there are said to be."""

    def __init__(self, forget_count):
        self.forget_count = forget_count

    def steps(self, *_):
        return "in turn"

    def hard_first(self, *_):
        return "hard first"


@pytest.mark.parametrize(
    ("count", "steps", "batch_size", "expected", "source"),
    [
        (24, None, 8, 160, "in turn"),
        (64, None, 8, 160, "in turn"),
        (65, None, 8, 163, "hard first"),
        (240, None, 8, 600, "hard first"),
        (4_000, None, 8, 640, "hard first"),
        (10_000, None, 8, 1563, "hard first"),
        (10_000, None, 64, 640, "hard first"),
        (10_000, 80, 8, 80, "in turn"),
        (10_000, None, None, 160, "in turn"),
    ],
)
def test_steps_grow_with_the_texts(count, steps, batch_size, expected, source):
    pair = Pair(count)
    assert count_steps(pair, steps, batch_size) == expected
    assert choose_samples(pair, steps, batch_size, 0) == source


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture
def few(monkeypatch):
    """Four steps are enough for six samples."""
    monkeypatch.setattr(schedule, "VISITS", 1)
    monkeypatch.setattr(schedule, "LEAST_STEPS", 4)
    monkeypatch.setattr(schedule, "MOST_STEPS", 4)


def run(model, forget_count, mode="modulate", config=None, watch=None):
    """(the mute set, what each step was given, the number of steps that was told, the estimate)."""
    taken, told = [], []
    with neumuter.attach(model, start_layer=1) as masked:
        pair = PairedBatches(masked, samples(1, forget_count), samples(2, 5))
        config = config or recipes.FittedConfig(GAINS, SUPPORT if mode == "mute" else None)
        take = pair.take
        pair.take = lambda ids, *more, **options: taken.append(ids) or take(ids, *more, **options)
        estimate = recipes.estimate_tokens(pair, mode, config)
        if watch:
            watch(pair)
        mutes = recipes.fit_mutes(pair, 9, mode, config, callback=lambda *info: told.append(info[:2]))
    return mutes, taken, told, estimate


@pytest.mark.parametrize("mode", ["modulate", "mute"])
def test_a_large_request_visits_every_text(llama, few, mode):
    mutes, taken, told, _ = run(llama, 9, mode)
    # 1.25 · 9 / 2, rounded up.
    assert told == [(step, 6) for step in range(1, 7)]
    visited = [i for ids in taken for i in ids if i < 9]
    assert set(visited) == set(range(9))
    assert len(visited) == 12
    assert mutes.method["gains" if mode == "modulate" else "support"]["steps"] == 6


@pytest.mark.parametrize("mode", ["modulate", "mute"])
def test_a_small_request_is_as_it_was(llama, few, mode, tmp_path):
    explicit = recipes.FittedConfig(
        dataclasses.replace(GAINS, steps=4), dataclasses.replace(SUPPORT, steps=4) if mode == "mute" else None
    )
    for name, config in (("default", None), ("explicit", explicit)):
        run(llama, 6, mode, config)[0].save(tmp_path / name)
    assert (tmp_path / "default").read_bytes() == (tmp_path / "explicit").read_bytes()


def test_hard_samples_come_first_only_where_steps_were_added(llama, few):
    with neumuter.attach(llama, start_layer=1) as masked:
        for count, kind in ((6, False), (7, True)):
            pair = PairedBatches(masked, samples(1, count), samples(2, 5))
            assert isinstance(choose_samples(pair, None, 2, 0), HardFirst) == kind


@pytest.mark.parametrize(("mode", "count"), [("modulate", 6), ("modulate", 9), ("mute", 9)])
def test_the_estimate_is_what_goes_through_the_model(llama, few, mode, count, monkeypatch):
    tokens = []
    hidden = PairedBatches._hidden

    def count_tokens(self, ids, *more):
        found = hidden(self, ids, *more)
        if found.requires_grad:
            tokens.append(ids.numel())
        return found

    monkeypatch.setattr(PairedBatches, "_hidden", count_tokens)
    *_, estimate = run(llama, count, mode)
    assert estimate == sum(tokens) > 0


def test_long_waits_are_announced_and_corrected(monkeypatch, capsys, caplog):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    with (
        caplog.at_level(logging.INFO, "neumuter"),
        progress.Watch(lambda *_: None)("Finding neurons") as tell,
    ):
        progress.announce("It takes", 59)
        progress.announce("It takes", 3 * 3600 + 25 * 60)
        for step in range(1, 101):
            clock[0] += 120.0
            tell(step, 100)
    assert caplog.messages == [
        "It takes about 3 h 25 min.",
        "Finding neurons, 6 of 100 steps done: the others take about 3 h 8 min.",
    ]


@pytest.mark.parametrize(
    ("total", "said"),
    [
        (80, "17 of 80 steps done: the others take about 2 h 6"),
        (600, "33 of 600 steps done: the others take about 18 h 54"),
    ],
)
def test_steps_that_are_told_at_once_are_not_taken_for_fast_ones(monkeypatch, caplog, total, said):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    with (
        caplog.at_level(logging.INFO, "neumuter"),
        progress.Watch(lambda *_: None)("Finding neurons") as tell,
    ):
        for step in range(1, total + 1):
            # A GPU is read after every 16th step.
            clock[0] += 16 * 120.0 if step % 16 == 1 else 1e-6
            tell(step, total)
    assert caplog.messages == [f"Finding neurons, {said} min."]


def test_budgets_that_are_tried_fast_are_not_taken_for_slow_steps(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    with (
        caplog.at_level(logging.INFO, "neumuter"),
        progress.Watch(lambda *_: None)("Finding neurons") as tell,
    ):
        for seconds in (0.5, 0.5, 1.0):
            for step in range(1, 81):
                clock[0] += seconds
                tell(step, 80)
    assert caplog.messages == ["Finding neurons, 5 of 80 steps done: the others take about 1 min."]


def test_commands_print_what_is_said(capsys):
    with print_log():
        logging.getLogger("neumuter").info("About %d min.", 5)
    assert "About 5 min." in capsys.readouterr().out
