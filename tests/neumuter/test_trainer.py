"""NeuMuter inside transformers' Trainer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from neumuter import NeuMuterConfig, NeuMuterTrainer
from neumuter.recipes import PaperConfig, train_gates
from neumuter.recipes.trainer import last_checkpoint
from neumuter.training.batches import PairedBatches
from neumuter.training.masked import attach
from tests import models

ROOT = Path(__file__).parents[2]


def text_batch(seed, samples=4):
    ids = models.batch(samples, 9, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def make(folder, name="llama", **changes):
    options = dict(
        num_train_epochs=3, sparsity=2.0, stop_loss=50.0, per_device_train_batch_size=4, report_to=[],
        budget=20, save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True, seed=5,
    )  # fmt: skip
    config = NeuMuterConfig(output_dir=str(folder), **options | changes)
    return NeuMuterTrainer(models.build(name), config, text_batch(1), text_batch(2))


def test_it_trains_what_the_recipe_trains(tmp_path):
    """One batch of everything a step: the same scores as ``train_gates``."""
    trainer = make(tmp_path)
    trainer.train()
    ours = trainer.masked.full_scores()
    with attach(models.build("llama")) as masked:
        config = PaperConfig(epochs=3, batch_size=None, sparsity=2.0, stop_loss=50.0, threshold=0.95)
        train_gates(PairedBatches(masked, text_batch(1), text_batch(2)), config, seed=5)
        for path, score in masked.scores.items():
            torch.testing.assert_close(ours[path], score.detach(), rtol=1e-4, atol=1e-4)
    mutes = trainer.mute_set()
    assert (mutes.count, mutes.seed, mutes.method["recipe"]) == (20, 5, "paper")
    logged = [entry for entry in trainer.state.log_history if "forget_loss" in entry]
    assert len(logged) == 3
    assert logged[-1]["forget_loss"] > logged[0]["forget_loss"]


def test_accumulation_is_one_step(tmp_path):
    """Two halves of a batch draw the noise of one step; the objective's mean is over equal halves."""
    whole, halves = (
        make(tmp_path, num_train_epochs=1),
        make(tmp_path, num_train_epochs=1, per_device_train_batch_size=2, gradient_accumulation_steps=2),
    )
    for trainer in (whole, halves):
        trainer.train()
        assert trainer.state.global_step == 1
    for path, score in whole.masked.full_scores().items():
        torch.testing.assert_close(score, halves.masked.full_scores()[path], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_other_families_and_checkpointing(name, tmp_path):
    plain = make(tmp_path, name, num_train_epochs=1)
    saving = make(tmp_path, name, num_train_epochs=1, gradient_checkpointing=True)
    for module in saving.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
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


def run(folder):
    """What the process of the test below does."""
    trainer = make(folder, num_train_epochs=12, save_strategy="steps", save_steps=2, save_total_limit=2)
    trainer.train(resume_from_checkpoint=True)
    trainer.mute_set().save(Path(folder) / "done.mute")


def test_a_killed_run_resumes_with_the_same_bits(tmp_path):
    command = [
        sys.executable,
        "-c",
        f"from tests.neumuter.test_trainer import run; run({str(tmp_path / 'killed')!r})",
    ]
    for wanted in (4, 8):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if (last := last_checkpoint(tmp_path / "killed")) and int(last.rsplit("-", 1)[1]) >= wanted:
                break
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
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
