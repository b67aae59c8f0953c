"""attach, the gates, selection and detach, on each family of FFNs."""

import functools

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import neumuter
from neumuter.training.gates import INITIAL_SCORE
from neumuter.training.selection import neuron_count
from tests.models import SMALL, WIDTH, batch, build, build_double, randomise

DTYPES = [torch.float32, torch.bfloat16]
every_family = pytest.mark.parametrize("name", SMALL)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def loss_of(model, ids):
    return model(ids, labels=ids).loss


@every_family
def test_initial_gates_are_open(name):
    model, ids = build_double(name), batch()
    expected = model(ids).logits
    with neumuter.attach(model) as masked, masked.evaluating():
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


@every_family
@every_dtype
def test_detach_restores_objects_and_flags(name, dtype):
    model = build(name, dtype)
    next(model.parameters()).requires_grad_(False)
    before = dict(model.named_modules())
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    masked = neumuter.attach(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(a is b for a, b in zip(trained, masked.scores.values(), strict=True))
    model.train()
    masked.detach()
    masked.detach()
    after = dict(model.named_modules())
    assert list(after) == list(before)
    assert all(after[key] is module for key, module in before.items())
    assert all(module.training for module in after.values())
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    with pytest.raises(RuntimeError, match="detached"), masked.evaluating():
        pass


def test_detach_restores_flags_through_wrappers():
    """They change the names of what they are put around, and only that."""
    model = build("llama")
    frozen = model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    with neumuter.attach(model, start_layer=0):
        for number, layer in enumerate(model.model.layers):
            wrap = functools.partial(torch.compile, backend="eager") if number else checkpoint_wrapper
            model.model.layers[number] = wrap(layer)
    assert not frozen.requires_grad
    assert all(parameter.requires_grad for parameter in model.parameters() if parameter is not frozen)


def test_gates_differ_per_sample_and_do_not_depend_on_the_split():
    model, ids = build("llama").double(), batch(1).repeat(4, 1)
    with neumuter.attach(model) as masked, torch.no_grad():
        randomise(masked)
        samples = torch.tensor([7, 3, 11, 2**33 + 5])
        with masked.sampling(1, 0, samples):
            together = model(ids).logits
        assert len({row.sum().item() for row in together}) == 4
        for order in ([2], [0, 3], [3, 1, 0]):
            with masked.sampling(1, 0, samples[order]):
                torch.testing.assert_close(model(ids[order]).logits, together[order])
        with masked.sampling(1, 1, samples):
            assert not torch.allclose(model(ids).logits, together)


def test_layers_draw_different_noise():
    with neumuter.attach(build("llama")) as masked, masked.sampling(1, 0, torch.arange(2)):
        first, second = (g.mask(torch.zeros(2, 3, 32)).values for g in masked._installed.gates)
        assert (first != second).float().mean() > 0.3


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = build("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with neumuter.attach(model) as masked:
            randomise(masked)
            with masked.sampling(0, 4, torch.arange(4)):
                loss_of(model, batch()).backward()
            gradients.append([score.grad for score in masked.scores.values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_family
def test_applying_explicit_masks(name):
    model, ids = build_double(name), batch()
    expected = model(ids).logits
    with neumuter.attach(model, start_layer=0) as masked:
        path = list(masked.scores)[1]
        masks = torch.rand(4, len(masked.scores[path]), requires_grad=True)
        with masked.applying({path: masks}):
            together = model(ids).logits
        together.sum().backward()
        assert (masks.grad.abs().sum(1) > 0).all()
        for row in range(4):
            with masked.applying({path: masks[row].detach()}):
                torch.testing.assert_close(model(ids[row : row + 1]).logits[0], together[row])
        with masked.applying({}):
            assert torch.equal(model(ids).logits, expected)


def test_contexts_nest_and_survive_exceptions():
    model, ids = build("gpt2"), batch()
    with neumuter.attach(model) as masked, torch.no_grad():
        randomise(masked)
        plain = model(ids).logits
        with masked.evaluating():
            gated = model(ids).logits
            with pytest.raises(KeyError), masked.sampling(0, 0, torch.arange(4)):
                raise KeyError
            assert torch.equal(model(ids).logits, gated)
        assert torch.equal(model(ids).logits, plain)


def test_scores_stay_float32_when_the_model_is_moved():
    model = build("llama")
    with neumuter.attach(model) as masked:
        score = next(iter(masked.scores.values()))
        with torch.no_grad():
            score.fill_(1.0000001)
        model.to(torch.bfloat16)
        assert next(iter(masked.scores.values())) is score
        assert score.dtype == torch.float32
        assert (score == torch.tensor(1.0000001)).all()
        with masked.sampling(0, 0, torch.arange(4)):
            assert model(batch()).logits.dtype == torch.bfloat16


def test_wrong_batch_size_is_named():
    model = build("llama")
    with neumuter.attach(model) as masked:
        with masked.sampling(0, 0, torch.arange(2)), pytest.raises(ValueError, match="sample_ids has 2 rows"):
            model(batch(4))
        with masked.sampling(0, 0, torch.arange(1)), pytest.raises(ValueError, match="sample_ids has 1 rows"):
            model(batch(4))
        path = next(iter(masked.scores))
        with masked.applying({path: torch.ones(3, WIDTH)}), pytest.raises(ValueError, match="3 rows"):
            model(batch(4))


@pytest.mark.parametrize(
    "ids", [torch.zeros(0, dtype=torch.int64), torch.zeros(2), torch.zeros(2, 2, dtype=torch.int64)]
)
def test_bad_sample_ids(ids):
    with (
        neumuter.attach(build("llama")) as masked,
        pytest.raises(ValueError, match="sample_ids must be int64"),
    ):
        masked.sampling(0, 0, ids)


def test_bad_masks():
    with neumuter.attach(build("llama")) as masked:
        path = next(iter(masked.scores))
        with pytest.raises(ValueError, match="not an attached FFN"):
            masked.applying({"model.layers.0.mlp": torch.ones(WIDTH)})
        for mask in (torch.ones(WIDTH + 1), torch.ones(WIDTH).double(), torch.ones(1, 1, WIDTH)):
            with pytest.raises(ValueError, match=f"the mask of {path} must be float32"):
                masked.applying({path: mask})


def test_attach_twice_is_refused():
    model = build("llama")
    with neumuter.attach(model), pytest.raises(RuntimeError, match="attached or muted"):
        neumuter.attach(model)
    neumuter.attach(model).detach()


@pytest.mark.parametrize("start_layer", [-1, 3, 1.0, True])
def test_bad_start_layer(start_layer):
    with pytest.raises(ValueError, match="start_layer must be an int from 0 to 2"):
        neumuter.attach(build("llama"), start_layer)


def test_start_layer_counts_ffns():
    for start in range(3):
        with neumuter.attach(build("gpt_neo"), start) as masked:
            assert list(masked.scores) == [f"transformer.h.{i}.mlp" for i in range(start, 3)]
            assert all((s == INITIAL_SCORE).all() and len(s) == WIDTH for s in masked.scores.values())


def lower(masked, neurons, score=-9.0):
    with torch.no_grad():
        for path, indices in neurons.items():
            masked.scores[path][indices] = score


def test_select_takes_the_lowest_scores():
    neurons = {"model.layers.1.mlp": [4, 70], "model.layers.2.mlp": [0, 1, 33]}
    with neumuter.attach(build("llama")) as masked:
        lower(masked, neurons)
        for arguments in ({"budget": 5}, {"budget": 5 / (2 * WIDTH)}, {"threshold": 0.15}):
            mutes = masked.select(**arguments)
            assert {path: layer.indices.tolist() for path, layer in mutes.layers.items()} == neurons
            assert all((layer.gains == 0).all() for layer in mutes.layers.values())
            assert (mutes.count, mutes.share, mutes.mode) == (5, 5 / (2 * WIDTH), "mute")
            assert mutes.method["selection"] == arguments
        lower(masked, {"model.layers.2.mlp": [9]}, score=0.0)
        mutes = masked.select(threshold=0.6)
        assert mutes.layers["model.layers.2.mlp"].gains.tolist() == [0, 0, 0.5, 0]
        assert list(masked.select(budget=2).widths) == list(masked.scores)


def test_select_says_what_is_wrong():
    with neumuter.attach(build("llama")) as masked:
        with pytest.raises(ValueError, match=r"no neuron has σ\(score\) below 0.15; the lowest is 0.917"):
            masked.select(threshold=0.15)
        with pytest.raises(ValueError, match="train the scores first"):
            masked.select(budget=3)
        for arguments in ({}, {"budget": 1, "threshold": 0.1}):
            with pytest.raises(ValueError, match="either budget or threshold"):
                masked.select(**arguments)
        for budget in (0, 0.0, 1.5, -1, 2 * WIDTH + 1, True, "3"):
            with pytest.raises((TypeError, ValueError), match="budget"):
                masked.select(budget=budget)
        for threshold in (0.0, 1.0, 2, float("nan")):
            with pytest.raises(ValueError, match="threshold must be"):
                masked.select(threshold=threshold)
        lower(masked, {"model.layers.1.mlp": [3]}, float("nan"))
        with pytest.raises(ValueError, match=r"model.layers.1.mlp hold NaN"):
            masked.select(budget=3)


def test_neuron_count():
    assert [neuron_count(b, 100) for b in (0.29, 0.001, 1.0, 1, 100)] == [29, 1, 100, 1, 100]


def test_mute_set_of_explicit_neurons():
    with neumuter.attach(build("llama")) as masked:
        neurons = {"model.layers.1.mlp": ([], []), "model.layers.2.mlp": ([3, 9], [-1.5, 2.0])}
        mutes = masked.mute_set(neurons, mode="modulate", gain_range=(-2, 2), method={"eta": 5}, seed=7)
        assert list(mutes.layers) == ["model.layers.2.mlp"]
        assert mutes.layers["model.layers.2.mlp"].gains.tolist() == [-1.5, 2.0]
        assert (mutes.mode, mutes.gain_range, mutes.method, mutes.seed) == (
            "modulate",
            (-2, 2),
            {"eta": 5},
            7,
        )
        for neurons, message in (
            ({"model.layers.2.mlp": ([9, 3], [0, 0])}, "must ascend"),
            ({"model.layers.2.mlp": ([WIDTH], [0])}, "must ascend within"),
            ({"model.layers.2.mlp": ([1], [2.5])}, "gains must be finite and lie within -2.0 to 2.0"),
            ({"model.layers.0.mlp": ([1], [0])}, "not an attached FFN"),
            ({}, "no neuron is muted"),
        ):
            with pytest.raises(ValueError, match=message):
                masked.mute_set(neurons, mode="modulate", gain_range=(-2, 2))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_noise_everywhere_reaches_the_ffns_before_the_first_masked_one(name):
    """As gates on all FFNs would give it, of which those before cannot be trained and go with the handle."""
    model, ids, samples = build(name), batch(), torch.arange(4)
    plain = model(ids).logits
    with neumuter.attach(model, start_layer=0) as every, every.sampling(3, 1, samples):
        expected = model(ids).logits
    with neumuter.attach(model, start_layer=2) as masked:
        with masked.sampling(3, 1, samples):
            assert not torch.allclose(model(ids).logits, expected)
        with masked.sampling(3, 1, samples, everywhere=True):
            noisy = model(ids).logits
            assert torch.equal(noisy, expected)
            with masked.off():
                assert torch.equal(model(ids).logits, plain)
            with masked.sampling(3, 1, samples):
                assert not torch.allclose(model(ids).logits, expected)
        noisy.sum().backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert len(trained) == len(masked.scores) == 1
        assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model(ids).logits, plain)
    assert not any("neumuter" in name for name, _ in model.named_modules())
    with pytest.raises(RuntimeError, match="detached"), masked.sampling(3, 1, samples, everywhere=True):
        pass
