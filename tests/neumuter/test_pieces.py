"""Passes that do not fit into memory are halved, and find the same."""

import logging

import pytest
import torch

import neumuter
from neumuter.evaluation import (
    continuations,
    continue_texts,
    examination,
    examine,
    extraction_likelihood,
    kl_to_original,
    list_given,
)
from neumuter.evaluation.strangers import ask_about_strangers
from neumuter.models.pieces import Pieces
from neumuter.texts import encode, join_batches, neighbours
from neumuter.texts.neighbours import sample_texts
from neumuter.training.batches import PairedBatches
from tests.models import build, tokenizer

TEXTS = ["Ada 555-77", "Jonas Vance", "The kettle", "A lantern", "Tea at four"]


def limited(most, tried):
    def work(items):
        tried.append(len(items))
        if len(items) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sum(items)

    return work


def shrink(monkeypatch, model):
    """From now on two samples fit into memory. Returns a list of how many a pass had, which grows."""
    forward, sizes = model.forward, []

    def run(*arguments, **options):
        ids = options.get("input_ids", arguments[0] if arguments else None)
        if len(ids) > 2:
            # Some of the work was done.
            torch.rand(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(ids))
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", run)
    return sizes


def test_pieces_are_halved_until_they_fit_and_stay_so(caplog):
    pieces, tried = Pieces(torch.nn.Linear(1, 1), 8), []
    with caplog.at_level(logging.WARNING, "neumuter"):
        assert list(pieces.run(limited(3, tried), range(20))) == [1, 5, 9, 13, 17, 21, 25, 29, 33, 37]
    assert tried == [8, 4, *[2] * 10]
    same = "gives the same result"
    assert [record.args for record in caplog.records] == [(8, 4, same), (4, 2, same)]
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
    sizes = shrink(monkeypatch, model)
    examined, *others = measure()
    assert max(sizes) == 2
    assert others[:2] == pytest.approx(whole[1:3], rel=1e-5)
    assert others[2] == whole[3]
    for name, value in vars(whole[0]).items():
        found = getattr(examined, name)
        exact = name in ("extracted", "said", "others")
        assert found == (value if exact else pytest.approx(value, rel=1e-4, abs=1e-9))
    assert "do not fit into memory" in caplog.text


def test_experts_are_looked_for_in_smaller_passes(monkeypatch, caplog):
    """By few tokens, so that some experts are reached and some are not."""
    model = build("qwen3_moe")
    rows = [encode([text], tokenizer(), 64) for text in ("Ada", "T", "J. V.", "The", "A")]
    forget = join_batches(*rows)

    with neumuter.attach(model, start_layer=0) as masked:

        def find_closed():
            masked.keep_unreached_open([forget, rows[0]])
            return torch.cat([score.detach().isinf() for score in masked.scores.values()])

        whole = find_closed()
        sizes = shrink(monkeypatch, model.model)
        assert torch.equal(find_closed(), whole)
    assert 0 < whole.sum() < len(whole)
    assert sizes == [2, 2, 1, 1]
    assert "do not fit into memory" in caplog.text


def test_a_pair_of_texts_is_made_in_smaller_passes(monkeypatch, caplog):
    model, forget = build("mixtral"), encode(TEXTS, tokenizer(), 64)
    with neumuter.attach(model) as masked:
        sizes = shrink(monkeypatch, model.model)
        PairedBatches(masked, forget, forget)
    assert sizes[-3:] == [2, 2, 1]
    assert "5 samples at a time do not fit into memory" in caplog.text


def test_neighbours_are_sampled_in_smaller_passes(monkeypatch, caplog):
    model, words, told = build("llama"), tokenizer(), []
    monkeypatch.setattr(neighbours, "TEXTS_PER_PASS", 2)
    few = sample_texts(model, words, 5, 8, seed=3)
    monkeypatch.setattr(neighbours, "TEXTS_PER_PASS", 8)
    assert sample_texts(model, words, 5, 8, seed=3) != few
    sizes = shrink(monkeypatch, model)
    found = sample_texts(model, words, 5, 8, seed=3, callback=lambda *done: told.append(done))
    # Nothing that was drawn in vain counts.
    assert found == few
    assert max(sizes) == 2
    assert told == [(2, 5), (4, 5), (5, 5)]
    # 5, 3, 2.
    assert caplog.text.count("do not fit into memory") == 2
    assert "from now on there are 2, which draws other texts." in caplog.text


def test_strangers_are_asked_in_smaller_passes(monkeypatch, caplog):
    model, words = build("llama"), tokenizer()
    pairs = [(f"{name} Brisk, mail:", " ada@post.example") for name in ("Ada", "Jonas", "Mara", "Tilda")]
    batch = encode(pairs, words, 64)
    given = (words, batch, list_given({"forget": batch}, words), 4, 40)
    whole = ask_about_strangers(model, *given)
    sizes = shrink(monkeypatch, model)
    found = ask_about_strangers(model, *given)
    assert max(sizes) == 2
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    assert "do not fit into memory" in caplog.text
