"""The Python layer where the model is: on the CPU, and on a GPU where there is one."""

import copy
import dataclasses

import pytest
import torch

import neumuter
from neumuter import recipes
from neumuter.serving.bank import MuteBank
from neumuter.training.batches import PairedBatches
from neumuter.training.gates import INITIAL_SCORE
from tests import models
from tests.kernels.backends import DEVICES
from tests.neumuter.test_bank import logits, sets_of
from tests.neumuter.test_recipes import (
    FORGET,
    KEEP,
    QUICK_GAINS,
    QUICK_GATES,
    QUICK_SUPPORT,
    fit,
    memorised,
    same,
)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="module")
def llama():
    """On the CPU."""
    return memorised("llama")


def on(device, batch):
    return {name: value.to(device) for name, value in batch.items()}


def scores_of(model, device):
    """Of a short training on the device."""
    config = dataclasses.replace(QUICK_GATES, epochs=8, threshold=0.99)
    with neumuter.attach(copy.deepcopy(model).to(device), start_layer=0) as masked:
        recipes.train_gates(PairedBatches(masked, on(device, FORGET), on(device, KEEP)), config)
        return torch.cat([score.detach().cpu() for score in masked.scores.values()])


def test_training_gives_the_scores_that_it_gives_on_the_cpu(llama, device):
    expected, found = scores_of(llama, "cpu"), scores_of(llama, device)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)  # matmuls sum in another order
    assert (expected - INITIAL_SCORE).abs().max() > 1


@pytest.mark.parametrize("mode", ["mute", "modulate"])
def test_the_default_recipe_forgets(llama, mode, device):
    model = copy.deepcopy(llama).to(device)
    forget, keep = on(device, FORGET), on(device, KEEP)

    def found():
        with neumuter.attach(model, start_layer=0) as masked:
            return fit(masked, forget, keep, 0.3, mode, QUICK_SUPPORT, QUICK_GAINS)

    mutes = found()
    assert same(mutes, found())  # the same bits once more
    plain = [neumuter.evaluation.mean_token_loss(model, batch) for batch in (forget, keep)]
    with neumuter.mute(model, mutes):
        muted = [neumuter.evaluation.mean_token_loss(model, batch) for batch in (forget, keep)]
    assert muted[0] - plain[0] > 0.5
    assert muted[0] - plain[0] > 5 * (muted[1] - plain[1])


@pytest.mark.parametrize("name", models.SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_muting_equals_folding(name, dtype, device):
    model = models.build(name, dtype).to(device)
    ids = models.batch(3, 7).to(device)
    (mutes,) = sets_of(model, 1)
    plain, folded = logits(model, ids), copy.deepcopy(model)
    neumuter.fold(folded, mutes)
    with neumuter.mute(model, mutes) as muted:
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(logits(model, ids), logits(folded, ids), rtol=tolerance, atol=tolerance)
        assert not torch.equal(logits(model, ids), plain)
        with muted.off():
            assert torch.equal(logits(model, ids), plain)
    assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_a_batch_does_not_depend_on_the_sets_of_the_others(dtype, device):
    model = models.build("llama", dtype).to(device)
    ids, names = models.batch(4, 6).to(device), ["a", None, "b", "a"]
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
    sets = sets_of(model, 2)
    with MuteBank(model, required=False) as bank:
        for name, mutes in zip("ab", sets, strict=True):
            bank.add(name, mutes)
        mixed = model.generate(ids, **options, mute_sets=names)
        for row, name in enumerate(names):
            assert torch.equal(mixed[row], model.generate(ids, **options, mute_sets=name)[row])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("few", [1 << 18, 0])
def test_a_muted_model_is_captured_in_a_cuda_graph(few, monkeypatch):
    monkeypatch.setattr("neumuter.serving.live.FEW", few)
    model = models.build("llama", torch.bfloat16).cuda()
    ids, other = models.batch(2, 6).cuda(), models.batch(2, 6, seed=5).cuda()
    with torch.no_grad(), neumuter.mute(model, sets_of(model, 1)[0]):

        def call():
            return model(input_ids=ids, use_cache=False).logits

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        expected = logits(model, other)
        ids.copy_(other)
        graph.replay()
        assert torch.equal(captured, expected)
