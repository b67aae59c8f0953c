"""Reference states are the same on the device, in the host's memory, and where each step computes its own."""

import pytest
import torch

import neumuter
from neumuter.training.batches import PairedBatches
from neumuter.training.references import References
from tests.neumuter.small_fits import FORGET, KEEP, RECIPES, run
from tests.neumuter.test_recipes import KEPT, keep_references, memorised, same

STEPS = [[0, 3, 5, 8], [1, 2, 6, 11], [4, 0, 7, 9]]


@pytest.fixture(scope="module")
def llama():
    return memorised("llama")


@pytest.fixture
def pairs(llama, monkeypatch):
    """A pair for each place where references are kept."""
    with neumuter.attach(llama, start_layer=1) as masked:
        found = {}
        for where in KEPT:
            keep_references(where, monkeypatch)
            found[where] = PairedBatches(masked, FORGET, KEEP)
            for everywhere in (True, False):
                found[where].take(STEPS[0], everywhere)
        yield found


def evaluated(pair, inputs, everywhere):
    """Under masks."""
    masks = {path: torch.linspace(0, 1, len(score)) for path, score in pair.masked.scores.items()}
    with torch.no_grad(), pair.masked.applying(masks):
        return pair.evaluate(inputs, everywhere)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("everywhere", [False, True])
def test_losses_are_the_same_wherever_references_are_kept(pairs, everywhere, padded):
    for step in STEPS:
        found = {}
        for where, pair in pairs.items():
            inputs = pair.take(step, everywhere, padded=padded)
            weights = inputs.weights.split([len(inputs.targets), len(inputs.references)])
            values = evaluated(pair, inputs, everywhere)
            found[where] = [value[weight > 0] for value, weight in zip(values, weights, strict=True)]
        for one, two in zip(found["device"], found["host"], strict=True):
            assert torch.equal(one, two)
        for one, two in zip(found["device"], found["nowhere"], strict=True):
            torch.testing.assert_close(one, two)
        assert found["host"][1].mean() > 0.01


def test_only_steps_without_kept_references_run_the_model_twice(pairs):
    passes = {}
    for where, pair in pairs.items():
        seen = []
        handle = pair.masked.model.model.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        evaluated(pair, pair.take(STEPS[0]), False)
        handle.remove()
        passes[where] = len(seen)
    assert passes == {"device": 1, "host": 1, "nowhere": 2}


def test_a_step_laid_out_ahead_overwrites_nothing_of_another(pairs):
    """The processor lays out steps while copies of earlier ones have not run yet."""
    pair = pairs["host"]
    expected = [evaluated(pair, pair.take(step, padded=True), False) for step in STEPS]
    ahead = [pair.take(step, padded=True) for step in STEPS]
    assert all(inputs.references.is_floating_point() for inputs in ahead)
    for inputs, values in zip(ahead, expected, strict=True):
        assert all(torch.equal(*both) for both in zip(evaluated(pair, inputs, False), values, strict=True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_mute_sets_are_the_same_wherever_references_are_kept(llama, recipe, monkeypatch):
    found = {}
    for where in KEPT:
        keep_references(where, monkeypatch)
        found[where] = run(llama, RECIPES[recipe])
    assert same(found["device"], found["host"])
    for path, layer in found["device"].layers.items():
        assert torch.equal(found["nowhere"].layers[path].indices, layer.indices)
        torch.testing.assert_close(found["nowhere"].layers[path].gains, layer.gains, rtol=1e-3, atol=1e-4)


def test_where_there_is_no_room_on_the_device_the_host_keeps_them(monkeypatch, caplog):
    pieces, empty = [torch.randn(3, 5), torch.randn(4, 5)], torch.empty

    def refuse(*size, **options):
        if "device" in options:
            raise torch.OutOfMemoryError("no room")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    found = References([3, 4], 20, iter(pieces))
    assert not found.on_device
    assert "The references do not fit on the device: they are kept in the host's memory." in caplog.text
    rows = torch.cat([found.rows(1), found.rows(0)])
    assert torch.equal(found.read(found.lay_out(rows)), torch.cat(pieces[::-1]))


def test_the_limits_count_the_bytes_of_all_retain_tokens(llama, monkeypatch, caplog):
    caplog.set_level("INFO")
    with neumuter.attach(llama) as masked:
        for everywhere in (False, True):
            pair = PairedBatches(masked, FORGET, KEEP)
            retain = range(pair.forget_count, pair.forget_count + pair.retain_count)
            size = pair.count_tokens(retain, everywhere)[1] * llama.config.hidden_size * 4
            for device, host, rows, kept in (
                (size, 0, True, True), (size - 1, size, False, True), (size - 1, size - 1, True, False),
            ):  # fmt: skip
                monkeypatch.setattr("neumuter.training.references.DEVICE_BYTES", device)
                monkeypatch.setattr("neumuter.training.references.HOST_BYTES", host)
                caplog.clear()
                inputs = PairedBatches(masked, FORGET, KEEP).take([0, *retain], everywhere)
                assert (inputs.references.dim() == 1) == rows
                assert ("Each step computes its references" in caplog.text) != kept
