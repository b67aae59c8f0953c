"""What a model still knows of given texts, and what it knows otherwise.

Every function takes a batch as in :mod:`neumuter.losses` and needs one teacher-forced forward pass.
"""

import math

import torch

from neumuter.losses import IGNORED, token_losses


@torch.no_grad()
def _predictions(model, batch):
    """Logits [B, T, V] of a batch."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits


def _hits(model, batch):
    """Two bool tensors [B, T - 1]: which tokens count, and which of them are the most likely token."""
    counted = batch["labels"][:, 1:] != IGNORED
    best = _predictions(model, batch)[:, :-1].argmax(-1)
    return counted, counted & (best == batch["labels"][:, 1:])


def extracted(model, batch):
    """Which samples greedy decoding reproduces exactly: bool [B].

    The labels of a sample are its continuation, all that follows the prompt. Greedy decoding from
    the prompt reproduces it if and only if each of its tokens is the arg max given the true tokens
    before it: up to the first miss, the decoded and the true prefix are the same. So one
    teacher-forced pass decides what token-by-token generation would find.
    """
    counted, hits = _hits(model, batch)
    return (hits == counted).all(1) & counted.any(1)


def extraction_rate(model, batch):
    """Share of samples in [0, 1] that greedy decoding reproduces exactly; see :func:`extracted`."""
    return extracted(model, batch).float().mean().item()


def memorization_accuracy(model, batch):
    """MA in [0, 1]: the mean over samples of the share of counted tokens that are the arg max.

    MA(x) = 1/(T − 1) Σ_i 1[argmax p(· | x_<i) = x_i] (Jang et al. 2023, *Knowledge Unlearning*);
    label every token of the sample.
    """
    counted, hits = _hits(model, batch)
    return (hits.sum(1) / counted.sum(1)).mean().item()


def mean_token_loss(model, batch):
    """Mean cross-entropy in nats over all counted tokens of the batch."""
    return token_losses(_predictions(model, batch), batch["labels"]).mean().item()


def perplexity(model, batch, rows=32):
    """exp of the mean token loss, ``rows`` samples at a time."""
    total = count = 0
    for start in range(0, len(batch["input_ids"]), rows):
        part = {key: value[start : start + rows] for key, value in batch.items()}
        losses = token_losses(_predictions(model, part), part["labels"])
        total, count = total + losses.double().sum().item(), count + len(losses)
    return math.exp(total / count)
