"""NeuMuter inside transformers' Trainer."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import HfArgumentParser, TrainerCallback

from neumuter import NeuMuterConfig, NeuMuterTrainer
from neumuter.recipes import PaperConfig, train_gates
from neumuter.recipes.trainer import last_checkpoint
from neumuter.training.batches import PairedBatches
from neumuter.training.masked import attach
from tests import models
from tests.neumuter.launching import FORKS
from tests.neumuter.test_training_step import OnePlace


def text_batch(seed, samples=4, ragged=False):
    ids = models.batch(samples, 9, seed)
    lengths = torch.tensor([9 - 4 * i % 7 if ragged else 9 for i in range(samples)])[:, None]
    shown = torch.arange(9) < lengths
    return {"input_ids": ids, "attention_mask": shown.long(), "labels": ids.where(shown, -100)}


def make(folder, name="llama", batches=None, **changes):
    options = dict(
        num_train_epochs=3, sparsity=2.0, stop_loss=50.0, per_device_train_batch_size=4, report_to=[],
        budget=20, save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True, seed=5,
    )  # fmt: skip
    config = NeuMuterConfig(output_dir=str(folder), **options | changes)
    return NeuMuterTrainer(models.build(name), config, *(batches or (text_batch(1), text_batch(2))))


def assert_same_scores(first, second, tolerance=1e-4):
    for path, score in first.masked.full_scores().items():
        torch.testing.assert_close(score, second.masked.full_scores()[path], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize(("forget", "retain", "size"), [(4, 4, 4), (5, 3, 2), (3, 7, 1)])
def test_it_trains_what_the_recipe_trains(forget, retain, size, refined, tmp_path):
    """Step for step: an epoch is one pass over the forget samples, however many there are to retain."""
    batches = text_batch(1, forget, ragged=True), text_batch(2, retain, ragged=True)
    trainer = make(tmp_path, batches=batches, per_device_train_batch_size=size, refined=refined)
    trainer.train()
    assert trainer.state.global_step == 3 * -(-forget // size)
    config = PaperConfig(3, size, sparsity=2.0, stop_loss=50.0, threshold=0.95, refined=refined)
    with attach(models.build("llama")) as masked:
        train_gates(PairedBatches(masked, *batches), config, seed=5)
        for path, score in masked.full_scores().items():
            torch.testing.assert_close(trainer.masked.full_scores()[path], score, rtol=1e-4, atol=1e-4)
    mutes = trainer.mute_set()
    assert (mutes.count, mutes.seed, mutes.method["recipe"]) == (20, 5, "paper")
    assert mutes.method["refined"] is refined
    logged = [entry for entry in trainer.state.log_history if "forget_loss" in entry]
    assert len(logged) == trainer.state.global_step


@pytest.mark.parametrize(("size", "batches"), [(2, 2), (1, 4)])
def test_accumulation_is_one_step(size, batches, tmp_path):
    """Also of texts of different lengths, at the end of an epoch, and where one batch alone would ascend."""
    given = text_batch(1, 7, ragged=True), text_batch(2, 5, ragged=True)
    # Plain gradient descent does not hide the size of a gradient, as Adam does.
    options = dict(batches=given, num_train_epochs=2, optim="sgd", sparsity=50.0, stop_loss=5.25)
    whole = make(tmp_path, **options)
    parts = make(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=batches, **options)
    for trainer in (whole, parts):
        trainer.train()
        assert trainer.state.global_step == 4
    logged, other = (
        [entry for entry in trainer.state.log_history if "forget_loss" in entry] for trainer in (whole, parts)
    )
    assert {entry["forget_loss"] > 5.25 for entry in logged} == {True, False}
    for first, second in zip(logged, other, strict=True):
        for name in ("loss", "forget_loss", "kl", "muted"):
            assert first[name] == pytest.approx(second[name], rel=1e-4)
    assert_same_scores(whole, parts, 1e-5)


def test_the_best_scores_are_loaded_at_the_end(tmp_path):
    trainer = make(
        tmp_path, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="eval_retain_loss", greater_is_better=False, learning_rate=0.6,
    )  # fmt: skip
    trainer.train()
    losses = [entry["eval_retain_loss"] for entry in trainer.state.log_history if "eval_retain_loss" in entry]
    assert losses[-1] > min(losses) == trainer.state.best_metric
    kept = load_file(Path(trainer.state.best_model_checkpoint) / "scores.safetensors")
    for path, score in trainer.masked.full_scores().items():
        assert torch.equal(score, kept[path])
    assert trainer.evaluate()["eval_retain_loss"] == pytest.approx(trainer.state.best_metric)


@pytest.mark.parametrize("batches", [1, 2])
def test_bf16_computes_in_bfloat16(batches, tmp_path):
    """The reference, too, in one process that wraps nothing around the model."""
    trainer = make(
        tmp_path, num_train_epochs=1, bf16=True,
        per_device_train_batch_size=4 // batches, gradient_accumulation_steps=batches,
    )  # fmt: skip
    seen = set()
    for layer in trainer.model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda _, args, output: seen.add(output.dtype))
    trainer.train()
    assert seen == {torch.bfloat16}
    assert all(score.dtype == torch.float32 for score in trainer.masked.scores.values())


# The layers of OPT have dropout of their own.
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "opt"])
def test_other_families_and_checkpointing(name, tmp_path):
    plain = make(tmp_path, name, num_train_epochs=1)
    saving = make(tmp_path, name, num_train_epochs=1, gradient_checkpointing=True)
    for trainer in (plain, saving):
        trainer.train()
    for path, score in plain.masked.full_scores().items():
        torch.testing.assert_close(score, saving.masked.full_scores()[path], rtol=1e-3, atol=1e-3)


def test_goals_end_the_training(tmp_path):
    trainer = make(tmp_path, num_train_epochs=50, eval_strategy="epoch", goal_forget_loss=0.0)
    trainer.train()
    assert trainer.state.global_step == 1
    found = next(entry for entry in trainer.state.log_history if "eval_forget_loss" in entry)
    assert found.keys() >= {"eval_forget_loss", "eval_forget_ma", "eval_retain_loss", "eval_muted"}
    with pytest.raises(ValueError, match="goals are looked at in evaluations"):
        make(tmp_path, goal_forget_ma=0.5)


def test_a_run_that_ended_at_its_goals_is_not_gone_on_with(tmp_path):
    """Each further start of a user's script would otherwise forget more than was asked for."""
    options = dict(num_train_epochs=6, eval_strategy="epoch", save_strategy="epoch")
    first = make(tmp_path, goal_forget_loss=0.0, **options)
    first.train()
    again = make(tmp_path, goal_forget_loss=0.0, **options)
    assert again.train(resume_from_checkpoint=True).global_step == again.state.global_step == 1
    assert_same_scores(first, again, 0.0)
    further = make(tmp_path, goal_forget_loss=1e9, **options)
    further.train(resume_from_checkpoint=True)
    assert further.state.global_step == 6


def test_what_is_evaluated_is_the_budget_and_has_any_name(tmp_path):
    trainer = make(tmp_path, budget=0.25, eval_strategy="epoch", goal_forget_loss=0.0)
    models.randomise(trainer.masked)
    assert trainer.evaluate()["eval_muted"] == pytest.approx(trainer.mute_set().share) == 0.25
    assert "test_forget_loss" in trainer.evaluate(metric_key_prefix="test")


def test_a_trainer_that_cannot_be_made_leaves_the_model_alone(tmp_path):
    model = models.build("llama")
    options = (NeuMuterConfig(str(tmp_path), report_to=[]), text_batch(1, 3), text_batch(2, 3))
    with pytest.raises(TypeError, match="no_such_option"):
        NeuMuterTrainer(model, *options, no_such_option=1)
    NeuMuterTrainer(model, *options).masked.detach()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": -1}, "budget must not be negative"),
        ({"budget": 0.0}, r"budget as a share must lie in \(0, 1\]"),
        ({"budget": 1.5}, r"budget as a share must lie in \(0, 1\]"),
        ({"budget": 10**9}, "budget as a count must be from 1 to"),
        ({"threshold": 1.5, "budget": None}, r"threshold must be a float in \(0, 1\), got 1.5"),
        ({"threshold": 1, "budget": None}, r"threshold must be a float in \(0, 1\), got 1"),
    ],
)
def test_bad_constants_are_named_before_anything_is_trained(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **changes)


def test_a_number_of_neurons_can_be_given_on_a_command_line(tmp_path):
    """There it is a float."""
    arguments = ["--output_dir", str(tmp_path), "--budget", "20", "--use_cpu"]
    (config,) = HfArgumentParser(NeuMuterConfig).parse_args_into_dataclasses(arguments)
    assert (config.budget, type(config.budget)) == (20, int)


def test_scores_of_another_width_are_refused(tmp_path):
    trainer = make(tmp_path / "a", save_strategy="epoch", num_train_epochs=1)
    trainer.train()
    config, model = trainer.args, models.build("llama", intermediate_size=64)
    other = NeuMuterTrainer(model, config, text_batch(1), text_batch(2))
    with pytest.raises(ValueError, match="holds scores of other FFNs than this model has"):
        other.train(resume_from_checkpoint=True)


def test_predictions_are_refused_by_name(tmp_path):
    trainer = make(tmp_path)
    with pytest.raises(NotImplementedError, match=r"predicts nothing; evaluate\(\) measures"):
        trainer.predict(trainer.eval_dataset)


def test_other_kernels_in_the_place_of_gates_are_refused(tmp_path):
    with pytest.raises(ValueError, match="use_liger_kernel must be False"):
        make(tmp_path, use_liger_kernel=True)


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder, killed_at=None):
    """What the processes of the test below do."""
    trainer = make(
        folder, num_train_epochs=6, per_device_train_batch_size=2, save_strategy="steps", save_steps=3,
        save_total_limit=2,
    )  # fmt: skip
    trainer.add_callback(Kill(killed_at))
    trainer.train(resume_from_checkpoint=True)
    trainer.mute_set().save(Path(folder) / "done.mute")


def test_a_killed_run_resumes_with_the_same_bits(tmp_path):
    for step, last in ((4, 3), (11, 9)):  # in the middle of an epoch
        process = FORKS.Process(target=run, args=(tmp_path / "killed", step))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert last_checkpoint(tmp_path / "killed").endswith(f"checkpoint-{last}")
        (tmp_path / "killed/checkpoint-99").mkdir(exist_ok=True)  # as a kill may leave it
    run(tmp_path / "killed")
    run(tmp_path / "whole")
    assert (tmp_path / "killed/done.mute").read_bytes() == (tmp_path / "whole/done.mute").read_bytes()


def test_diverged_scores_are_not_taken_for_nothing_selected(tmp_path):
    trainer = make(tmp_path)
    assert trainer.evaluate()["eval_muted"] == 0  # all gates are open: nothing is selected
    with torch.no_grad():
        next(iter(trainer.masked.scores.values()))[3] = torch.nan
    with pytest.raises(ValueError, match="hold NaN: training diverged"):
        trainer.evaluate()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_what_it_adds_to_a_step_waits_for_no_device(accumulated, tmp_path, monkeypatch):
    """The loss, and what accumulation measures before it, logging aside."""
    names = ("compute_loss", "_measure_level")
    for name in names:
        plain = getattr(NeuMuterTrainer, name)

        def watched(self, *arguments, plain=plain, **options):
            with OnePlace():
                return plain(self, *arguments, **options)

        monkeypatch.setattr(NeuMuterTrainer, name, watched)
    trainer = make(
        tmp_path, per_device_train_batch_size=4 // accumulated, gradient_accumulation_steps=accumulated
    )
    trainer.train()
    assert trainer.state.global_step == 3
