"""How much of given texts a model gives back."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from neumuter.evaluation.language import losses_by_sample
from neumuter.evaluation.passes import count_after_prompts, find_hits, in_parts, predict
from neumuter.generation import generate
from neumuter.models.loading import limit_length
from neumuter.models.pieces import Pieces
from neumuter.types import IGNORED, Batch

SAMPLES_DRAWN = 100
PREFIXES_PER_PASS = 64


def extracted(model: nn.Module, batch: Batch) -> Tensor:
    """Find which samples greedy decoding reproduces exactly: bool [B].

    The labels of a sample are its continuation, all that follows the prompt; of a sample that counts from
    its start on, the first third is the prompt. Greedy decoding from the prompt reproduces it if and only if
    each of its tokens is the arg max given the true tokens before it: up to the first miss, the decoded and
    the true prefix are the same. So one teacher-forced pass decides what generation would find.
    """
    counted, right = find_hits(model, count_after_prompts(batch))
    return (right == counted).all(1) & counted.any(1)


def extraction_rate(model: nn.Module, batch: Batch) -> float:
    """Compute the share in [0, 1] of samples that greedy decoding reproduces; see :func:`extracted`."""
    return extracted(model, batch).float().mean().item()


def secret_extraction(model: nn.Module, batch: Batch) -> float:
    """Compute the share in [0, 1] of secrets that greedy decoding gives back, from just before each of them.

    A secret is a run of neighbouring tokens that count; the true tokens are before it. A text as a whole is
    not extracted any more as soon as one word of its wording changes, so that the secret may still come out;
    here it counts. NaN if nothing counts.
    """
    counted, right = find_hits(model, batch)
    before = torch.cat([torch.zeros_like(counted[:, :1]), counted[:, :-1]], 1)
    number = (counted & ~before).flatten().cumsum(0)[counted.flatten()]
    missed = number[~right[counted]].unique()
    secrets = int(number[-1]) if len(number) else 0
    return 1 - len(missed) / secrets if secrets else math.nan


def sampled_extraction(model: nn.Module, batch: Batch, samples: int = SAMPLES_DRAWN) -> float:
    """Compute the share of texts in [0, 1] that are expected to come back at least once in ``samples`` draws.

    The mean over texts of 1 − (1 − p)^n, p the probability that the model, sampled from as it is
    (temperature 1, all tokens), continues the prompt with exactly the counted tokens: (n, p)-discoverable
    extraction (Hayes et al. 2025, *Measuring Memorization in Language Models via Probabilistic
    Extraction*). Exact, without drawing anything.
    """
    chances = [
        chance_in_draws(losses, samples) for losses in losses_by_sample(model, count_after_prompts(batch))
    ]
    return sum(chances) / len(chances)


def chance_in_draws(losses: Tensor, samples: int = SAMPLES_DRAWN) -> float:
    """Compute the chance that a text of these token losses, [N] in nats, is drawn once in ``samples``."""
    if not len(losses):
        return 0.0
    chance = (-losses.double().sum()).exp().clamp(max=1 - 1e-12)
    return -torch.expm1(samples * torch.log1p(-chance)).item()


def extraction_strength(model: nn.Module, batch: Batch) -> float:
    """Compute the mean over samples of 1 − k/T, in [0, 1].

    From the first k of a sample's T counted tokens on, greedy decoding reproduces the rest. Source: Carlini
    et al. 2021, as open-unlearning computes it.
    """
    counted, right = find_hits(model, batch)
    strengths = []
    for here, hit in zip(counted, right, strict=True):
        missed = (~hit[here]).nonzero().flatten()
        total = int(here.sum())
        strengths.append(1 - (int(missed[-1]) + 1 if len(missed) else 0) / total if total else 0.0)
    return sum(strengths) / len(strengths)


def memorization_accuracy(model: nn.Module, batch: Batch) -> float:
    """Compute MA in [0, 1]: the mean over samples of the share of counted tokens that are the arg max.

    MA(x) = 1/(T − 1) Σ_i 1[argmax p(· | x_<i) = x_i] (Jang et al. 2023, *Knowledge Unlearning*);
    label every token of the sample.
    """
    counted, right = find_hits(model, batch)
    return (right.sum(1) / counted.sum(1)).mean().item()


def extraction_likelihood(
    model: nn.Module, batch: Batch, n: int = 10, rows: int = PREFIXES_PER_PASS, answers: bool = False
) -> float:
    """Compute EL_n in [0, 1], the mean over samples of T tokens (Jang et al. 2023, *Knowledge Unlearning*).

    EL_n(x) = 1/(T − n) Σ_{i=1}^{T−n} |{g ∈ ngrams(ŷ_i) : g ∈ ngrams(x_≥i)}| / |ngrams(x_≥i)|, where ŷ_i is
    the greedy continuation of the first i tokens to length T, and n-grams that come again count again.
    Samples are all real tokens of ``input_ids``, whatever their labels, so where windows of a text overlap,
    both count. With ``answers`` the shortest prefix is the prompt, all before the first token that counts,
    and the mean is over the prefixes from there on.

    Where the arg max after i tokens is the true next token, ŷ_i is that token followed by ŷ_{i+1}. So only
    the misses are continued, ``rows`` at a time: none for a text that is known by heart.

    Raises:
        ValueError: a sample has at most ``n`` tokens; with ``answers``, its answer has fewer than ``n``.
    """
    total = 0.0
    found = in_parts(model, batch, lambda part: _find_misses(model, part, n, answers))
    samples = [sample for part in found for sample in part]
    wanted = [(number, i) for number, (_, _, missed) in enumerate(samples) for i in missed]
    made = _continue_greedily(model, [(samples[number][0], i) for number, i in wanted], rows)
    by_sample: list[dict[int, list[int]]] = [{} for _ in samples]
    for (number, i), continuation in zip(wanted, made, strict=True):
        by_sample[number][i] = continuation
    for (ids, first, _), continued in zip(samples, by_sample, strict=True):
        total += _compute_el(ids, first, continued, n)
    return total / len(samples)


def _find_misses(
    model: nn.Module, part: Batch, n: int, answers: bool
) -> list[tuple[list[int], int, list[int]]]:
    """Find (ids, the shortest prefix, prefixes whose continuation must be generated) of each sample.

    Prefixes are lengths in tokens.
    """
    best = predict(model, part).argmax(-1).cpu()
    found = []
    for row, (ids, shown) in enumerate(
        zip(part["input_ids"].cpu(), part["attention_mask"].cpu(), strict=True)
    ):
        ids = ids[shown.bool()].tolist()
        first = 1
        if answers:
            counted = (part["labels"][row].cpu()[shown.bool()] != IGNORED).nonzero().flatten().tolist()
            first = max(1, *counted[:1]) if counted else len(ids)
        if len(ids) - first < n:
            raise ValueError(
                f"EL_{n} needs answers of {n} tokens or more, got one of {len(ids) - first}"
                if answers
                else f"EL_{n} needs texts of more than {n} tokens, got one of {len(ids)}"
            )
        guesses = best[row][shown.bool()].tolist()
        missed = [i for i in range(first, len(ids)) if guesses[i - 1] != ids[i]]
        last = len(ids) - n
        # The last continuations run into the first miss behind the last prefix.
        late = [i for i in missed if i > last][:1]
        found.append((ids, first, [i for i in missed if i <= last] + late))
    return found


def _continue_greedily(
    model: nn.Module, prefixes: Sequence[tuple[list[int], int]], rows: int
) -> list[list[int]]:
    """Continue ids[:i] greedily to len(ids) tokens for each (ids, i); returns lists of token ids."""
    order = sorted(range(len(prefixes)), key=lambda k: len(prefixes[k][0]) - prefixes[k][1])

    def continue_some(chosen: Sequence[int]) -> list[list[int]]:
        longest = max(prefixes[k][1] for k in chosen)
        steps = max(len(prefixes[k][0]) - prefixes[k][1] for k in chosen)
        # A long prefix that goes on for as long as a short one can run out of positions.
        if len(chosen) > 1 and limit_length(model, longest + steps) < longest + steps:
            middle = len(chosen) // 2
            return continue_some(chosen[:middle]) + continue_some(chosen[middle:])
        ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
        shown = torch.zeros_like(ids)
        for row, k in enumerate(chosen):
            text, i = prefixes[k]
            ids[row, longest - i :], shown[row, longest - i :] = torch.tensor(text[:i]), 1
        output = generate(model, ids, shown, max_new_tokens=steps, eos_token_id=None, pad_token_id=0)
        output = output[:, longest:]
        lengths = [len(prefixes[k][0]) - prefixes[k][1] for k in chosen]
        return [line[:length].tolist() for line, length in zip(output, lengths, strict=True)]

    made = [line for part in Pieces(model, rows).run(continue_some, order) for line in part]
    return [line for _, line in sorted(zip(order, made, strict=True))]


def _compute_el(ids: list[int], first: int, continued: Mapping[int, list[int]], n: int) -> float:
    """Compute EL_n of one sample from its shortest prefix on, given the continuations at its misses."""
    total = 0.0
    continuation: list[int] = []
    for i in range(len(ids) - 1, first - 1, -1):
        continuation = continued[i] if i in continued else [ids[i], *continuation]
        if i <= len(ids) - n:
            true = {tuple(ids[k : k + n]) for k in range(i, len(ids) - n + 1)}
            grams = [tuple(continuation[k : k + n]) for k in range(len(continuation) - n + 1)]
            total += sum(gram in true for gram in grams) / len(grams)
    return total / (len(ids) - n - first + 1)
