"""How long a step takes by data sheets, by hand."""

import pytest
import torch

from neumuter.training import pace
from neumuter.training.pace import CARDS, Card, Group, Work
from neumuter.training.plan import _make_step, plan
from neumuter.training.tracing import trace
from tests.models import config

CARD = Card(flops=1e12, memory=1e9, link=1e8)
WORK = Work(flops=2e12, moved=1e9, reduced=1e8, weights=2e8, samples=2, passes=2)


@pytest.mark.parametrize(
    ("samples", "groups", "expected"),
    [
        (2, {}, 2.0),
        # The weights are read all the same: 0.4 s of the memory's second.
        (1, {}, 1.0), (4, {}, 4.0),
        # Weights are gathered twice, while others are computed with.
        (2, {"gathered": Group(4, 4)}, 3.0), (4, {"gathered": Group(4, 4)}, 4.0),
        # A sum goes around twice, and all wait for it.
        (2, {"reduced": Group(2, 2)}, 3.0), (4, {"reduced": Group(2, 2)}, 6.0),
    ],
)  # fmt: skip
def test_a_step_takes_what_its_parts_take(samples, groups, expected):
    assert WORK.seconds(CARD, samples, **groups) == pytest.approx(expected)


def test_memory_can_be_what_binds():
    slow = CARD._replace(memory=1e8)
    assert WORK.seconds(slow, 2) == pytest.approx(10.0)
    assert WORK.seconds(slow, 1) == pytest.approx(4.0 + 3.0)


def test_other_machines_are_reached_through_ports(monkeypatch):
    monkeypatch.setattr(pace, "PORT", 1e7)
    assert Group(4, 4).seconds(1e8, CARD) == pytest.approx(0.75)
    assert Group(4, 2).seconds(1e8, CARD) == pytest.approx(0.75e8 / 2e7)
    # A machine's devices together are no faster than what joins them.
    assert Group(40, 20).seconds(1e8, CARD) == pytest.approx(0.975)


def test_tensor_parallelism_divides_the_work_and_sums_activations():
    llama = config("llama", num_hidden_layers=4)
    one, two = (
        trace(llama, _make_step, layout, count, 4, 16, torch.bfloat16)
        for layout, count in (("ddp", 1), ("tp", 2))
    )
    assert two.flops == pytest.approx(one.flops / 2, rel=0.01)
    assert one.reduced == 0
    # In each layer two sums forward, and backward one of the FFN and one of each of three projections.
    activations = 8 * 16 * llama.hidden_size * 2
    assert 4 * 4 <= two.reduced / activations <= 4 * 6


def test_copies_are_faster_than_layers_that_wait():
    found = plan(config("llama", num_key_value_heads=4), devices=4, samples=8, tokens=64)
    for card in CARDS:
        times = {name: seconds[card] for name, seconds in found.seconds.items()}
        assert times["DDP"] <= times["FSDP2, ZeRO-3"]
        assert times["DDP"] < times["tensor parallel"]
        assert times["device_map"] > 3.9 * times["DDP"]
