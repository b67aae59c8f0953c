"""A step that does not fit into memory is taken in parts."""

import pytest
import torch

import neumuter
from neumuter import recipes
from neumuter.training.batches import PairedBatches
from tests.neumuter.small_fits import FORGET, GAINS, KEEP, RECIPES, fitted_neurons
from tests.neumuter.test_recipes import memorised


@pytest.fixture(scope="module")
def llama():
    return memorised("llama")


@pytest.fixture
def small_memory(monkeypatch):
    """Function: from now on no more than so many samples fit; returns how many each pass had that did."""

    def limit(most):
        def run(self, ids, *arguments):
            if len(ids) > most:
                raise torch.OutOfMemoryError(f"CUDA out of memory: {len(ids)} samples")
            passes.append(len(ids))
            return hidden(self, ids, *arguments)

        passes, hidden = [], PairedBatches._hidden
        monkeypatch.setattr(PairedBatches, "_hidden", run)
        return passes

    return limit


@pytest.mark.parametrize(
    ("name", "references", "most"),
    [*((name, "kept", 3) for name in RECIPES), ("fitted", "computed", 1), ("paper", "computed", 1)],
)
def test_a_step_that_does_not_fit_is_taken_in_parts(
    llama, name, most, references, small_memory, monkeypatch, caplog
):
    if references == "computed":
        monkeypatch.setattr("neumuter.training.references.HOST_BYTES", 0)
        monkeypatch.setattr("neumuter.training.references.DEVICE_BYTES", 0)
    results = []
    for limit in (None, most):
        passes = small_memory(limit) if limit else []
        told = []
        with neumuter.attach(llama, start_layer=1) as masked:
            pair = PairedBatches(masked, FORGET, KEEP)
            mutes = RECIPES[name](pair, lambda *info: told.append(info))  # noqa: B023
        results.append((mutes, told))
    (whole, all_told), (parts, part_told) = results
    assert whole.layers.keys() == parts.layers.keys()
    for path, layer in whole.layers.items():
        assert torch.equal(layer.indices, parts.layers[path].indices)
        torch.testing.assert_close(layer.gains, parts.layers[path].gains, rtol=1e-5, atol=1e-6)
    for (*numbers, found), (*expected, info) in zip(part_told, all_told, strict=True):
        assert numbers == expected
        assert found.pop("phase", None) == info.pop("phase", None)
        assert found == pytest.approx(info, rel=1e-4, abs=1e-5)
    assert 0 < max(passes) <= most
    lines = [record.message for record in caplog.records if "do not fit into memory" in record.message]
    # Once for the passes over single samples, once for the steps, however many steps there are.
    assert 1 <= len(lines) <= 8


def test_one_sample_that_does_not_fit_ends_the_run(llama, small_memory):
    with neumuter.attach(llama, start_layer=1) as masked:
        pair = PairedBatches(masked, FORGET, KEEP)
        small_memory(0)
        with pytest.raises(torch.OutOfMemoryError, match="1 samples"):
            RECIPES["fitted"](pair)


def test_an_update_that_has_begun_is_not_taken_again(llama, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("in the update")

    monkeypatch.setattr("neumuter.recipes.fitted._Update.apply", fail)
    with neumuter.attach(llama, start_layer=1) as masked:
        pair = PairedBatches(masked, FORGET, KEEP)
        with pytest.raises(torch.OutOfMemoryError, match="in the update"):
            RECIPES["fitted"](pair)


def test_the_size_of_parts_goes_on_with_the_step(llama, small_memory):
    small_memory(2)
    with neumuter.attach(llama, start_layer=1) as masked:

        def begin():
            pair = PairedBatches(masked, FORGET, KEEP)
            fit_ = recipes.fitted._Fit(fitted_neurons(pair), pair, GAINS, 3, 1, None)
            return fit_.ids, fit_.make_step(torch.arange(9), torch.ones(9).requires_grad_(), 12)

        ids, first = begin()
        assert first.pair.at_once.size == 12
        first.take(ids, 1)
        _, second = begin()
        second.load(first.state())
    assert second.pair.at_once.size == 2
