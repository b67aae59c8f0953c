"""The training step: it waits for nothing, keeps its sizes, can be captured, and goes on where it was."""

import contextlib
import copy
import dataclasses
import math
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import masking_utils

import neumuter
from neumuter import recipes
from neumuter.models.packing import one_sequence_a_row
from neumuter.training import graphs, step
from neumuter.training.batches import BUCKET, PairedBatches
from tests import models
from tests.neumuter.small_fits import FORGET, GAINS, GATES, KEEP, RECIPES, fitted_neurons, run
from tests.neumuter.test_recipes import KEPT, fit, keep_references, memorised, same


@pytest.fixture(scope="module")
def llama():
    return memorised("llama")


class OnePlace(TorchDispatchMode):
    """Refuses what makes the processor wait for a GPU, and writes down the sizes that each op sees."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = str(function)
        assert not any(word in name for word in self.WAITING), f"{name} waits for the device"
        result = function(*arguments, **(options or {}))
        tensors = torch.utils._pytree.tree_leaves([arguments, options, result])
        self.seen.append((name, *(tuple(t.shape) for t in tensors if isinstance(t, torch.Tensor))))
        return result


class Captured:
    """In place of CUDA graphs on the CPU: what is captured runs anew, on the inputs that stayed in place."""

    def __init__(self, fails=False):
        self.fails, self.captures, self.replays, self.modes = fails, 0, 0, []

    def capture(self, body, pool):
        if self.fails:
            raise RuntimeError("a graph cannot hold this")
        self.captures += 1

        def replay():
            self.replays += 1
            with OnePlace() as mode:
                body()
            self.modes.append(mode.seen)

        return replay, pool


@pytest.fixture
def captured(monkeypatch):
    """Steps on the CPU are taken as on a GPU, but for torch's Adam, which reads its step on a CPU."""
    found = Captured()
    monkeypatch.setattr(step, "find_obstacle", lambda masked, shared: None)
    monkeypatch.setattr(graphs, "capture", found.capture)
    monkeypatch.setattr(graphs, "run_aside", lambda body: body())
    apply = recipes.fitted.Adam.apply

    def outside(self, measured, counter):
        with _disable_current_modes():
            apply(self, measured, counter)

    monkeypatch.setattr(recipes.fitted.Adam, "apply", outside)
    return found


@pytest.mark.parametrize(
    ("name", "kept"), [*((name, "device") for name in RECIPES), ("fitted", "host"), ("paper", "nowhere")]
)
def test_steps_wait_for_nothing_and_keep_their_sizes(llama, name, captured, kept, monkeypatch):
    keep_references(kept, monkeypatch)
    told = []
    run(llama, RECIPES[name], lambda *info: told.append(info))
    assert captured.captures >= 1
    assert captured.replays >= 3
    sizes = {tuple(seen) for seen in captured.modes}
    # Steps of as many samples run the same ops on the same sizes; an epoch of the paper's ends with fewer.
    assert len(sizes) == captured.captures
    assert [number for number, *_ in told] == list(range(1, len(told) + 1))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_graphs_give_what_eager_steps_give(llama, recipe, monkeypatch, request):
    eager = []
    expected = run(llama, recipe, lambda *info: eager.append(info))
    request.getfixturevalue("captured")
    monkeypatch.setitem(step.READ_EVERY, "cpu", 4)
    told = []
    mutes = run(llama, recipe, lambda *info: told.append(info))
    for (number, total, info), (other, same_total, expected_info) in zip(told, eager, strict=True):
        assert (number, total) == (other, same_total)
        assert {k: v for k, v in info.items() if isinstance(v, str)} == {
            k: v for k, v in expected_info.items() if isinstance(v, str)
        }
        for name in step.READINGS:
            assert info[name] == pytest.approx(expected_info[name], rel=1e-3, abs=1e-4)
    for path, layer in expected.layers.items():
        torch.testing.assert_close(mutes.layers[path].gains, layer.gains, rtol=1e-3, atol=1e-4)
        assert torch.equal(mutes.layers[path].indices, layer.indices)


def test_what_cannot_be_captured_runs_eagerly_and_says_so(llama, captured, caplog):
    expected = run(llama, RECIPES["fitted"])
    captured.fails, captured.captures = True, 0
    mutes = run(llama, RECIPES["fitted"])
    assert not captured.captures
    # Two runs of the fit, each with steps of its own.
    assert caplog.text.count("a step cannot be captured as a CUDA graph: a graph cannot hold this") == 2
    assert same(mutes, expected)


def test_graphs_are_of_the_models_device(captured, monkeypatch):
    class Some:
        """Inputs without tensors, which tell where they are wanted."""

        tensors, split = (), 0

        def to(self, device):
            places.append(device)
            return self

    class Current(contextlib.nullcontext):
        def __init__(self, index):
            super().__init__()
            current.append(index)

    places, current = [], []
    monkeypatch.setattr(torch.accelerator, "device_index", Current)
    one = graphs.Graphs(lambda inputs: None, torch.device("cuda:1"))
    for _ in range(graphs.WARM_UP + 1):
        one.run(Some())
    assert captured.replays == 1
    assert places == [torch.device("cuda:1")]
    assert current == [1] * (graphs.WARM_UP + 1)


def test_obstacles_are_named(llama):
    with neumuter.attach(llama) as masked:
        assert graphs.find_obstacle(masked) == "the model is on no GPU"
        assert graphs.find_obstacle(masked, shared=True) == "several processes share it"
    with neumuter.attach(models.build("jetmoe")) as masked:
        masked.model.to("meta")
        assert graphs.find_obstacle(masked) == "the model is on no GPU"
    half = copy.deepcopy(llama)
    half.lm_head.to("meta")
    with neumuter.attach(copy.deepcopy(llama)) as masked:
        masked.model = half
        assert graphs.find_obstacle(masked) == "the model is on several devices (cpu, meta)"


@pytest.mark.parametrize("kept", KEPT)
def test_padding_changes_no_loss_and_stays_within_the_positions(llama, kept, monkeypatch):
    keep_references(kept, monkeypatch)
    short = copy.deepcopy(llama)
    short.config.max_position_embeddings = 40
    for model, width in ((llama, BUCKET), (short, 40)):
        with neumuter.attach(model) as masked:
            pair = PairedBatches(masked, FORGET, KEEP)
            masks = {path: torch.rand(models.WIDTH) for path in masked.scores}
            for everywhere in (True, False):
                padded = pair.take([0, 3, 4, 6, 9], everywhere, padded=True)
                plain = pair.take([0, 3, 4, 6, 9], everywhere)
                assert padded.ids.shape == (5, width)
                assert plain.weights.all()
                counts = len(padded.targets), len(padded.references)
                assert counts == (BUCKET, BUCKET)
                with torch.no_grad(), masked.applying(masks):
                    found, expected = pair.evaluate(padded, everywhere), pair.evaluate(plain, everywhere)
                for values, weights, exact in zip(found, padded.weights.split(counts), expected, strict=True):
                    assert torch.isfinite(values).all()
                    torch.testing.assert_close(values[weights > 0], exact)


@pytest.mark.parametrize("source", ["steps", "hard_first"])
@pytest.mark.parametrize("after", [1, 4, 6])
def test_a_step_goes_on_where_another_ended_with_the_same_bits(llama, after, source, monkeypatch, tmp_path):
    """Its state and that of its source are all that they need, wherever the readings were."""
    monkeypatch.setitem(step.READ_EVERY, "cpu", 4)
    with neumuter.attach(llama, start_layer=1) as masked:
        pair = PairedBatches(masked, FORGET, KEEP)
        neurons = fitted_neurons(pair)

        def begin():
            fit_ = recipes.fitted._Fit(neurons, pair, GAINS, 3, 1, None)
            gains = torch.ones(9).requires_grad_()
            return getattr(pair, source)(2, 3), gains, fit_.make_step(torch.arange(9), gains, 12)

        ids, whole, one = begin()
        one.take(ids, 12)
        ids, _, first = begin()
        first.take(ids, after)
        torch.save((first.state(), ids.state()), tmp_path / "state")
        first.take(ids, 1)
        ids, gains, second = begin()
        of_step, of_ids = torch.load(tmp_path / "state", weights_only=True)
        second.load(of_step)
        torch.testing.assert_close(second.log_odds, of_step["log_odds"], rtol=0, atol=0, equal_nan=True)
        ids.load(of_ids)
        second.take(ids, 12 - after)
    assert torch.equal(gains, whole)
    assert torch.equal(one.log_odds, second.log_odds)
    assert (whole - 1).abs().max() > 0.1


@pytest.mark.parametrize("padded", [False, True])
def test_log_odds_are_those_of_the_run_that_is_likeliest(llama, padded, request, monkeypatch):
    if padded:
        request.getfixturevalue("captured")
    with neumuter.attach(llama, start_layer=1) as masked:
        # A run ends where a token may be known; nothing identifies the last text.
        ceilings = torch.full(FORGET["labels"].shape, -6.0)
        ceilings[:, 6] = 0.0
        ceilings[3] = 2.0
        pair = PairedBatches(masked, FORGET, KEEP, ceilings)
        gains = torch.linspace(0, 1, models.WIDTH)
        evaluate = pair.evaluate

        def knowing_padding(inputs, *options):
            losses, divergences = evaluate(inputs, *options)
            return losses * inputs.weights[: len(losses)], divergences

        monkeypatch.setattr(pair, "evaluate", knowing_padding)
        path, update = next(iter(masked.scores)), recipes.fitted.Adam([gains.requires_grad_()], [0.0])
        one = step.Step(
            pair, [gains], lambda *_: masked.applying({path: gains}), [lambda found: found.kl], update
        )
        for samples_ in ([3, 0, 6, 7], [1, 3, 5, 9], [3, 1, 5, 8]):
            one.once(samples_)
        with torch.no_grad(), masked.applying({path: gains}):
            p = [losses.neg().double().exp() for losses in pair.sample_losses([0, 1])]
    expected = []
    for row, chances in enumerate(p):
        each, runs = iter(chances.tolist()), [[]]
        for place in (FORGET["labels"][row, 1:] != -100).nonzero().flatten().tolist():
            runs[-1].append(next(each))
            if place + 1 == 6:
                runs[-1:] = [runs[-1][:-1], []]
        expected.append(max(torch.tensor(math.prod(run)).logit().item() for run in runs if run))
    expected = torch.tensor([*expected, step.NOTHING])
    torch.testing.assert_close(one.log_odds[[0, 1, 3]], expected, rtol=1e-3, atol=1e-3)
    assert one.log_odds[[2, 4]].isnan().all()
    assert not one.log_odds.requires_grad


def test_a_source_sees_what_the_step_last_read(llama, monkeypatch):
    monkeypatch.setitem(step.READ_EVERY, "cpu", 4)

    class Source:
        def __init__(self):
            self.drawn, self.seen = 0, []

        def __next__(self):
            self.drawn += 1
            return [self.drawn % 5, 5 + self.drawn % 7]

        def see(self, log_odds):
            self.seen.append((self.drawn, log_odds))

    with neumuter.attach(llama) as masked:
        pair, ids = PairedBatches(masked, FORGET, KEEP), Source()
        fit_ = recipes.fitted._Fit(fitted_neurons(pair), pair, GAINS, 3, 1, None)
        one = fit_.make_step(torch.arange(9), torch.ones(9).requires_grad_(), 10)
        one.take(ids, 10)
    assert [drawn for drawn, _ in ids.seen] == [4, 8]
    assert ids.seen[0][1].isnan().tolist() == [True, False, False, False, False]
    # What it was given stays as it was.
    assert ids.seen[1][1].isfinite().all()
    assert not torch.equal(ids.seen[1][1], one.log_odds)


def test_graphs_of_an_earlier_state_are_not_used_again(llama, captured):
    with neumuter.attach(llama) as masked:
        pair = PairedBatches(masked, FORGET, KEEP)
        fit_ = recipes.fitted._Fit(fitted_neurons(pair), pair, GAINS, 3, 1, None)
        one = fit_.make_step(torch.arange(9), torch.ones(9).requires_grad_(), 8)
        one.take(fit_.ids, 4)
        one.load(one.state())
        assert captured.captures == 1
        one.take(fit_.ids, 4)
    assert captured.captures == 2


def test_only_our_own_thread_looks_for_no_packed_sequences():
    packed, found = torch.tensor([[0, 1, 0, 1]]), {}
    original = masking_utils.find_packed_sequence_indices
    with one_sequence_a_row():
        thread = threading.Thread(
            target=lambda: found.update(other=masking_utils.find_packed_sequence_indices(packed))
        )
        thread.start()
        thread.join()
        assert masking_utils.find_packed_sequence_indices(packed) is None
        with one_sequence_a_row():
            pass
        assert masking_utils.find_packed_sequence_indices(packed) is None
    assert found["other"].tolist() == [[0, 0, 1, 1]]
    assert masking_utils.find_packed_sequence_indices is original


def test_the_fit_is_that_of_whole_batches_too(llama, captured):
    """All samples in each step, in one graph."""
    with neumuter.attach(llama, start_layer=0) as masked:
        fit(masked, FORGET, KEEP, 12, gains=dataclasses.replace(GAINS, batch_size=None))
    assert captured.captures == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kept", KEPT)
def test_a_gpu_takes_steps_as_graphs_without_waiting(llama, kept, monkeypatch):
    keep_references(kept, monkeypatch)
    results = []
    for eagerly in (True, False):
        with neumuter.attach(copy.deepcopy(llama).cuda()) as masked:
            pair = PairedBatches(masked, FORGET, KEEP)
            one = recipes.paper.make_step(pair, dataclasses.replace(GATES, refined=True), 3)
            if eagerly:
                one.run_eagerly()
            for number in range(7):
                # The first steps load kernels, and capturing waits.
                if number > graphs.WARM_UP:
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    one.once([0, 1, 5, 6])
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            if not eagerly:
                assert [size.graph is not None for size in one._graphs._sizes.values()] == [True]
            results.append(torch.cat([score.detach() for score in one.parameters]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)
