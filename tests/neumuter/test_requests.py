"""Several requests, one after another: sets beside existing ones, slopes, and gains that are fitted anew."""

import copy

import pytest
import torch

import neumuter
from neumuter.evaluation import mean_token_loss
from neumuter.recipes import FittedConfig, GainsConfig, mute_random
from neumuter.refitting import _is_calibrated
from neumuter.texts import encode
from tests.models import build, same
from tests.neumuter.test_unlearning import KEPT, PAIRS, QUICK, model, outcome, unlearn, words

__all__ = ["model", "outcome", "words"]  # fixtures


def test_an_existing_set_stays_in_force(model, words, outcome):
    second = unlearn(model, words, existing=outcome.mutes)
    assert second.before["forget_loss"] == pytest.approx(outcome.after["forget_loss"], rel=1e-5)
    for path, layer in second.mutes.layers.items():
        if path in outcome.mutes.layers:
            assert not set(layer.indices.tolist()) & set(outcome.mutes.layers[path].indices.tolist())


def test_slopes_make_one_set_of_all_requests(model, words, tmp_path, caplog):
    first = unlearn(model, words, PAIRS[:1], keep_slopes=True, folder=tmp_path / "first")
    assert (tmp_path / "first" / "slopes.safetensors").stat().st_mode & 0o777 == 0o600
    held = unlearn(model, words, PAIRS[1:], existing=first.mutes, former=[first.slopes], keep_slopes=True)
    assert held.mutes.count == 60
    for path, layer in first.mutes.layers.items():
        assert set(layer.indices.tolist()) <= set(held.mutes.layers[path].indices.tolist())
    # What is measured after is the new set alone, in which the old one is.
    with neumuter.mute(model, held.mutes):
        loss = mean_token_loss(model, encode(PAIRS[1:], words, 64))
    assert loss == pytest.approx(held.after["forget_loss"], rel=1e-5)
    held.save(tmp_path / "second")
    files = [tmp_path / name / "slopes.safetensors" for name in ("first", "second")]
    for path in files:
        for prompt, completion in PAIRS:
            assert completion.strip().encode() not in path.read_bytes()
            assert prompt.encode() not in path.read_bytes()
    undone = neumuter.refit(
        model, words, held.mutes, files[1:], files[:1], KEPT,
        samples=2, start_layer=0, recipe=QUICK, callback=lambda *_: None,
    )  # fmt: skip
    assert undone.count == held.mutes.count
    assert not same(undone, held.mutes)
    for both in ({}, {"undone": files[:1], "forget": PAIRS}):
        with pytest.raises(ValueError, match="either undone"):
            neumuter.refit(model, words, held.mutes, **both)
    with pytest.raises(ValueError, match="former needs undone"):
        neumuter.refit(model, words, held.mutes, files, forget=PAIRS)
    # What would be lost or counted twice is said.
    with pytest.raises(ValueError, match="slopes 1 and 2 are the same"):
        neumuter.refit(model, words, held.mutes, files[:1], files[:1], KEPT)
    with pytest.raises(ValueError, match="slopes 2 and 3 are the same"):
        unlearn(model, words, PAIRS[1:], existing=held.mutes, former=[files[1], files[0], first.slopes])
    caplog.clear()
    unlearn(model, words, PAIRS[1:], existing=held.mutes, former=files)
    assert "set holds for" not in caplog.text
    unlearn(model, words, PAIRS[1:], existing=held.mutes, former=files[1:])
    assert "set holds for 2 requests, and there are slopes of 1" in caplog.text
    caplog.clear()
    neumuter.refit(
        model, words, undone, (), files[1:], KEPT,
        samples=2, start_layer=0, recipe=QUICK, callback=lambda *_: None,
    )  # fmt: skip
    assert "set holds for" not in caplog.text
    # A folder holds one outcome: slopes that are no longer its own would be taken for it.
    bare = unlearn(model, words, folder=tmp_path / "second")
    assert bare.slopes is None
    assert not files[1].exists()
    first.save(tmp_path / "second")
    bare.save(tmp_path / "second")
    assert not files[1].exists()


def test_what_a_request_reads_it_does_not_replace(model, words, outcome, tmp_path):
    outcome.save(tmp_path)
    file = tmp_path / "mutes.safetensors"
    content = file.read_bytes()
    for given in (file, str(file), tmp_path / "." / file.name):
        with pytest.raises(ValueError, match=r"existing .* would be replaced: name another folder"):
            unlearn(model, words, existing=given, folder=tmp_path)
    slopes = tmp_path / "slopes.safetensors"
    with pytest.raises(ValueError, match=r"former .* would be replaced: name another folder"):
        unlearn(model, words, existing=outcome.mutes, former=[slopes], folder=str(tmp_path))
    assert file.read_bytes() == content
    with pytest.raises(TypeError, match="former must be a list of slopes or of their files, got"):
        unlearn(model, words, existing=outcome.mutes, former=slopes, folder=tmp_path)


def test_an_existing_set_of_other_layers_is_refused_before_anything_is_measured(model, words, monkeypatch):
    first = unlearn(model, words, start_layer=0, budget=1.0)
    monkeypatch.setattr("neumuter.unlearning.Job", None)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp, which is not masked here"):
        unlearn(model, words, start_layer=1, existing=first.mutes)


@pytest.mark.parametrize("parts", [2, 1])
def test_a_combined_set_is_calibrated_if_a_part_is(parts):
    calibrated, plain = {"recipe": "fisher", "calibrated": True}, {"recipe": "fisher"}
    combined = {"combined": [plain, {"combined": [calibrated]}][:parts]}
    assert _is_calibrated({"from": combined, "subtracted": calibrated}) == (parts == 2)


def test_a_set_moves_to_a_new_version_of_the_model(model, words):
    """The old set is refused there; the refitted one starts from it, and forgets what it forgot."""
    old = unlearn(model, words, budget=60).mutes
    newer = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in newer.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    with pytest.raises(neumuter.MuteMismatchError):
        neumuter.mute(newer, old)
    options = {"samples": 2, "start_layer": 0, "callback": lambda *_: None}
    still = FittedConfig(GainsConfig(steps=1, lr=1e-9))
    moved = neumuter.refit(newer, words, old, retain=KEPT, forget=PAIRS, recipe=still, **options)
    for path, layer in old.layers.items():
        assert torch.equal(moved.layers[path].indices, layer.indices)
        assert torch.allclose(moved.layers[path].gains, layer.gains, atol=1e-6)
    fitted = neumuter.refit(newer, words, old, retain=KEPT, forget=PAIRS, recipe=QUICK, **options)
    batch = encode(PAIRS, words, 64)
    losses = []
    for mutes in (moved, fitted):
        with neumuter.mute(newer, mutes):
            losses.append(mean_token_loss(newer, batch))
    assert losses[1] > losses[0]
    with pytest.raises(ValueError, match="among the texts to keep"):
        neumuter.refit(newer, words, old, retain=PAIRS, forget=PAIRS, **options)
    with pytest.raises(neumuter.MuteMismatchError, match="class"):
        neumuter.refit(build("gpt2"), words, old, retain=KEPT, forget=PAIRS, **options)


def test_slopes_of_another_model_are_refused(model, words):
    slopes = unlearn(model, words, PAIRS[:1], keep_slopes=True)
    other = build("llama")
    with pytest.raises(neumuter.MuteMismatchError):
        unlearn(other, words, PAIRS[1:], existing=slopes.mutes, former=[slopes.slopes])
    with neumuter.attach(other, start_layer=0) as masked:
        own = mute_random(masked, 0.1)
    for call in (
        lambda: unlearn(other, words, PAIRS[1:], existing=own, former=[slopes.slopes]),
        lambda: neumuter.refit(other, words, own, [], [slopes.slopes], KEPT),
    ):
        with pytest.raises(neumuter.MuteMismatchError, match="down projection"):
            call()
