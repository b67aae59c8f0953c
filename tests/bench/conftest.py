"""Models on which experiments take seconds."""

import functools

import pytest
import torch

from bench.unlearning import real, requests, synth, tdec
from bench.unlearning.methods import Job
from neumuter import evaluation, recipes
from neumuter.demo import task
from neumuter.demo.model import Training, architecture
from neumuter.evaluation import continuations, controls, examination
from neumuter.recipes import schedule
from tests import models


@pytest.fixture(scope="module")
def job():
    ids = models.batch(8, 8, 5)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    forget, keep = ({k: v[part] for k, v in batch.items()} for part in (slice(4), slice(4, 8)))
    recipe = {"share": 0.1, "batch_size": 4, "steps": 2, "lr": 1e-3, "paper_epochs": 1}
    model = models.build("llama")
    return Job(model, forget, keep, lambda m: {"loss": evaluation.mean_token_loss(m, forget)}, recipe, 0)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The experiments' own models in small, few and short texts, learners of one step."""

    def smaller():
        config = architecture()
        config.hidden_size, config.intermediate_size, config.head_dim = 32, 200, 8  # 2 neurons are 0.5 %
        return config

    monkeypatch.setattr(task, "read_corpus", functools.partial(task.read_corpus, 30_000))
    monkeypatch.setitem(synth.MODELS, "gated, 0.9 M", smaller)
    monkeypatch.setattr(task, "HELDOUT_WINDOWS", 2)
    monkeypatch.setattr(real, "PEOPLE", 4)
    for name, value in (("TEXTS", 2), ("TOKENS", 40), ("PROMPT", 32)):
        monkeypatch.setattr(tdec, name, value)
    monkeypatch.setenv("NEUMUTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(real, "pretrained", lambda name: models.build("llama"))
    monkeypatch.setattr(real, "tokenizer", lambda name=None: models.tokenizer())
    monkeypatch.setattr(tdec, "tokenizer", models.tokenizer)
    monkeypatch.setattr(real, "WINDOWS", 2)
    monkeypatch.setitem(real.TUNING, "most_epochs", 1)
    # So many steps that bfloat16 shows a difference.
    monkeypatch.setitem(real.RECIPE, "steps", 10)
    monkeypatch.setattr(schedule, "LEAST_STEPS", 10)
    monkeypatch.setitem(tdec.Texts.recipe, "steps", 2)
    monkeypatch.setattr(synth, "Training", lambda: Training(steps=1))
    monkeypatch.setattr(requests, "GAINS", recipes.GainsConfig(steps=2, batch_size=None))
    monkeypatch.setitem(synth.RECIPE, "steps", 2)
    for module, name in ((continuations, "MAX_TOKENS"), (examination, "MAX_TOKENS"), (controls, "MADE_UP")):
        monkeypatch.setattr(module, name, 2)
    return tmp_path
