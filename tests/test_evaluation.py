import math

import pytest
import torch
from neumuter import evaluation
from neumuter.losses import IGNORED

from tests import models


@pytest.fixture(scope="module")
def model():
    return models.build("llama")


def with_labels(ids, prompt):
    labels = ids.clone()
    labels[:, :prompt] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_a_sample_is_extracted_exactly_if_generation_reproduces_it(model):
    prompts = models.batch(samples=4, tokens=5)
    ids = model.generate(prompts, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    changed = ids.clone()
    changed[1, -1] = (changed[1, -1] + 1) % models.VOCABULARY
    changed[2, 5] = (changed[2, 5] + 1) % models.VOCABULARY
    assert evaluation.extracted(model, with_labels(ids, 5)).tolist() == [True] * 4
    assert evaluation.extracted(model, with_labels(changed, 5)).tolist() == [True, False, False, True]
    assert evaluation.extraction_rate(model, with_labels(changed, 5)) == 0.5


def test_a_sample_without_counted_tokens_is_not_extracted(model):
    batch = with_labels(models.batch(samples=2, tokens=5), prompt=5)
    assert evaluation.extraction_rate(model, batch) == 0


def test_memorization_accuracy_is_the_mean_over_samples(model):
    ids = model.generate(
        models.batch(samples=2, tokens=4),
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    batch = with_labels(ids, 4)
    batch["labels"][0, 4:6] = (ids[0, 4:6] + 1) % models.VOCABULARY  # two of four missed
    batch["labels"][1, 5:] = IGNORED  # one of one hit
    assert evaluation.memorization_accuracy(model, batch) == pytest.approx((0.5 + 1.0) / 2)


def test_losses_and_perplexity_do_not_depend_on_the_padding_or_on_the_batch_split(model):
    ids = models.batch(samples=5, tokens=6)
    batch = with_labels(ids, 0)
    padded = {
        key: torch.nn.functional.pad(value, (0, 3), value=IGNORED if key == "labels" else 0)
        for key, value in batch.items()
    }
    logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    expected = -logits.gather(-1, ids[:, 1:, None]).mean().item()
    for given in (batch, padded):
        assert evaluation.mean_token_loss(model, given) == pytest.approx(expected, rel=1e-5)
        for rows in (1, 2, 32):
            assert evaluation.perplexity(model, given, rows) == pytest.approx(math.exp(expected), rel=1e-5)
