"""Passes that do not fit into memory are halved, and find the same."""

import logging

import pytest
import torch

from neumuter.evaluation import (
    continuations,
    continue_texts,
    examination,
    examine,
    extraction_likelihood,
    kl_to_original,
    list_given,
)
from neumuter.models.pieces import Pieces
from neumuter.texts import encode
from tests.models import build, tokenizer

TEXTS = ["Ada 555-77", "Jonas Vance", "The kettle", "A lantern", "Tea at four"]


def limited(most, tried):
    def work(items):
        tried.append(len(items))
        if len(items) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sum(items)

    return work


def test_pieces_are_halved_until_they_fit_and_stay_so(caplog):
    pieces, tried = Pieces(torch.nn.Linear(1, 1), 8), []
    with caplog.at_level(logging.WARNING, "neumuter"):
        assert list(pieces.run(limited(3, tried), range(20))) == [1, 5, 9, 13, 17, 21, 25, 29, 33, 37]
    assert tried == [8, 4, *[2] * 10]
    assert [record.args for record in caplog.records] == [(8, 4), (4, 2)]
    assert list(pieces.run(limited(3, tried), [5])) == [5]
    assert pieces.size == 2


def test_a_single_item_that_does_not_fit_is_an_error():
    tried = []
    with pytest.raises(torch.OutOfMemoryError):
        list(Pieces(torch.nn.Linear(1, 1), 4).run(limited(0, tried), range(9)))
    assert tried == [4, 2, 1]


def test_a_model_that_processes_share_runs_the_same_passes_in_all_of_them():
    model, tried = torch.nn.Linear(1, 1), []
    model.weight.ds_id = 1  # as ZeRO-3 marks what it has split
    with pytest.raises(torch.OutOfMemoryError):
        list(Pieces(model, 4).run(limited(2, tried), range(9)))
    assert tried == [4]


def test_evaluation_finds_the_same_in_smaller_passes(monkeypatch, caplog):
    for module in (continuations, examination):
        monkeypatch.setattr(module, "MAX_TOKENS", 4)
    model, words = build("llama"), tokenizer()
    batch = encode(TEXTS, words, 64)
    given = list_given({"forget": batch}, words)

    def measure():
        return (
            examine(model, words, [batch], given),
            extraction_likelihood(model, batch, n=3),
            kl_to_original(model, build("llama", seed=1), batch),
            continue_texts(model, words, batch, 2),
        )

    whole = measure()
    forward, sizes = model.forward, []

    def run(*arguments, **options):
        ids = options.get("input_ids", arguments[0] if arguments else None)
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(ids))
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", run)
    examined, *others = measure()
    assert max(sizes) == 2
    assert others[:2] == pytest.approx(whole[1:3], rel=1e-5)
    assert others[2] == whole[3]
    for name, value in vars(whole[0]).items():
        found = getattr(examined, name)
        exact = name in ("extracted", "said", "others")
        assert found == (value if exact else pytest.approx(value, rel=1e-4, abs=1e-9))
    assert "do not fit into memory" in caplog.text
