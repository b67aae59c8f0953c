"""Strangers: prompts about people whom nobody knows, and what the model itself answers to them.

As texts to keep they hold in place how answers are worded, and what the model says of everybody else.
"""

import random
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neumuter.evaluation.examination import continue_prompts
from neumuter.evaluation.made_up import WORD, Words, make_up, rename
from neumuter.evaluation.others import GivenText
from neumuter.evaluation.passes import find_prompt_ends
from neumuter.texts import join_batches
from neumuter.types import IGNORED, Batch


def ask_about_strangers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    forget: Batch,
    given: Sequence[GivenText],
    count: int,
    limit: int,
    seed: int = 0,
) -> Batch | None:
    """Ask the prompts of the texts to forget with made-up names, and let the model answer greedily.

    Names are those of ``make_controls``. An answer that holds a value of a text to forget is left out: it
    would protect what is to be forgotten.

    Args:
        forget: the texts to forget.
        given: all texts that the user gave, those to forget first; they show which words are common.
        count: prompts to ask; those of the texts in turn.
        limit: tokens of a prompt and its answer.

    Returns:
        A batch of prompts and answers, of which the answers count: at most ``count`` rows; None if there is
        no row.
    """
    words, generator = Words(given), random.Random(seed)
    ends, texts = find_prompt_ends(forget), given[: len(forget["labels"])]
    prompts = []
    for row in (turn % len(texts) for turn in range(count)):
        ids = forget["input_ids"][row, : ends[row]].tolist()
        named = words.find_names(str(tokenizer.decode(ids, skip_special_tokens=True)))
        names = {word: make_up(word, words.letters, generator) for word in named}
        renamed = rename(ids, [IGNORED] * len(ids), names, {}, tokenizer, limit - 1)
        prompts.append(renamed["input_ids"][0].tolist())
    # The token behind a prompt marks its end.
    asked = join_batches(*(_row(prompt, prompt[-1:]) for prompt in prompts))
    longest = int((forget["attention_mask"].sum(1).cpu() - torch.tensor(ends)).max())
    answers = continue_prompts(model, tokenizer, asked, longest)
    values = {value for text in texts for value in words.split(text.prompt, text.text[len(text.prompt) :])[1]}
    rows = [
        _row(prompt, answer[: limit - len(prompt)])
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer and values.isdisjoint(WORD.findall(str(tokenizer.decode(answer))))
    ]
    return join_batches(*rows) if rows else None


def _row(prompt: list[int], answer: list[int]) -> Batch:
    """A batch of one text, whose answer counts."""
    ids = torch.tensor([prompt + answer])
    labels = torch.tensor([[IGNORED] * len(prompt) + answer])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
