"""Which samples steps have: in turn, or those first that are still known; and each source from its state."""

import itertools
from collections import Counter

import pytest
import torch

from neumuter.training import sources
from neumuter.training.sources import LEAST_WEIGHT, HardFirst, InTurn

FORGET, RETAIN = range(6), range(6, 15)
SOURCES = pytest.mark.parametrize("source", [InTurn, HardFirst])


def rounds(source, steps):
    """The forget and the retain samples of steps, one after the other."""
    drawn = [next(source) for _ in range(steps)]
    return [[i for step in drawn for i in step if i in kind] for kind in (FORGET, RETAIN)]


def test_samples_come_in_the_order_of_one_generator():
    """Written out: mute sets depend on it."""
    generator = torch.Generator().manual_seed(5)
    queues = [[], []]
    source = InTurn(6, 9, 4, 5)
    for _ in range(12):
        step = []
        for queue, first, count in zip(queues, (0, 6), (6, 9), strict=True):
            for _ in range(4):
                if not queue:
                    queue += (first + torch.randperm(count, generator=generator)).tolist()
                step.append(queue.pop(0))
        assert next(source) == step


@SOURCES
def test_without_a_batch_size_steps_have_all_samples(source):
    assert list(itertools.islice(source(2, 3, None, 0), 2)) == [[0, 1, 2, 3, 4]] * 2


@SOURCES
def test_a_source_has_no_more_samples_than_there_are(source):
    one = source(6, 9, 7, 1)
    for _ in range(4):
        step = next(one)
        assert sorted(step[:6]) == list(FORGET)
        assert len(step[6:]) == 7


@SOURCES
def test_a_source_depends_on_its_seed_alone_and_goes_on_from_its_state(source):
    log_odds = torch.linspace(-6, 3, 6)

    def draw(one, steps):
        drawn = []
        for _ in range(steps):
            drawn.append(next(one))
            if source is HardFirst:
                one.see(log_odds)
        return drawn

    expected = draw(source(6, 9, 4, 5), 20)
    for steps in (0, 1, 2, 9):
        first, second = source(6, 9, 4, 5), source(6, 9, 4, 6)
        draw(first, steps)
        state = first.state()
        # Neither what the first one does afterwards matters, nor the global generator.
        draw(first, 3)
        torch.rand(3)
        second.load(state)
        assert draw(second, 20 - steps) == expected[steps:]
    assert draw(source(6, 9, 4, 6), 20) != expected


def test_the_hard_ones_come_after_one_round_of_all():
    for seed in range(10):
        source = HardFirst(6, 9, 4, seed)
        source.see(torch.tensor([50.0, 50, 50, 50, -50, -50]))
        forget, _ = rounds(source, 2)
        assert sorted(forget[:6]) == list(FORGET)
        # The rest of the second step is drawn, and nothing comes twice in a step.
        assert len(set(forget[4:])) == 4
    forget, retain = rounds(source, 900)
    assert all(len(set(forget[i : i + 4])) == 4 for i in range(0, len(forget), 4))
    assert max(Counter(forget)[4], Counter(forget)[5]) < 0.3 * min(Counter(forget)[i] for i in range(4))
    assert all(sorted(retain[i : i + 9]) == list(RETAIN) for i in range(1, len(retain) - 9, 9))


def test_samples_are_drawn_in_proportion_to_how_well_they_are_known():
    source = HardFirst(6, 9, 1, 3)
    rounds(source, 6)
    log_odds = torch.tensor([-30.0, -3.0, -1.0, 0.0, 2.0, torch.nan])
    source.see(log_odds)
    steps = 20000
    counts = Counter(rounds(source, steps)[0])
    weights = (1 + log_odds).sigmoid()
    # Forgotten by far; and never read, which counts as known by heart.
    weights[0], weights[5] = LEAST_WEIGHT, 1.0
    for i, share in enumerate((weights / weights.sum()).tolist()):
        assert counts[i] / steps == pytest.approx(share, abs=4 * (share / steps) ** 0.5)
    # A sample that a step did not have keeps what was known of it.
    source.see(torch.full([6], torch.nan))
    assert Counter(rounds(source, 2000)[0])[0] < 60


@SOURCES
def test_a_batch_size_below_one_is_refused(source):
    with pytest.raises(ValueError, match="batch_size must be at least 1, or None for all samples, got 0"):
        source(6, 9, 0, 1)


def test_a_few_thousand_samples_are_drawn_as_ever():
    """Written out: mute sets depend on it."""
    count = sources.WEIGHED
    source, generator = HardFirst(count, 2, 3, 5), torch.Generator().manual_seed(5)
    log_odds = torch.linspace(-6, 3, count)
    source.see(log_odds)
    source._fresh = 0
    weights = (1 + log_odds).sigmoid().clamp(min=LEAST_WEIGHT)
    assert next(source)[:3] == torch.multinomial(weights, 3, generator=generator).tolist()


def test_of_many_samples_as_likely_ones_are_drawn(monkeypatch):
    """By proposals, with the chances that multinomial gives, at both places of a step."""
    log_odds = torch.tensor([-30.0, -3.0, -1.0, 0.0, 2.0, torch.nan])
    weights = (1 + log_odds).sigmoid()
    weights[0], weights[5] = LEAST_WEIGHT, 1.0
    weights /= weights.sum()
    second = sum(
        weights[i] * weights.index_fill(0, torch.tensor(i), 0.0) / (1 - weights[i]) for i in range(6)
    )
    monkeypatch.setattr(sources, "WEIGHED", 5)
    monkeypatch.setattr(sources, "PROPOSED", 4)
    source = HardFirst(6, 9, 2, 3)
    rounds(source, 3)
    source.see(log_odds)
    steps = 20000
    drawn = [next(source)[:2] for _ in range(steps)]
    assert all(first != other for first, other in drawn)
    for place, shares in enumerate((weights, second)):
        counts = Counter(step[place] for step in drawn)
        for i, share in enumerate(shares.tolist()):
            assert counts[i] / steps == pytest.approx(share, abs=4 * (share / steps) ** 0.5)


def test_many_samples_depend_on_the_seed_alone_and_are_drawn_from_a_few():
    """torch draws by weights from 2**24 at most, and looks at all of them."""
    count = 2**24 + 3

    def start(seed):
        source = HardFirst(count, 2, 8, seed)
        source._fresh = 0
        return source

    first, again = start(1), start(1)
    drawn, same = ([i for _ in range(5) for i in next(source)[:8]] for source in (first, again))
    assert drawn == same
    assert len(set(drawn)) == 40
    assert max(drawn) > count / 2
    again.load(first.state())
    assert next(first) == next(again)


def test_all_samples_of_a_step_are_found_where_nothing_is_left_of_any(monkeypatch):
    monkeypatch.setattr(sources, "WEIGHED", 5)
    source = HardFirst(300, 9, 300, 3)
    rounds(source, 1)
    source.see(torch.full([300], -100.0))
    assert sorted(next(source)[:300]) == list(range(300))


def test_an_unfinished_round_goes_on_with_draws(monkeypatch):
    monkeypatch.setattr(sources, "WEIGHED", 5)
    source = HardFirst(6, 9, 4, 3)
    forget, _ = rounds(source, 2)
    assert sorted(forget[:6]) == list(FORGET)
    assert len(set(forget[4:])) == 4
