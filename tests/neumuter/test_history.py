"""The history of a search: a bounded number of points, evenly apart, the last of them exact."""

import pytest

from neumuter.training import history
from neumuter.training.history import add_point, count_steps
from neumuter.training.values import pack, unpack


@pytest.mark.parametrize("most", [1, 4, 5, 64])
def test_points_are_few_and_evenly_apart(most, monkeypatch):
    monkeypatch.setattr(history, "MOST", most)
    points = []
    assert count_steps(points) == 0
    for number in range(1, 700):
        add_point(points, {"loss": number / 7})
        steps = [point["step"] for point in points]
        assert count_steps(points) == number
        assert all(point["loss"] == point["step"] / 7 for point in points)
        if number <= most:
            assert steps == list(range(1, number + 1))
            continue
        assert most / 2 <= len(steps) <= most + 1
        assert (steps[0], steps[-1]) == (1, number)
        distance = steps[1] - 1 if len(steps) > 2 else number
        assert steps == sorted({*range(1, number + 1, distance), number})


def test_a_history_that_was_written_goes_on_the_same(monkeypatch):
    monkeypatch.setattr(history, "MOST", 8)
    whole, parts = [], []
    for number in range(1, 200):
        add_point(whole, {"loss": number / 7})
        add_point(parts, {"loss": number / 7})
        parts = unpack(pack({"history": parts}))["history"]
        assert parts == whole


def test_the_points_of_a_million_steps_take_little():
    points = []
    for _ in range(1_000_000):
        add_point(points, {"loss": 0.5})
    assert len(points) <= 4097
    assert len(pack({"history": points})) < 400_000
