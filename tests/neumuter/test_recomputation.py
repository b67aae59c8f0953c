"""Activations that are computed again in the backward pass: the same gradients, from less memory."""

import pytest
import torch

import neumuter
from neumuter.models.recomputation import decoder_layers
from neumuter.training.batches import PairedBatches
from tests.models import build
from tests.neumuter import jobs
from tests.neumuter.small_fits import FORGET, KEEP, RECIPES
from tests.neumuter.test_recipes import memorised


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "gemma2", "mixtral"])
def test_gradients_are_the_same(name):
    found = []
    for recompute in (False, True):
        model = build(name)
        layer, calls = decoder_layers(model)[1], []
        layer.register_forward_hook(lambda *_: calls.append("outside"))  # noqa: B023
        next(layer.children()).register_forward_hook(lambda *_: calls.append("inside"))  # noqa: B023
        if recompute:
            model.gradient_checkpointing_enable()
        found.append(jobs.gradients(model))
        assert ("forward" in vars(layer)) is False
        assert (calls.count("inside") > 1.5 * calls.count("outside")) == recompute
    plain, again = found
    assert plain.keys() == again.keys()
    for what, value in plain.items():
        assert torch.equal(value, again[what]), what


def test_it_begins_where_one_sample_does_not_fit(monkeypatch, caplog):
    model, hidden, results = memorised("llama"), PairedBatches._hidden, []

    def run(self, ids, *arguments):
        if torch.is_grad_enabled() and (len(ids) > 1 or not self.masked.recomputation.runs):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(self, ids, *arguments)

    for limited in (False, True):
        if limited:
            monkeypatch.setattr(PairedBatches, "_hidden", run)
        with neumuter.attach(model, start_layer=1) as masked:
            results.append(RECIPES["fitted"](PairedBatches(masked, FORGET, KEEP)))
    whole, parts = results
    assert whole.layers.keys() == parts.layers.keys()
    for path, layer in whole.layers.items():
        assert torch.equal(layer.indices, parts.layers[path].indices)
        torch.testing.assert_close(layer.gains, parts.layers[path].gains, rtol=1e-5, atol=1e-6)
    assert caplog.text.count("from now on activations are computed again") == 1
    assert not any("forward" in vars(layer) for layer in decoder_layers(model))
