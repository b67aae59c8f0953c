"""A model that learned the texts, what unlearn found for two requests, and a ledger of both."""

import pytest
import torch

import neumuter
from neumuter.recipes import FittedConfig, GainsConfig
from neumuter.texts import encode
from tests.models import build, learn, tokenizer
from tests.neumuter.ledger.texts import ADA, JON, KEPT, write


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return learn(build("llama"), encode([*ADA, *JON, *KEPT], tokenizer(), 64), 150).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The model's checkpoint, texts, and what unlearn found for two requests."""
    folder = tmp_path_factory.mktemp("requests")
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    earlier = None
    for name, texts in (("ada", ADA), ("jon", JON)):
        write(folder / "texts" / f"{name}.jsonl", texts)
        outcome = neumuter.unlearn(
            model, tokenizer(), texts, KEPT, budget=100, start_layer=0, samples=0, existing=earlier,
            recipe=FittedConfig(GainsConfig(steps=50)), callback=lambda *_: None,
        )  # fmt: skip
        assert not outcome.verdict.leaks
        outcome.save(folder / name)
        earlier = outcome.mutes
    return folder


@pytest.fixture
def ledger(folder, tmp_path):
    ledger = neumuter.Ledger(tmp_path / "ledger", create=True)
    ledger.add(folder / "ada", ADA, "ticket 17")
    ledger.add(folder / "jon", JON)
    return ledger
