import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import neumuter
from neumuter import evaluation, recipes
from neumuter.recipes import fitted
from neumuter.training.batches import PairedBatches
from neumuter.training.losses import hinge_runs, token_losses
from neumuter.training.neurons import Neurons
from neumuter.training.weights import WeightsConfig
from neumuter.types import IGNORED
from tests import models
from tests.models import same

QUICK_SUPPORT = recipes.SupportConfig(steps=30, kl_weight=1.0, batch_size=None)
QUICK_GAINS = recipes.GainsConfig(steps=20, kl_target=0.1, batch_size=None)
QUICK_GATES = recipes.PaperConfig(epochs=150, batch_size=None, lr=0.3, sparsity=0.0, kl_weight=1.0)


def samples(seed, count, tokens=8):
    ids = models.batch(count, tokens, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


FORGET, KEEP = samples(1, 3), samples(2, 5)
# Where references are kept: bytes on the device and in the host's memory.
KEPT = {"device": (1 << 30, 1 << 32), "host": (0, 1 << 32), "nowhere": (0, 0)}


def keep_references(where, monkeypatch):
    for name, size in zip(("DEVICE_BYTES", "HOST_BYTES"), KEPT[where], strict=True):
        monkeypatch.setattr(f"neumuter.training.references.{name}", size)


def memorised(name):
    """A small model that has learnt both batches by heart."""
    model = models.build(name)
    ids = torch.cat([FORGET["input_ids"], KEEP["input_ids"]])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(80):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module", params=["llama", "gpt_neo", "gpt2"])
def model(request):
    return memorised(request.param)


@pytest.fixture(scope="module")
def llama():
    return memorised("llama")


def fit(masked, forget, retain, budget, mode="modulate", support=None, gains=QUICK_GAINS, **options):
    """The fitted recipe on batches."""
    config = recipes.FittedConfig(gains, support)
    return recipes.fit_mutes(PairedBatches(masked, forget, retain), budget, mode, config, **options)


def losses_under(model, mutes):
    with neumuter.mute(model, mutes):
        return tuple(evaluation.mean_token_loss(model, batch) for batch in (FORGET, KEEP))


@pytest.mark.parametrize("mode", ["mute", "modulate"])
def test_forgetting_raises_the_forget_loss_more_than_the_other(model, mode):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = [evaluation.mean_token_loss(model, batch) for batch in (FORGET, KEEP)]
    with neumuter.attach(model, start_layer=0) as masked:
        mutes = fit(masked, FORGET, KEEP, 0.3, mode, QUICK_SUPPORT, QUICK_GAINS)
    assert mutes.mode == mode
    assert mutes.count == int(0.3 * sum(mutes.widths.values()))
    gains = torch.cat([layer.gains for layer in mutes.layers.values()])
    assert (gains == 0).all() if mode == "mute" else gains.unique().numel() > 1
    assert mutes.method["support"]["kl_weight"] == QUICK_SUPPORT.kl_weight
    assert ("gains" in mutes.method) == (mode == "modulate")
    forget, keep = losses_under(model, mutes)
    assert forget - plain[0] > 0.5
    assert forget - plain[0] > 5 * (keep - plain[1])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("name", models.OF_EXPERTS)
def test_models_with_experts_are_fitted(name):
    model = memorised(name)
    plain = evaluation.mean_token_loss(model, FORGET)
    for support, steps in ((None, 60), (QUICK_SUPPORT, 20)):
        with neumuter.attach(model, 0) as masked:
            gains = dataclasses.replace(QUICK_GAINS, steps=steps)
            mutes = fit(masked, FORGET, KEEP, 0.3, "modulate", support, gains)
            reached = {path: score.isfinite() for path, score in masked.scores.items()}
        assert mutes.count == int(0.3 * sum(mutes.widths.values()))
        assert any(masked.seams[path].endswith("experts") for path in mutes.layers)
        for path, layer in mutes.layers.items():
            assert reached[path][layer.indices.long()].all()
        assert losses_under(model, mutes)[0] > plain + 0.5


def test_a_recipe_repeats_itself_and_depends_on_its_seed_alone(llama):
    def run(seed, config=QUICK_SUPPORT):
        torch.rand(3)  # the global generator does not matter
        with neumuter.attach(llama) as masked:
            return fit(masked, FORGET, KEEP, 0.1, "mute", config, seed=seed)

    batched = dataclasses.replace(QUICK_SUPPORT, batch_size=2, steps=4)
    assert same(run(0), run(0))
    assert same(run(0, batched), run(0, batched))
    assert not same(run(0, batched), run(1, batched))


def test_padding_and_a_dropout_mode_change_nothing(llama):
    def padded(batch):
        return {
            key: F.pad(value, (0, 5), value=IGNORED if key == "labels" else 0) for key, value in batch.items()
        }

    config = dataclasses.replace(QUICK_SUPPORT, steps=5)
    with neumuter.attach(llama) as masked:
        plain = fit(masked, FORGET, KEEP, 0.1, "mute", config)
        llama.train()
        other = fit(masked, padded(FORGET), padded(KEEP), 0.1, "mute", config)
        assert llama.training
        llama.eval()
    assert same(plain, other)


def test_progress_counts_through_both_phases(llama):
    seen = []
    with neumuter.attach(llama) as masked:
        fit(
            masked,
            FORGET,
            KEEP,
            20,
            support=dataclasses.replace(QUICK_SUPPORT, steps=3),
            gains=dataclasses.replace(QUICK_GAINS, steps=2),
            callback=lambda step, total, info: seen.append((step, total, info["phase"], info["muted"])),
        )
    share = 20 / (2 * models.WIDTH)
    assert seen == [(i, 5, "support" if i < 4 else "gains", share) for i in range(1, 6)]


def test_modulated_neurons_are_chosen_from_three_times_as_many(llama, monkeypatch):
    seen, tried, moved_gains = [], [], []
    train = fitted._Fit.train

    def watched(self, support, start, steps):
        tried.append(support)
        moved_gains.append(train(self, support, start, steps))
        return moved_gains[-1]

    monkeypatch.setattr(fitted._Fit, "train", watched)
    with neumuter.attach(llama) as masked:
        options = dict(gains=QUICK_GAINS, callback=lambda step, total, info: seen.append(info["muted"]))
        mutes = fit(masked, FORGET, KEEP, 20, **options)
        pair, neurons = PairedBatches(masked, FORGET, KEEP), Neurons(masked)
        candidates = neurons.ids(recipes.propose_by_fisher(pair, 20, times=3.0))
        chosen = neurons.ids(mutes)
        every = neurons.ids(recipes.propose_by_fisher(pair, 1, times=1e9))
    assert (len(candidates), len(chosen), len(every)) == (60, 20, neurons.count)
    assert torch.isin(chosen, candidates).all()
    moved = (moved_gains[0] - 1).abs()
    assert torch.equal(chosen, tried[0][moved.topk(20).indices].sort().values)
    assert moved.topk(20).values.min() > moved.median()
    assert [round(share * neurons.count) for share in seen] == [60] * 7 + [20] * 13
    assert mutes.method["recipe"] == "fisher"
    assert mutes.method["gains"]["margin"] == QUICK_GAINS.margin


@pytest.mark.parametrize(("lr_gains", "moved"), [(2048, 0.1), (60, 0.1), (15, 0.025)])
def test_the_more_gains_there_are_the_less_each_moves_in_a_step(llama, lr_gains, moved):
    config = recipes.GainsConfig(steps=1, lr_gains=lr_gains)
    with neumuter.attach(llama) as masked:
        drawn = recipes.mute_random(masked, 60, seed=0)
        mutes = recipes.fit_gains(PairedBatches(masked, FORGET, KEEP), drawn, config, keep=60)
    gains = torch.cat([layer.gains for layer in mutes.layers.values()])
    # Adam's first step moves each by the whole rate.
    assert (gains - 1).abs().median().item() == pytest.approx(moved, rel=1e-3)


def test_a_search_needs_texts_to_forget(llama):
    with neumuter.attach(llama) as masked:
        pair = PairedBatches(masked, None, KEEP)
        for search in (
            lambda: recipes.fit_mutes(pair, 0.1),
            lambda: recipes.find_support(pair, 0.1),
            lambda: recipes.train_gates(pair),
            lambda: recipes.measure_slopes(pair, recipes.mute_random(masked, 5, seed=0)),
        ):
            with pytest.raises(ValueError, match="pair has no text to forget: only refit_gains"):
                search()


@pytest.mark.parametrize(
    ("kind", "constants", "named"),
    [
        (recipes.GainsConfig, {"steps": 0}, "steps must be an int of at least 1 or None, got 0"),
        (recipes.GainsConfig, {"batch_size": 0}, "batch_size must be an int of at least 1 or None, got 0"),
        (recipes.GainsConfig, {"steps": 2.5}, "steps must be an int"),
        (recipes.GainsConfig, {"choosing": 1.0}, r"choosing in \(0, 1\)"),
        (recipes.GainsConfig, {"lr": 0.0}, "lr must be above 0, got 0.0"),
        (recipes.GainsConfig, {"lr": np.float32(0.1)}, "lr must be a finite float of Python, got"),
        (recipes.GainsConfig, {"lr_gains": 0}, "lr_gains must be an int of at least 1, got 0"),
        (recipes.GainsConfig, {"margin": float("nan")}, "margin must be a finite float"),
        (recipes.GainsConfig, {"margin": None}, "margin must be a finite float"),
        (recipes.GainsConfig, {"gain_range": (2.0, -2.0)}, "gain_range must be a lower and a higher number"),
        (recipes.GainsConfig, {"gain_range": (1.0, 1.0)}, "gain_range must be a lower and a higher number"),
        (recipes.GainsConfig, {"kl_weight_range": (9.0, 1.0)}, "kl_weight_range must be two numbers"),
        (recipes.GainsConfig, {"kl_weight_range": (0.0, 1.0)}, "kl_weight_range must be above 0"),
        (recipes.SupportConfig, {"steps": 0}, "steps must be an int of at least 1 or None, got 0"),
        (recipes.SupportConfig, {"lr": 0.0}, "lr must be above 0"),
        (recipes.PaperConfig, {"epochs": 0}, "epochs must be an int of at least 1, got 0"),
        (recipes.PaperConfig, {"batch_size": True}, "batch_size must be an int of at least 1 or None"),
        (WeightsConfig, {"steps": 0}, "steps must be an int of at least 1, got 0"),
    ],
)
def test_constants_that_would_do_nothing_or_fail_late_are_refused(kind, constants, named):
    with pytest.raises(ValueError, match=named):
        kind(**constants)


@pytest.mark.parametrize(("share", "raised"), [(0.02, 1.0002), (0.1, 1.005), (1.0, 1.5)])
def test_with_all_neurons_more_harm_is_allowed(llama, share, raised, monkeypatch):
    """By the neurons that stay, not by the candidates."""
    seen, train = [], fitted._Fit.train
    monkeypatch.setattr(
        fitted._Fit, "train", lambda fit, *given: seen.append(fit.kl_target) or train(fit, *given)
    )
    config = recipes.FittedConfig(recipes.GainsConfig(steps=3, batch_size=None))
    with neumuter.attach(llama, start_layer=0) as masked:
        mutes = recipes.fit_mutes(PairedBatches(masked, FORGET, KEEP), share, config=config)
    assert mutes.share == pytest.approx(share, abs=0.005)
    assert seen == pytest.approx([raised * config.gains.kl_target] * 2, rel=1e-3)


@pytest.mark.parametrize("mode", ["mute", "modulate"])
def test_a_set_found_next_to_an_existing_one_is_fitted_with_it(llama, mode):
    seen = []
    gains = dataclasses.replace(QUICK_GAINS, lr=1e-9)  # so that the first losses are those of the start
    options = dict(mode=mode, support=dataclasses.replace(QUICK_SUPPORT, steps=2) if mode == "mute" else None)
    with neumuter.attach(llama, start_layer=0) as masked:
        former = recipes.mute_random(masked, 0.3, seed=5)
        second = fit(
            masked, FORGET, KEEP, 0.1, gains=gains, existing=former,
            callback=lambda step, total, info: seen.append(info["forget_loss"]), **options,
        )  # fmt: skip
        neurons = Neurons(masked)
        assert not torch.isin(neurons.ids(second), neurons.ids(former)).any()
        with pytest.raises(ValueError, match="may be selected"):
            fit(masked, FORGET, KEEP, 0.8, mode, existing=former)
    if mode == "modulate":
        assert seen[0] == pytest.approx(losses_under(llama, former)[0], rel=1e-5)
        assert second.method["existing"] == former.method
    else:
        untouched, under = evaluation.mean_token_loss(llama, FORGET), losses_under(llama, former)[0]
        assert under > 2 * untouched
        assert abs(seen[0] - under) < 0.5 * abs(seen[0] - untouched)
    with (
        neumuter.attach(llama, start_layer=1) as masked,
        pytest.raises(ValueError, match="which is not masked here"),
    ):
        fit(masked, FORGET, KEEP, 0.1, mode, existing=former)
    union = neumuter.combine(llama, [former, second])
    assert union.count == former.count + second.count


def ragged(batch, *lengths):
    """The batch with its rows cut to these lengths."""
    shown = torch.arange(batch["labels"].shape[1]) < torch.tensor(lengths)[:, None]
    return {
        "input_ids": batch["input_ids"] * shown,
        "attention_mask": shown.long(),
        "labels": batch["labels"].where(shown, IGNORED),
    }


def test_an_epoch_is_one_pass_over_the_forget_samples(llama):
    """The retain samples come in turn through all epochs, more or fewer than the others."""
    for forget, retain in ((FORGET, KEEP), (KEEP, FORGET)):
        with neumuter.attach(llama) as masked:
            pair = PairedBatches(masked, forget, retain)
        few, many = pair.forget_count, pair.retain_count
        epochs = [pair.epoch(number, 1) for number in range(15)]
        assert all(sorted(first for first, _ in epoch) == list(range(few)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 5
        others = [second - few for epoch in epochs for _, second in epoch]
        rounds = [others[i : i + many] for i in range(0, len(others) - many + 1, many)]
        assert all(sorted(one) == list(range(many)) for one in rounds)
        assert pair.epoch(3, 1) == epochs[3] != pair.epoch(3, 2)


@pytest.mark.parametrize("kept", KEPT)
def test_kl_everywhere_counts_every_token_but_padding(llama, kept, monkeypatch):
    keep_references(kept, monkeypatch)
    keep = ragged(KEEP, 5, 8, 2, 7, 4)
    keep["labels"][:, :2] = IGNORED
    keep["labels"][2, 1] = 7
    with neumuter.attach(llama) as masked:
        pair, masks = (
            PairedBatches(masked, FORGET, keep),
            {p: torch.rand(len(s)) for p, s in masked.scores.items()},
        )
        with torch.no_grad(), masked.applying(masks):
            _, counted = pair.token_losses([0, 3, 4, 5])
            _, everywhere = pair.token_losses([0, 3, 4, 5], everywhere=True)
            q = [
                llama(row[None, :length]).logits[0]
                for row, length in zip(keep["input_ids"], (5, 8, 2), strict=False)
            ]
    p = [
        llama(row[None, :length]).logits[0] for row, length in zip(keep["input_ids"], (5, 8, 2), strict=False)
    ]
    kl = F.kl_div(
        torch.cat(q).log_softmax(-1), torch.cat(p).log_softmax(-1), log_target=True, reduction="none"
    )
    torch.testing.assert_close(everywhere, kl.sum(-1), rtol=1e-4, atol=1e-5)
    assert len(counted) == 3 + 6 + 1 == pair.count_tokens([0, 3, 4, 5])[1]
    assert len(everywhere) == 15 == pair.count_tokens([0, 3, 4, 5], everywhere=True)[1]


def test_gains_stay_in_their_range(llama):
    narrow = dataclasses.replace(QUICK_GAINS, gain_range=(-0.05, 0.05))
    with neumuter.attach(llama) as masked:
        mutes = fit(masked, FORGET, KEEP, 30, "modulate", QUICK_SUPPORT, narrow)
    gains = torch.cat([layer.gains for layer in mutes.layers.values()])
    assert gains.abs().max() == pytest.approx(0.05)
    assert mutes.gain_range == (-0.05, 0.05)


@pytest.mark.parametrize("kept", KEPT)
def test_minibatches_see_their_own_references(llama, kept, monkeypatch):
    """Wherever they are kept, or computed by each step."""
    keep_references(kept, monkeypatch)
    with neumuter.attach(llama) as masked:
        pair = PairedBatches(masked, FORGET, KEEP)
        mask = {path: torch.rand(models.WIDTH) for path in masked.scores}
        with torch.no_grad(), masked.applying(mask):
            losses, kl = pair.losses(list(range(8)))
            parts = [pair.losses([row, 3 + row]) for row in range(3)] + [
                pair.losses([0, 3 + row]) for row in (3, 4)
            ]
        with torch.no_grad(), masked.off():
            assert pair.losses(list(range(8)))[1].abs() < 1e-6
    torch.testing.assert_close(torch.cat([part[0] for part in parts[:3]]), losses)
    torch.testing.assert_close(torch.stack([part[1] for part in parts]).mean(), kl)


def test_nothing_below_the_first_masked_ffn_is_differentiated(llama):
    needed = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: needed.append(output.requires_grad))
        for layer in llama.model.layers
    ]
    with neumuter.attach(llama, start_layer=1) as masked:
        pair = PairedBatches(masked, FORGET, KEEP)
        with masked.evaluating():
            pair.losses([0, 3])
            needed.clear()
            pair.losses([0, 3])
    for hook in hooks:
        hook.remove()
    assert needed == [False, True, True]


def test_every_sample_comes_round_once_before_any_comes_again(llama):
    with neumuter.attach(llama) as masked:
        steps = PairedBatches(masked, FORGET, KEEP).steps(batch_size=1, seed=0)
        drawn = [next(steps) for _ in range(15)]
    assert all(sorted(row[0] for row in drawn[i : i + 3]) == [0, 1, 2] for i in range(0, 15, 3))
    assert all(sorted(row[1] for row in drawn[i : i + 5]) == [3, 4, 5, 6, 7] for i in range(0, 15, 5))


def test_gates_close_where_the_forget_texts_are(llama):
    plain = [evaluation.mean_token_loss(llama, batch) for batch in (FORGET, KEEP)]
    with neumuter.attach(llama, start_layer=0) as masked:
        mutes = recipes.train_gates(PairedBatches(masked, FORGET, KEEP), QUICK_GATES, seed=3)
        closed = sum(int((score.sigmoid() < QUICK_GATES.threshold).sum()) for score in masked.scores.values())
    with neumuter.attach(llama, start_layer=0) as masked:
        again = recipes.train_gates(PairedBatches(masked, FORGET, KEEP), QUICK_GATES, seed=3)
    assert same(mutes, again)
    assert mutes.count == closed
    assert mutes.mode == "mute"
    assert mutes.method["kl_weight"] == 1.0
    forget, keep = losses_under(llama, mutes)
    assert forget - plain[0] > 0.5
    assert forget - plain[0] > 5 * (keep - plain[1])


def test_gates_that_all_stay_open_are_an_error(llama):
    config = dataclasses.replace(QUICK_GATES, epochs=3, sparsity=500.0)
    with neumuter.attach(llama) as masked, pytest.raises(ValueError, match="no neuron"):
        recipes.train_gates(PairedBatches(masked, FORGET, KEEP), config)


def test_random_neurons_are_as_many_as_asked_for(llama):
    with neumuter.attach(llama, start_layer=0) as masked:
        first, second = (recipes.mute_random(masked, 50, seed) for seed in (0, 1))
        assert same(first, recipes.mute_random(masked, 50, 0))
    assert first.count == second.count == 50
    assert not same(first, second)


def test_attribution_takes_the_lowest_gradients_of_the_gates(llama):
    with neumuter.attach(llama) as masked:
        mutes = recipes.mute_by_attribution(masked, FORGET, 5)
        gates = {path: torch.ones_like(score).requires_grad_() for path, score in masked.scores.items()}
        with masked.applying(gates):
            loss = llama(input_ids=FORGET["input_ids"], labels=FORGET["labels"]).loss
        gradient = torch.cat(torch.autograd.grad(loss, list(gates.values())))
        chosen = Neurons(masked).ids(mutes)
    assert chosen.tolist() == sorted(gradient.argsort()[:5].tolist())


BAD = {
    "mode": (dict(mode="erase"), "mode must be"),
    "budget": (dict(budget=1.5), "1.5"),
    "no label": (
        dict(forget_batch=FORGET | {"labels": torch.full((3, 8), IGNORED)}),
        "forget_batch must count",
    ),
    "missing": (
        dict(retain_batch={"input_ids": KEEP["input_ids"]}),
        "retain_batch",
    ),
    "counted padding": (
        dict(forget_batch=FORGET | {"attention_mask": torch.tensor([[1] * 5 + [0] * 3] * 3)}),
        "counts padding",
    ),
    "left padding": (
        dict(forget_batch=FORGET | {"attention_mask": torch.tensor([[0] * 2 + [1] * 6] * 3)}),
        "padded on the right",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(llama, name):
    changes, message = BAD[name]
    given = dict(forget_batch=FORGET, retain_batch=KEEP, budget=0.1, mode="modulate") | changes
    with neumuter.attach(llama) as masked, pytest.raises(ValueError, match=message):
        fit(masked, given["forget_batch"], given["retain_batch"], given["budget"], given["mode"])


def test_propose_by_fisher_is_its_formula():
    model = models.build("llama")
    batches = samples(1, 3), samples(2, 3)
    with neumuter.attach(model) as masked:
        mutes = recipes.propose_by_fisher(PairedBatches(masked, *batches), 10)
        means = []
        for batch, forgotten in zip(batches, (True, False), strict=True):
            total = 0
            for row in range(3):
                masks = {path: torch.ones(models.WIDTH, requires_grad=True) for path in masked.scores}
                with masked.applying(masks):
                    one = batch["input_ids"][row : row + 1]
                    logits = model(one).logits
                losses = token_losses(logits, one)
                unknown, runs = torch.full_like(losses, -torch.inf), torch.arange(len(losses)) // 8
                loss = hinge_runs(losses, unknown, runs, 2.0).mean() if forgotten else losses.mean()
                total = total + torch.cat(torch.autograd.grad(loss, list(masks.values()))).square()
            means.append(total / 3)
    ratio = means[0] / (means[1] + 0.1 * means[1].mean())
    found = [
        i * models.WIDTH + neuron
        for i, path in enumerate(mutes.widths)
        for neuron in (mutes.layers[path].indices.tolist() if path in mutes.layers else [])
    ]
    assert sorted(ratio.topk(10).indices.tolist()) == found
    assert (mutes.mode, mutes.count) == ("mute", 10)


def test_neurons_are_chosen_after_a_step_even_if_there_is_one_alone(llama):
    """Before it, the gains of all candidates are alike."""
    gains = dataclasses.replace(QUICK_GAINS, steps=1)
    with neumuter.attach(llama, start_layer=0) as masked:
        mutes = fit(masked, FORGET, KEEP, 20, gains=gains)
    assert all((layer.gains != 1).all() for layer in mutes.layers.values())
