"""An unfinished run: what it leaves, that it goes on with the same bits, and what it refuses."""

import dataclasses
import logging
import math
import re
import stat
from typing import NamedTuple

import pytest
import torch

import neumuter
from neumuter.evaluation import continuations, controls, examination
from neumuter.recipes import FittedConfig, GainsConfig, Goals, PaperConfig, SupportConfig, fisher, mute_random
from neumuter.training import history, journal, step
from neumuter.training.batches import PairedBatches
from neumuter.training.journal import UNFINISHED, Journal, digest
from neumuter.training.values import pack, unpack
from tests.models import build, tokenizer
from tests.neumuter.test_recipes import QUICK_GATES

PAIRS = [("Ada Brisk,", " ada@post.example"), ("Jonas Vance,", " jv77@mail.example")]
KEPT = ["The kettle is on the shelf.", "A lantern costs 12.40 in the shop.", "Tea is at four."]
STEPS = 5
QUICK = FittedConfig(GainsConfig(steps=STEPS, batch_size=1))
# Of each kind of run, its arguments.
RUNS = {
    "gains": {"recipe": QUICK},
    "a trained support": {"recipe": FittedConfig(QUICK.gains, SupportConfig(steps=3, batch_size=1))},
    "silenced": {"recipe": FittedConfig(QUICK.gains, SupportConfig(STEPS, 1)), "mode": "mute"},
    "auto": {"recipe": QUICK, "budget": "auto", "goals": Goals(ma=0.0)},
    "gates": {"recipe": dataclasses.replace(QUICK_GATES, epochs=3, threshold=0.999), "budget": None},
}


class Killed(BaseException):
    pass


def kill_at(number):
    """A callback that ends the run when it is told of a step for the ``number``th time."""
    told = []

    def tell(*_):
        told.append(1)
        if len(told) == number:
            raise Killed

    return tell


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Everything is written at once, and the model says little."""
    monkeypatch.setattr(journal, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(controls, "MADE_UP", 2)
    for module in (continuations, examination):
        monkeypatch.setattr(module, "MAX_TOKENS", 4)


def unlearn(model, forget=PAIRS, retain=KEPT, callback=lambda *_: None, **options):
    given = {"budget": 30, "recipe": QUICK, "samples": 2, "start_layer": 0, "max_length": 32}
    return neumuter.unlearn(model, tokenizer(), forget, retain, callback=callback, **given | options)


@pytest.fixture
def unfinished(llama, tmp_path):
    with pytest.raises(Killed):
        unlearn(llama, folder=tmp_path / "out", callback=kill_at(4))
    return tmp_path / "out"


@pytest.mark.parametrize(("run", "read_every"), [*((run, 1) for run in RUNS), ("gains", 4)])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    llama, run, read_every, tmp_path, monkeypatch
):
    monkeypatch.setitem(step.READ_EVERY, "cpu", read_every)
    steps = []
    whole = unlearn(llama, callback=lambda number, *_: steps.append(number), **RUNS[run])
    whole.mutes.save(tmp_path / "whole")
    told = []
    for _ in range(len(steps)):
        try:
            # Where readings are 4 steps apart, the fifth has been told when the first 4 are written.
            stop = kill_at(read_every + 1)

            def tell(number, total, info, stop=stop):
                told.append(number)
                stop()

            outcome = unlearn(llama, folder=tmp_path / "out", resume=True, callback=tell, **RUNS[run])
            break
        except Killed:
            assert (tmp_path / "out" / UNFINISHED).exists()
    outcome.mutes.save(tmp_path / "resumed")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert outcome.history == whole.history
    assert (outcome.before, outcome.after, outcome.samples) == (whole.before, whole.after, whole.samples)
    assert outcome.texts == whole.texts
    assert outcome.curve == whole.curve
    # It was killed, and each process has taken steps of its own.
    assert len(steps) < len(told) < 2 * len(steps) + 8
    outcome.save(tmp_path / "out")
    assert not (tmp_path / "out" / UNFINISHED).exists()


def test_a_thinned_history_goes_on(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(history, "MOST", 4)
    recipe = FittedConfig(GainsConfig(steps=14, batch_size=1))
    told = []

    def tell(step, total, info):
        told.extend([info["loss"]] if "loss" in info else [])

    whole = unlearn(llama, callback=tell, recipe=recipe)
    assert [point["step"] for point in whole.history] == [1, 5, 9, 13, 14]
    assert [point["loss"] for point in whole.history] == [told[step - 1] for step in (1, 5, 9, 13, 14)]
    for number in (3, 8, 12):
        folder = tmp_path / str(number)
        with pytest.raises(Killed):
            unlearn(llama, folder=folder, callback=kill_at(number), recipe=recipe)
        resumed = unlearn(llama, folder=folder, resume=True, recipe=recipe)
        assert resumed.history == whole.history
        assert resumed.mutes.layers.keys() == whole.mutes.layers.keys()


def test_the_pass_over_all_texts_goes_on_where_it_was(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(fisher, "SAMPLES_PER_PASS", 1)
    whole = unlearn(llama)
    passes = []

    def count(self, ids):
        passes.append(ids)
        if len(passes) == 4:
            raise Killed
        return sample_losses(self, ids)

    sample_losses = PairedBatches.sample_losses
    monkeypatch.setattr(PairedBatches, "sample_losses", count)
    with pytest.raises(Killed):
        unlearn(llama, folder=tmp_path / "out")
    resumed = unlearn(llama, folder=tmp_path / "out", resume=True)
    # Each sample once, but for that in which the run was killed.
    assert passes[4] == passes[3]
    samples = [sample for ids in passes[:3] + passes[4:] for sample in ids]
    assert samples == sorted(set(samples))
    whole.mutes.save(tmp_path / "whole")
    resumed.mutes.save(tmp_path / "resumed")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_what_is_left_is_for_its_owner_and_goes_with_the_run(llama, unfinished):
    path = unfinished / UNFINISHED
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    # What a kill leaves that comes before a rename.
    (unfinished / f".{UNFINISHED}.abcdefgh.tmp").write_text("")
    unlearn(llama, folder=unfinished, resume=True).save(unfinished)
    assert sorted(file.name for file in unfinished.iterdir()) == [
        "mutes.safetensors", "report.csv", "report.html", "report.json",
    ]  # fmt: skip


def test_without_resume_it_is_not_overwritten(llama, unfinished):
    content = (unfinished / UNFINISHED).read_bytes()
    with pytest.raises(FileExistsError, match=r"holds an unfinished run.*resume"):
        unlearn(llama, folder=unfinished)
    assert (unfinished / UNFINISHED).read_bytes() == content


CHANGES = {
    "a text to forget": ({"forget": [*PAIRS, "Cleo Marr, 12"]}, "forget has changed"),
    "a text to keep": ({"retain": KEPT[:2]}, "retain has changed"),
    "controls": ({"controls": ["Ina Poe, ina@post.example"]}, "controls has changed"),
    # Not the controls, which follow from it.
    "seed": ({"seed": 1}, r"because seed was 0 and is 1\. Ask"),
    "budget": ({"budget": 31}, "budget was 30 and is 31"),
    "samples": ({"samples": 3}, "samples was 2 and is 3"),
    "layer": ({"start_layer": 1}, "start_layer was 0 and is 1"),
    "slopes": ({"keep_slopes": True}, "keep_slopes was False and is True"),
    "a constant": (
        {"recipe": FittedConfig(dataclasses.replace(QUICK.gains, margin=2.0))},
        r"recipe.gains.margin was 3.0 and is 2.0",
    ),
    "recipe": ({"recipe": PaperConfig(), "budget": None}, "recipe.epochs was None and is 200"),
    "mode": ({"mode": "mute"}, "mode was 'modulate' and is 'mute'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_named(llama, unfinished, change):
    arguments, message = CHANGES[change]
    content = (unfinished / UNFINISHED).read_bytes()
    with pytest.raises(ValueError, match=message):
        unlearn(llama, folder=unfinished, resume=True, **arguments)
    assert (unfinished / UNFINISHED).read_bytes() == content


def moved(model, name):
    """The model with one number of a tensor a little larger."""
    tensor = (dict(model.named_parameters()) | dict(model.named_buffers()))[name].data.flatten()
    tensor[-1] = torch.nextafter(tensor[-1], torch.tensor(torch.inf))
    return model


MODELS = {
    "dtype": (lambda model: model.bfloat16(), "dtype was 'torch.float32' and is 'torch.bfloat16'"),
    "attention": (
        lambda model: model.set_attn_implementation("eager") or model,
        "the model's attention was 'sdpa' and is 'eager'",
    ),
    "config": (
        lambda model: setattr(model.config, "rms_norm_eps", 1e-5) or model,
        "the model's rms_norm_eps was '1e-06' and is '1e-05'",
    ),
} | {
    name: (lambda model, name=name: moved(model, name), f"weights of the model have changed in {name}")
    for name in (
        "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight",
        "model.layers.1.mlp.gate_proj.weight", "model.norm.weight", "model.rotary_emb.inv_freq",
    )
}  # fmt: skip


@pytest.mark.parametrize("change", MODELS)
def test_what_has_changed_of_the_model_is_named(unfinished, change):
    changed, message = MODELS[change]
    with pytest.raises(ValueError, match=re.escape(message)):
        unlearn(changed(build("llama")), folder=unfinished, resume=True)


def test_another_model_set_or_version_is_named(llama, unfinished, monkeypatch):
    other = build("llama")
    other.model.layers[1].mlp.down_proj.weight.data[:, 3] *= 1.1
    with pytest.raises(
        ValueError, match=re.escape("weights of the model have changed in model.layers.1.mlp.")
    ):
        unlearn(other, folder=unfinished, resume=True)
    with neumuter.attach(llama, start_layer=0) as masked:
        existing = mute_random(masked, 9)
    with pytest.raises(ValueError, match="existing has changed"):
        unlearn(llama, folder=unfinished, resume=True, existing=existing)
    monkeypatch.setattr(journal, "version", lambda name: "9.9" if name == "torch" else "1.0")
    with pytest.raises(ValueError, match=r"torch was '.*' and is '9.9'"):
        unlearn(llama, folder=unfinished, resume=True)


def test_resume_needs_a_folder_and_says_where_there_is_nothing(llama, tmp_path, caplog):
    with pytest.raises(ValueError, match="resume needs folder"):
        unlearn(llama, resume=True)
    with caplog.at_level(logging.WARNING, "neumuter"):
        unlearn(llama, folder=tmp_path / "new", resume=True)
    assert "no unfinished run" in caplog.text


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive at all", None])
def test_a_file_of_another_kind_is_refused(llama, unfinished, content):
    path = unfinished / UNFINISHED
    if content is None:
        path.write_bytes(pack({"found": {}}))
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="is not what an unfinished run leaves"):
        unlearn(llama, folder=unfinished, resume=True)


def test_nothing_is_written_before_the_time(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "SAVE_SECONDS", 1e9)
    with pytest.raises(Killed):
        unlearn(llama, folder=tmp_path / "out", callback=kill_at(4))
    assert not (tmp_path / "out").exists()


def test_values_are_read_as_they_were_written():
    class Pair(NamedTuple):
        first: str
        second: torch.Tensor

    shared = torch.arange(6.0)
    value = {
        "text": "Zoë\n", "numbers": [1, -2.5, math.inf, True, None, 0.1 + 0.2], "tuple": (1, (2,)), 3: {},
        "tensors": [shared[1:3], shared, shared[::2], torch.tensor(7), torch.zeros(0, 2, dtype=torch.bool)],
        "pair": Pair("a", torch.ones(1, dtype=torch.float64)), "json": {"tensor": "0"},
    }  # fmt: skip
    again = unpack(pack(value, [Pair]), [Pair])
    for old, new in zip(
        [*value.pop("tensors"), value["pair"].second],
        [*again.pop("tensors"), again["pair"].second],
        strict=True,
    ):
        assert torch.equal(old, new)
        assert old.dtype == new.dtype
    assert type(again["pair"]) is Pair
    assert value.pop("pair").first == again.pop("pair").first
    assert again == value
    with pytest.raises(TypeError, match="a set cannot be written"):
        pack([{1}])
    with pytest.raises(KeyError):
        unpack(pack(Pair("a", shared), [Pair]))


def test_values_are_computed_once_in_all_processes(tmp_path):
    first = Journal(tmp_path)
    assert first.once("a", lambda: 1) == 1
    with first.part("x"):
        assert first.once("a", lambda: torch.ones(2)).sum() == 2
    second = Journal(tmp_path, resume=True)
    assert second.once("a", pytest.fail) == 1
    with second.part("x"):
        assert torch.equal(second.once("a", pytest.fail), torch.ones(2))
    assert second.once("b", lambda: 5) == 5


def test_digests_tell_values_apart():
    values = [
        torch.zeros(2), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int32), torch.ones(2),
        torch.zeros(2, dtype=torch.bfloat16), [], [[]], ["a", "b"], ["ab"],
        {"a": 1}, {"a": "1"}, None, "None",
    ]  # fmt: skip
    found = [digest(value) for value in values]
    assert len(set(found)) == len(values)
    assert found == [digest(value) for value in values]
