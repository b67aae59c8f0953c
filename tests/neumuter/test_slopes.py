"""Slopes: what they say of the forgotten tokens, that they hold them down, and their file."""

import dataclasses
import json

import pytest
import torch

import neumuter
from neumuter import recipes
from neumuter.mutes.slopes import Slopes
from neumuter.recipes.slopes import Held
from neumuter.training.batches import PairedBatches
from neumuter.training.losses import begin_runs, log_odds, sum_runs
from neumuter.training.neurons import Neurons
from tests.neumuter.test_mute_set import join, split
from tests.neumuter.test_recipes import FORGET, KEEP, QUICK_GAINS, llama, same, samples

__all__ = ["llama"]  # a fixture
MORE = samples(9, 2)


def part(batch, rows):
    return {key: value[rows] for key, value in batch.items()}


def odds_at(pair, neurons, gates):
    """The log-odds of all runs of the texts to forget."""
    with torch.no_grad(), pair.masked.applying(neurons.by_layer(gates)):
        found = []
        for sample, of_sample in enumerate(pair.sample_losses(range(pair.forget_count))):
            runs = pair.runs_of(sample)
            found.append(log_odds(sum_runs(of_sample, runs))[begin_runs(runs)])
        return torch.cat(found)


@pytest.fixture
def attached(llama, monkeypatch):
    # So that each of three texts has three runs.
    monkeypatch.setattr("neumuter.training.losses.LONGEST_RUN", 3)
    with neumuter.attach(llama, start_layer=0) as masked:
        yield masked


def test_slopes_are_derivatives_of_the_log_odds_under_the_mutes(attached):
    pair, mutes = PairedBatches(attached, FORGET, KEEP), recipes.mute_random(attached, 0.2, seed=3)
    slopes, neurons = recipes.measure_slopes(pair, mutes), Neurons(attached, mutes)
    assert len(slopes.log_odds) == 9
    torch.testing.assert_close(slopes.log_odds, odds_at(pair, neurons, neurons.start))
    ids = neurons.places(slopes.at)
    # The file has room for more neurons than the model has.
    assert len(ids) == neurons.count
    assert torch.equal(torch.cat([layer.gains for layer in slopes.at.layers.values()]), neurons.start[ids])
    direction = torch.randn(neurons.count, generator=torch.Generator().manual_seed(0))
    up, down = (odds_at(pair, neurons, neurons.start + sign * 1e-3 * direction) for sign in (1, -1))
    expected, found = (up - down) / 2e-3, slopes.values @ direction[ids]
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_a_file_has_a_size_and_the_steepest_neurons(attached, monkeypatch, tmp_path):
    pair, mutes = PairedBatches(attached, FORGET, KEEP), recipes.mute_random(attached, 0.2, seed=3)
    every = recipes.measure_slopes(pair, mutes)
    monkeypatch.setattr("neumuter.recipes.slopes.BYTES_PER_TEXT", 400)
    few, neurons = recipes.measure_slopes(pair, mutes), Neurons(attached)
    assert few.at.count == 3 * 400 // (9 + 8)
    steepness = torch.zeros(neurons.count)
    steepness[neurons.places(every.at)] = every.values.square().sum(0)
    # Rounding may exchange the last ones.
    assert steepness[neurons.ids(few.at)].sum() > 0.99 * steepness.topk(few.at.count).values.sum()
    few.save(tmp_path / "few")
    header, _ = split((tmp_path / "few").read_bytes())
    tensors = [about for name, about in header.items() if name != "__metadata__"]
    assert max(about["data_offsets"][1] for about in tensors) <= 3 * 400 + 4 * 4 * 9


def test_a_file_is_no_larger_than_can_be_read(attached, monkeypatch, tmp_path):
    pair, mutes = PairedBatches(attached, FORGET, KEEP), recipes.mute_random(attached, 0.2, seed=3)
    monkeypatch.setattr("neumuter.recipes.slopes.MAX_FILE_BYTES", 600)
    few = recipes.measure_slopes(pair, mutes)
    assert few.at.count == 600 // 2 // (9 + 8)
    monkeypatch.setattr("neumuter.mutes.container.MAX_FILE_BYTES", 600)
    with pytest.raises(ValueError, match="could not be read again: 600 are the most"):
        few.save(tmp_path / "few")
    assert not list(tmp_path.iterdir())


def test_held_tokens_cost_their_linear_hinge(attached):
    pair, mutes = PairedBatches(attached, FORGET, KEEP), recipes.mute_random(attached, 0.2, seed=3)
    other = recipes.mute_random(attached, 0.3, seed=4)
    former = [
        recipes.measure_slopes(pair, mutes),
        recipes.measure_slopes(PairedBatches(attached, MORE, KEEP), other),
    ]
    neurons = Neurons(attached, mutes)
    support = torch.randperm(neurons.count, generator=torch.Generator().manual_seed(1))[:50]
    start, gains = torch.rand(2, 50, generator=torch.Generator().manual_seed(2))
    held = Held(former, neurons, support, start, 1.5)
    gates = neurons.start.index_put((support,), gains)
    expected = 0.0
    for slopes, then in zip(former, (mutes, other), strict=True):
        moved = (gates - Neurons(attached, then).start)[neurons.places(slopes.at)]
        left = (1.5 + slopes.log_odds + slopes.values @ moved).relu()
        expected += (slopes.weights * left).sum()
    torch.testing.assert_close(held(gains), expected)


def test_slopes_are_of_what_is_to_be_forgotten_alone(attached, caplog):
    """Of a run as a whole, whose tokens may stay likely behind the ones before; and of no wording."""
    ceilings = torch.full(FORGET["labels"].shape, torch.inf)
    ceilings[0, 3:6], ceilings[1, 4] = torch.tensor([-2.0, -1.0, -3.0]), -torch.inf
    pair, mutes = PairedBatches(attached, FORGET, KEEP, ceilings), recipes.mute_random(attached, 0.2, seed=3)
    slopes, neurons = recipes.measure_slopes(pair, mutes), Neurons(attached, mutes)
    assert slopes.weights.tolist() == pytest.approx([3 / 21, 1 / 21])
    allowed = ceilings[0, 3:6].sigmoid().prod().logit()
    assert slopes.ceilings.tolist() == pytest.approx([max(-7.0, allowed.item()), -torch.inf])

    def odds(gates):
        with torch.no_grad(), pair.masked.applying(neurons.by_layer(gates)):
            first, second = pair.sample_losses([0, 1])
        return log_odds(torch.stack([first[2:5].sum(), second[3]]))

    torch.testing.assert_close(slopes.log_odds, odds(neurons.start))
    ids = neurons.places(slopes.at)
    direction = torch.randn(neurons.count, generator=torch.Generator().manual_seed(0))
    expected = (odds(neurons.start + 1e-3 * direction) - odds(neurons.start - 1e-3 * direction)) / 2e-3
    torch.testing.assert_close(slopes.values @ direction[ids], expected, rtol=0.05, atol=0.05)
    # Each is held down to its own ceiling, and the one without to the margin.
    held = Held([slopes], neurons, neurons.ids(mutes), neurons.start[neurons.ids(mutes)], 1.5)
    ends = torch.tensor([slopes.ceilings[0], -1.5])
    cost = (slopes.weights * (slopes.log_odds - ends).relu()).sum()
    torch.testing.assert_close(held(held.start), cost)
    raised = Held([slopes], neurons, neurons.ids(mutes), held.start, 1.5, sign=-1)
    torch.testing.assert_close(raised(held.start), (slopes.weights * (1.5 - slopes.log_odds).relu()).sum())
    nothing = PairedBatches(attached, FORGET, KEEP, torch.full_like(ceilings, torch.inf))
    assert recipes.measure_slopes(nothing, mutes) is None
    assert "No token is to be forgotten" in caplog.text


@pytest.fixture
def token_wise(monkeypatch):
    """Every token is a run, so that more of them can come back."""
    monkeypatch.setattr("neumuter.training.losses.LONGEST_RUN", 1)


def test_an_earlier_request_stays_forgotten(llama, token_wise):
    """With the existing set alone, its texts come back as far as the new gains lead."""
    first, second = part(FORGET, [0]), part(FORGET, [1])
    config = recipes.FittedConfig(dataclasses.replace(QUICK_GAINS, steps=40))
    with neumuter.attach(llama, start_layer=0) as masked:
        pair = PairedBatches(masked, first, KEEP)
        one = recipes.fit_mutes(pair, 20, config=config)
        slopes = recipes.measure_slopes(pair, one)
        then = PairedBatches(masked, second, KEEP)
        beside = recipes.fit_mutes(then, 20, config=config, existing=one)
        held = recipes.fit_mutes(then, 20, config=config, existing=one, former=[slopes])
        neurons = Neurons(masked)
        odds = {
            name: odds_at(pair, neurons, torch.cat(list(Neurons(masked, under).masks(extra).values())))
            for name, under, extra in (("then", None, one), ("beside", one, beside), ("held", None, held))
        }
        assert held.count == 40
        assert torch.isin(neurons.ids(one), neurons.ids(held)).all()
    assert held.method["former"] == 1
    assert not same(held, beside)
    assert odds["held"].clamp(min=-1).mean() < odds["beside"].clamp(min=-1).mean() - 0.1
    with neumuter.attach(llama, start_layer=0) as masked, pytest.raises(ValueError, match="former needs"):
        recipes.fit_mutes(PairedBatches(masked, second, KEEP), 20, "mute", existing=one, former=[slopes])


def test_a_request_is_undone_from_slopes_alone(llama, token_wise):
    """Its tokens come back, those of the other request do not, and no text of either is at hand."""
    config = recipes.FittedConfig(dataclasses.replace(QUICK_GAINS, steps=40))
    with neumuter.attach(llama, start_layer=0) as masked:
        pairs = [PairedBatches(masked, part(FORGET, [row]), KEEP) for row in (0, 1)]
        mutes, known = None, []
        for pair in pairs:
            mutes = recipes.fit_mutes(pair, 20, config=config, existing=mutes, former=known)
            known.append(recipes.measure_slopes(pair, mutes))
        refitted = recipes.refit_gains(
            PairedBatches(masked, None, KEEP), mutes, known[1:], known[:1], config.gains
        )
        assert refitted.method["undone"] == refitted.method["former"] == 1
        neurons = Neurons(masked)
        assert torch.equal(neurons.ids(refitted), neurons.ids(mutes))
        (old, kept), (new, held) = (
            [odds_at(pair, neurons, Neurons(masked, under).start).mean() for pair in pairs]
            for under in (mutes, refitted)
        )
    assert new > old + 0.5
    assert held - kept < 0.2 * (new - old)


@pytest.fixture
def saved(attached, tmp_path):
    pair, mutes = PairedBatches(attached, FORGET, KEEP), recipes.mute_random(attached, 0.2, seed=3)
    slopes = recipes.measure_slopes(pair, mutes)
    slopes.save(tmp_path / "slopes.safetensors")
    return slopes, tmp_path / "slopes.safetensors"


def test_a_file_of_slopes_is_private_and_read_back(saved):
    slopes, path = saved
    assert path.stat().st_mode & 0o777 == 0o600
    again = Slopes.load(path)
    assert same(again.at, slopes.at)
    for name in ("log_odds", "ceilings", "weights", "scales", "steps"):
        assert torch.equal(getattr(again, name), getattr(slopes, name))
    first = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first


def test_mute_files_and_slopes_are_not_taken_for_each_other(saved, tmp_path):
    slopes, path = saved
    with pytest.raises(neumuter.MuteFileError, match=r"not a valid mute file: .*no entry 'neumuter'"):
        neumuter.MuteSet.load(path)
    slopes.at.save(tmp_path / "mutes")
    with pytest.raises(neumuter.MuteFileError, match=r"not a valid file of slopes: .*no entry"):
        Slopes.load(tmp_path / "mutes")


def _renamed(header, data):
    header["scale"] = header.pop("scales")


def _tensor(name, value):
    def change(header, data):
        start = header[name]["data_offsets"][0]
        size = {"F32": 4, "I8": 1}[header[name]["dtype"]]
        data[start : start + size] = torch.tensor([value]).numpy().tobytes()[:size]

    return change


def _version(header, data):
    about = json.loads(header["__metadata__"]["neumuter-slopes"])
    header["__metadata__"]["neumuter-slopes"] = json.dumps(about | {"format": 9})


DAMAGE = {
    "an unknown tensor": (_renamed, "do not agree"),
    "NaN log-odds": (_tensor("log_odds", float("nan")), "log_odds must lie"),
    "a ceiling that is NaN": (_tensor("ceilings", float("nan")), "ceilings must be at most"),
    "a weight of more than all": (_tensor("weights", 1.5), "weights must lie"),
    "no scale": (_tensor("scales", 0.0), "scales must be positive"),
    "an infinite scale": (_tensor("scales", float("inf")), "scales must be positive"),
    "another version": (_version, "format version 9"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_slopes_are_refused(saved, name):
    _, path = saved
    change, message = DAMAGE[name]
    header, data = split(path.read_bytes())
    data = bytearray(data)
    change(header, data)
    path.write_bytes(join(header, bytes(data)))
    with pytest.raises(neumuter.MuteFileError, match=message):
        Slopes.load(path)


def test_slopes_of_other_shapes_are_refused(saved):
    slopes, _ = saved
    for name, value in (
        ("steps", slopes.steps[:, 1:]),
        ("scales", slopes.scales.double()),
        ("weights", slopes.weights[1:]),
        ("log_odds", slopes.log_odds[:0]),
    ):
        with pytest.raises(ValueError, match=r"must be torch|there is no token"):
            dataclasses.replace(slopes, **{name: value})
