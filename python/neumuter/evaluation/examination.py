"""What a model does with each text: whether it comes out, how likely it is, and whose text comes instead."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neumuter.evaluation.continuations import MAX_TOKENS
from neumuter.evaluation.forms import most_known
from neumuter.evaluation.language import losses_by_sample, refuse_nan
from neumuter.evaluation.membership import min_k_score
from neumuter.evaluation.memory import chance_in_draws, extracted, memorization_accuracy
from neumuter.evaluation.others import (
    STRETCH,
    Found,
    GivenText,
    find_others,
    group_rows,
    list_given,
    number_texts,
    write_ids,
)
from neumuter.evaluation.passes import SAMPLES_PER_PASS, count_after_prompts, find_prompt_ends
from neumuter.generation import cut_at_end, find_end_tokens, generate
from neumuter.models.loading import limit_length
from neumuter.models.pieces import Pieces
from neumuter.training.losses import predicting
from neumuter.types import Batch


@dataclass(frozen=True)
class Examination:
    """What ``examine`` found; each list has an entry for every text.

    metrics: {name in ``METRICS``: value}. extracted: whether the text, or a window of it, comes out.
    sampled: the chance that it does at least once in ``SAMPLES_DRAWN`` draws. loss: the mean token loss in
    nats. min_k: the mean log-probability of its least likely tokens, see ``min_k_scores``. said: how the
    model continues the prompt. others: what came out instead. by_chance: whether it is by chance if the text
    comes out; of controls that ``make_controls`` made, not all do so.
    """

    metrics: dict[str, float]
    extracted: list[bool]
    sampled: list[float]
    loss: list[float]
    min_k: list[float]
    said: list[str]
    others: list[Found | None]
    by_chance: list[bool]


def examine(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    forms: Sequence[Batch],
    given: Sequence[GivenText],
    name: str = "forget",
) -> Examination:
    """Examine what the model, as it is now, does with texts; the worst of all forms counts.

    Args:
        tokenizer: decodes what the model says; None compares token ids.
        forms: the texts in each form, as ``neumuter.texts.encode_forms`` returns them.
        given: the texts that must not come out in place of others; see ``find_others``.
        name: what ``given`` calls the batch of these texts; another name if they are not in it.

    Raises:
        RuntimeError: the model predicts NaN.
    """
    longest = STRETCH + max(text.tokens for text in given)
    # Of each text what is said in the first form in which another text comes out, or else in the first.
    said: dict[int, str] = {}
    others: dict[int, Found] = {}
    for form in forms:
        spoken = continue_prompts(model, tokenizer, form, longest)
        found = find_others(list_given({name: form}, tokenizer), spoken, given, tokenizer)
        for number, ids, other in zip(number_texts(form), spoken, found, strict=True):
            if other and number not in others:
                others[number], said[number] = other, write_ids(tokenizer)(ids)
            said.setdefault(number, write_ids(tokenizer)(ids))
    batch = most_known(model, forms)
    out, losses = extracted(model, batch), losses_by_sample(model, batch)
    refuse_nan(model, losses)
    # Of a text that counts from its start on, the prompt counts as well, but nobody has to guess it.
    behind = count_after_prompts(batch)
    chances = [
        chance_in_draws(of_text[len(of_text) - int(count) :])
        for of_text, count in zip(losses, predicting(behind["labels"]).sum(1), strict=True)
    ]
    windows, numbers = group_rows(batch), dict.fromkeys(number_texts(batch))
    by_text = [torch.cat([losses[row] for row in rows]) for rows in windows]
    return Examination(
        metrics={
            "forget_extraction": out.float().mean().item(),
            "forget_others": len(others) / len(windows),
            "forget_sampled": sum(chances) / len(chances),
            "forget_ma": memorization_accuracy(model, batch),
            "forget_loss": torch.cat(by_text).mean().item(),
        },
        extracted=[bool(out[rows].any()) for rows in windows],
        sampled=[max(chances[row] for row in rows) for rows in windows],
        loss=[of_text.mean().item() for of_text in by_text],
        min_k=[min_k_score(of_text) for of_text in by_text],
        said=[said[number] for number in numbers],
        others=[others.get(number) for number in numbers],
        by_chance=[
            all(bool(form["by_chance"][place]) for form in forms if "by_chance" in form)
            for place in range(len(windows))
        ],
    )


def count_passes(forms: Sequence[Batch]) -> tuple[int, int]:
    """Count what ``examine`` does: the tokens that go forward, and how often some prompts are continued."""
    tokens = sum(int(form["attention_mask"].sum()) for form in forms)
    # Of several forms, each is looked at twice before one of them is chosen.
    choosing = 2 * tokens if len(forms) > 1 else 0
    # Prompts of all forms; and whether it comes out, its losses, and its accuracy.
    forward = choosing + tokens + 3 * tokens // len(forms)
    return forward, sum(-(-len(form["labels"]) // SAMPLES_PER_PASS) for form in forms)


def continue_prompts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, batch: Batch, tokens: int
) -> list[list[int]]:
    """Continue the prompt of each text greedily, by at most ``tokens`` and ``MAX_TOKENS`` tokens.

    It ends with the token that ends what the model says, or where the model has no position left.
    """
    ends = find_prompt_ends(batch)
    stops = find_end_tokens(model, tokenizer) if tokenizer else None

    def count_left(row: int) -> int:
        wanted = min(tokens, MAX_TOKENS)
        return max(1, limit_length(model, ends[row] + wanted) - ends[row])

    # Prompts of like length go together, because all are padded to the longest.
    order = sorted(range(len(ends)), key=ends.__getitem__)

    def continue_some(rows: Sequence[int]) -> list[list[int]]:
        longest = ends[rows[-1]]
        ids, shown = torch.zeros(2, len(rows), longest, dtype=torch.int64)
        for place, row in enumerate(rows):
            ids[place, longest - ends[row] :] = batch["input_ids"][row, : ends[row]]
            shown[place, longest - ends[row] :] = 1
        output = generate(
            model,
            ids,
            shown,
            max_new_tokens=count_left(rows[0]),
            eos_token_id=stops,
            pad_token_id=(tokenizer and tokenizer.pad_token_id) or 0,
        )
        return [cut_at_end(line, stops) for line in output[:, longest:].tolist()]

    pieces = Pieces(model, SAMPLES_PER_PASS)
    alike = [list(rows) for _, rows in groupby(order, key=count_left)]
    made = [line for rows in alike for part in pieces.run(continue_some, rows) for line in part]
    return [line for _, line in sorted(zip(order, made, strict=True))]


def compare_texts(
    given: Sequence[GivenText], before: Examination | None, after: Examination
) -> list[dict[str, Any]]:
    """Make a row for each examined text, of which ``given`` begins with: see ``neumuter.Outcome.texts``.

    Without ``before`` the rows have nothing of it.
    """
    by_label: dict[str, list[GivenText]] = {}
    for text in given:
        by_label.setdefault(text.label, []).append(text)
    rows: list[dict[str, Any]] = []
    for place, ((label, seen), other) in enumerate(zip(by_label.items(), after.others, strict=False)):
        row: dict[str, Any] = {
            "number": int(label.split()[-1]),
            "windows": seen[0].windows,
            "windows_measured": len(seen),
            "tokens": sum(text.tokens for text in seen),
        }
        for name in ("extracted", "sampled", "loss", "min_k"):
            for state, found in (("before", before), ("after", after)):
                if found:
                    row[f"{name}_{state}"] = getattr(found, name)[place]
        rows.append(row | {"other_text": other and other.label, "said": after.said[place]})
    return rows
