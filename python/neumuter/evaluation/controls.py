"""Controls: texts of the same kind that a model never saw, which forgotten texts are compared with."""

import math
import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from neumuter.evaluation.made_up import Words, make_up, rename
from neumuter.evaluation.others import GivenText, group_rows
from neumuter.evaluation.passes import find_prompt_ends
from neumuter.texts import join_batches
from neumuter.types import IGNORED, Batch

# At least so many controls: where there are fewer texts, several of each. Where there are more texts, one of
# each, up to ``TIMES`` that number: with few controls, no verdict on many texts is sure. Of a text that
# has several windows, further ones follow where there are fewer texts.
MADE_UP, TIMES = 32, 4


def make_controls(
    forms: Sequence[Batch],
    given: Sequence[GivenText],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    seed: int = 0,
) -> list[Batch]:
    """Make texts like those of ``forms`` that nobody ever saw: other names, and values of other texts.

    Names are the words of a prompt that at most a tenth of all texts have, and what looks like a name and
    is in no text to keep (see ``Words``); where there are no such words, all are. Of a text that counts from
    its start on, all words are looked at. A name becomes random letters and digits of the same
    length, wherever the text has it. Values are such words of a completion: they become those of another
    given text whose completion is worded alike, and stay where there is none.

    Args:
        forms: the texts in each form, as ``encode_forms`` returns them.
        given: all texts that the user gave; they show which words are common.
        max_length: tokens that a control may have; other words can take more tokens than those of its text.
            A longer one loses the start of its prompt.
        seed: draws names and values.

    Returns:
        For each form a batch of ``MADE_UP`` texts or more. The same tokens count but for the names, which
        nobody can guess; where nothing else counts, they do. "by_chance", bool [B]: whether a text has the
        values of texts to keep. If another one comes out, the model may have told a value to forget.
    """
    words = Words(given)
    return [
        _rename_all(form, rows, words, tokenizer, max_length, random.Random(seed))
        for form, rows in zip(forms, _choose_rows(forms), strict=True)
    ]


def _choose_rows(forms: Sequence[Batch]) -> list[list[int]]:
    """Of each form the rows that controls are made of: the same windows, although one may have more."""
    windows = [group_rows(form) for form in forms]
    shared = [min(map(len, of_text)) for of_text in zip(*windows, strict=True)]
    chosen = sorted((place, text) for text, count in enumerate(shared) for place in range(count))
    count = max(MADE_UP, min(len(shared), TIMES * MADE_UP))
    return [sorted(of_form[text][place] for place, text in chosen[:count]) for of_form in windows]


def _rename_all(
    batch: Batch,
    rows: Sequence[int],
    words: Words,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    generator: random.Random,
) -> Batch:
    batch = {key: value[rows] for key, value in batch.items()}
    tensors = [batch[key].tolist() for key in ("input_ids", "labels", "attention_mask")]
    made, by_chance = [], []
    for start, ids, labels, shown in zip(find_prompt_ends(batch), *tensors, strict=True):
        ids, labels = ids[: sum(shown)], labels[: sum(shown)]
        whole = any(label != IGNORED for label in labels[:start])
        prompt, completion = (
            str(tokenizer.decode(part, skip_special_tokens=True))
            for part in ((ids, []) if whole else (ids[:start], ids[start:]))
        )
        named = words.find_names(prompt)
        for _ in range(math.ceil(MADE_UP / len(tensors[0]))):
            names = {word: make_up(word, words.letters, generator) for word in named}
            values, kept = words.swap(prompt, completion, generator)
            by_chance.append(kept)
            made.append(rename(ids, labels, names, values, tokenizer, max_length))
    return join_batches(*made) | {"texts": torch.arange(len(made)), "by_chance": torch.tensor(by_chance)}
