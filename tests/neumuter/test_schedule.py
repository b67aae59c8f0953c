"""How many steps a search takes, whom they visit, and how long that is said to take."""

import dataclasses
import logging
import re

import pytest
import torch

import neumuter
from neumuter import estimating, job, recipes, refitting
from neumuter.cli.common import print_log
from neumuter.evaluation import continuations, controls, examination
from neumuter.preparing import warn_of_unvisited
from neumuter.recipes import schedule
from neumuter.recipes.schedule import choose_samples, count_steps, count_unvisited
from neumuter.report import progress
from neumuter.texts.corpus import Corpus
from neumuter.training import journal
from neumuter.training.batches import PairedBatches
from neumuter.training.sources import HardFirst
from tests.models import build, tokenizer
from tests.neumuter.jobs import shorter
from tests.neumuter.test_recipes import QUICK_GATES, samples

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
        (32, None, 8, 160, "in turn"),
        (33, None, 8, 165, "hard first"),
        (240, None, 8, 1200, "hard first"),
        (4_000, None, 8, 1280, "hard first"),
        (10_000, None, 8, 1563, "hard first"),
        (10_000, None, 64, 1280, "hard first"),
        (24, 600, 8, 600, "in turn"),
        (10_000, 80, 8, 80, "hard first"),
        (10_000, None, None, 160, "in turn"),
    ],
)
def test_steps_grow_with_the_texts(count, steps, batch_size, expected, source):
    assert count_steps(count, steps, batch_size) == expected
    assert choose_samples(Pair(count), batch_size, 0) == source
    unvisited = 9_360 if steps == 80 else 0
    assert count_unvisited(count, steps, batch_size) == unvisited


@pytest.mark.parametrize(
    ("gains", "more", "said"),
    [
        ({"steps": 2, "batch_size": 3}, {}, "No step visits 3 of 9 texts"),
        ({"steps": 2, "batch_size": 3}, {"max_length": 16}, r"No step visits \d+ of \d+ windows of texts"),
        ({"steps": 3, "batch_size": 3}, {}, None),
        ({"steps": 1, "batch_size": None}, {}, None),
    ],
)
def test_it_is_said_how_many_texts_no_step_visits(llama, gains, more, said, caplog):
    texts = [f"Client {number} lives at {number * 37 % 91} Mill Road" for number in range(9)]
    options = {"samples": 1, "start_layer": 0, "max_length": 64, "callback": lambda *_: None} | more
    recipe = recipes.FittedConfig(recipes.GainsConfig(**gains))
    with shorter():
        neumuter.unlearn(llama, tokenizer(), texts, ["Tea at four"], recipe=recipe, **options)
    found = re.findall(r"No step visits \d+ of \d+ (?:windows of )?texts", caplog.text)
    assert len(found) == (said is not None)
    assert said is None or re.fullmatch(said, found[0])


def test_a_trained_support_counts_as_well(caplog):
    corpus = Corpus(samples(1, 9), [samples(1, 9)], 9, None, torch.empty(0), [])
    few, enough = (recipes.GainsConfig(steps=steps, batch_size=3) for steps in (1, 3))
    short, support = (recipes.SupportConfig(steps=steps, batch_size=3) for steps in (2, None))
    for config, mode, missed in (
        (recipes.FittedConfig(few), "modulate", 6),
        (recipes.FittedConfig(few, short), "modulate", 3),
        (recipes.FittedConfig(enough, short), "modulate", 0),
        (recipes.FittedConfig(enough, short), "mute", 3),
        (recipes.FittedConfig(few, support), "mute", 0),
        (recipes.FittedConfig(few), "mute", 0),
        (recipes.PaperConfig(batch_size=2), "mute", 0),
    ):
        caplog.clear()
        warn_of_unvisited(config, mode, corpus)
        assert [record.args[0] for record in caplog.records] == [missed] * bool(missed)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture
def few(monkeypatch):
    """Four steps are enough for six samples."""
    monkeypatch.setattr(schedule, "VISITS", 1)
    monkeypatch.setattr(schedule, "LEAST_STEPS", 4)
    monkeypatch.setattr(schedule, "MOST_STEPS", 4)


def run(model, forget_count, mode="modulate", config=None):
    """(the mute set, what each step was given, the number of steps that was told, the estimated work)."""
    taken, told = [], []
    with neumuter.attach(model, start_layer=1) as masked:
        forget, retain = samples(1, forget_count), samples(2, 5)
        pair = PairedBatches(masked, forget, retain)
        config = config or recipes.FittedConfig(GAINS, SUPPORT if mode == "mute" else None)
        take = pair.take
        pair.take = lambda ids, *more, **options: taken.append(ids) or take(ids, *more, **options)
        work = recipes.estimate_work(forget, retain, config, mode)
        mutes = recipes.fit_mutes(pair, 9, mode, config, callback=lambda *info: told.append(info[:2]))
    return mutes, taken, told, work


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


def test_hard_samples_come_first_only_where_there_are_many(llama, few):
    with neumuter.attach(llama, start_layer=1) as masked:
        for count, kind in ((6, False), (7, True)):
            pair = PairedBatches(masked, samples(1, count), samples(2, 5))
            assert isinstance(choose_samples(pair, 2, 0), HardFirst) == kind


@pytest.fixture
def trained(monkeypatch):
    """The tokens of each pass that goes back as well."""
    tokens = []
    hidden = PairedBatches._hidden

    def count_tokens(self, ids, *more):
        found = hidden(self, ids, *more)
        if found.requires_grad:
            tokens.append(ids.numel())
        return found

    monkeypatch.setattr(PairedBatches, "_hidden", count_tokens)
    return tokens


@pytest.mark.parametrize(("mode", "count"), [("modulate", 6), ("modulate", 9), ("mute", 9)])
def test_the_estimate_is_what_goes_through_the_model(llama, few, mode, count, trained):
    _, _, told, work = run(llama, count, mode)
    assert work.count_left(0) == sum(trained) > 0
    assert work.steps == told[-1][1]
    # What each step takes, without the pass that ranks the neurons.
    each = 2 * 2 * samples(1, 1)["labels"].shape[1]
    assert [work.count_left(done) for done in (work.steps - 1, work.steps)] == [each, 0]


@pytest.mark.parametrize("batch_size", [1, 4, None])
def test_the_estimate_for_the_papers_recipe_is_what_goes_through_the_model(llama, batch_size, trained):
    config = dataclasses.replace(QUICK_GATES, epochs=3, batch_size=batch_size, threshold=0.9999)
    told, forget, retain = [], samples(1, 6), samples(2, 5)
    with neumuter.attach(llama, start_layer=1) as masked:
        pair = PairedBatches(masked, forget, retain)
        recipes.train_gates(pair, config, callback=lambda *info: told.append(info[:2]))
    work = recipes.estimate_work(forget, retain, config)
    assert work.count_left(0) == sum(trained) > 0
    assert work.steps == told[-1][0] == told[-1][1]


@pytest.mark.parametrize("forget_count", [0, 6])
def test_the_estimate_for_a_refit_is_what_goes_through_the_model(llama, few, forget_count, trained):
    forget, retain = samples(1, forget_count) if forget_count else None, samples(2, 5)
    with neumuter.attach(llama, start_layer=1) as masked:
        mutes = recipes.mute_random(masked, 9)
        recipes.refit_gains(PairedBatches(masked, forget, retain), mutes, [], config=GAINS)
    work = recipes.estimate_work(forget, retain, GAINS)
    assert (work.count_left(0), work.ranking, work.steps) == (sum(trained), 0, 4)


PAIRS = [(f"Guest {name} of the old inn,", f" key {name}{name}") for name in range(9)]
KEPT = [f"The kettle number {name} is on the shelf." for name in range(9)]


class Killed(BaseException):
    pass


@pytest.fixture
def elapsed(llama, monkeypatch):
    """A clock that passes of the model move: by a second for a token, or for a step of a continuation."""
    clock = [0.0]

    def move(module, arguments, options):
        hidden = arguments[0] if arguments else options["hidden_states"]
        tokens = hidden.shape[0] * hidden.shape[1] if hidden.shape[1] > 1 else 1
        clock[0] += tokens * (3 if torch.is_grad_enabled() else 1)

    monkeypatch.setattr(controls, "MADE_UP", 4)
    for module in (continuations, examination):
        monkeypatch.setattr(module, "MAX_TOKENS", 4)
    hook = llama.model.layers[0].register_forward_pre_hook(move, with_kwargs=True)
    for module in (estimating, refitting, progress):
        monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    yield clock
    hook.remove()


@pytest.fixture
def promised(monkeypatch, elapsed):
    """What was announced before the steps: (when, how long)."""
    found = []

    def note(what, seconds):
        found.append((elapsed[0], seconds))

    for module in (job, refitting):
        monkeypatch.setattr(module, "announce", note)
    return found


FITTED = recipes.FittedConfig(dataclasses.replace(GAINS, steps=40))
JOBS = {
    "fitted": {"recipe": FITTED},
    "calibrated": {"recipe": FITTED, "calibrate": True},
    "paper": {
        "recipe": dataclasses.replace(QUICK_GATES, epochs=12, batch_size=1, threshold=0.9999),
        "budget": None,
    },
    "auto": {"recipe": FITTED, "budget": "auto", "goals": recipes.Goals(ma=1.0)},
}


def unlearn(model, **options):
    given = {"budget": 9, "calibrate": False, "samples": 2, "max_length": 32, "callback": lambda *_: None}
    return neumuter.unlearn(model, tokenizer(), PAIRS, KEPT, **given | options)


@pytest.mark.parametrize("job", JOBS)
def test_the_time_of_the_whole_job_is_estimated_before_it_is_measured(llama, job, elapsed, promised):
    unlearn(llama, **JOBS[job])
    ((since, seconds),) = promised
    assert since < elapsed[0] / 10
    assert seconds == pytest.approx(elapsed[0] - since, rel=0.15)


def test_a_run_that_goes_on_counts_what_is_left(llama, elapsed, promised, monkeypatch, tmp_path):
    monkeypatch.setattr(journal, "SAVE_SECONDS", 0.0)

    def kill(step, *_):
        if step == 30:
            raise Killed

    options = {"recipe": FITTED, "folder": tmp_path}
    with pytest.raises(Killed):
        unlearn(llama, callback=kill, **options)
    unlearn(llama, resume=True, **options)
    (_, whole), (since, left) = promised
    assert left == pytest.approx(elapsed[0] - since, rel=0.15)
    assert left < whole / 2


def test_the_time_of_a_refit_is_estimated(llama, elapsed, promised):
    with neumuter.attach(llama) as masked:
        mutes = recipes.mute_random(masked, 9)
    neumuter.refit(
        llama, tokenizer(), mutes, retain=KEPT, forget=PAIRS, recipe=FITTED, samples=2, max_length=32,
        callback=lambda *_: None,
    )  # fmt: skip
    ((since, seconds),) = promised
    assert seconds == pytest.approx(elapsed[0] - since, rel=0.15)


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
