"""The same texts with made-up names: what a model says of somebody whom it cannot know."""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import torch
from transformers import PreTrainedTokenizerBase

from neumuter.evaluation.others import GivenText
from neumuter.evaluation.passes import find_prompt_ends
from neumuter.texts import join_batches
from neumuter.types import IGNORED, Batch

# Made-up texts: several of each text where there are few, and one of each of the first where there are many.
MADE_UP = 32
# A word that a larger share of the texts has is no name; with fewer texts than these nobody can tell.
COMMON_SHARE, FEW_TEXTS = 0.1, 10
VOWELS, CONSONANTS, DIGITS = "aeiou", "bcdfghjklmnpqrstvwxyz", "0123456789"
WORD = re.compile(r"\w+")


def make_up_names(
    forms: Sequence[Batch], given: Sequence[GivenText], tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> list[Batch]:
    """Make texts like those of ``forms`` that nobody ever saw, by giving them other names.

    Names are the words of a prompt that at most a tenth of all texts have, or where there are fewer than ten
    texts, those with a capital letter or a digit; where there are no such words, all are. Of a text that
    counts from its start on, all words are looked at. A name becomes random letters and digits of the same
    length, wherever the text has it.

    Args:
        forms: the texts in each form, as ``encode_forms`` returns them.
        given: all texts that the user gave; they show which words are common.

    Returns:
        For each form a batch of ``MADE_UP`` texts or more. The same tokens count but for the names, which
        nobody can guess; where nothing else counts, they do.
    """
    counts = Counter(word for text in given for word in set(WORD.findall(text.text)))
    # Of other scripts than Latin, those letters that the texts have.
    letters = "".join(
        sorted({char.lower() for text in given for char in text.text if ord(char) > 127 and char.isalpha()})
    )

    def is_name(word: str) -> bool:
        if len(given) < FEW_TEXTS:
            return any(char.isupper() or char.isdigit() for char in word)
        return counts[word] <= COMMON_SHARE * len(given)

    return [_rename_all(form, is_name, letters, tokenizer, random.Random(seed)) for form in forms]


def _rename_all(
    batch: Batch,
    is_name: Callable[[str], bool],
    letters: str,
    tokenizer: PreTrainedTokenizerBase,
    generator: random.Random,
) -> Batch:
    tensors = [batch[key][:MADE_UP].tolist() for key in ("input_ids", "labels", "attention_mask")]
    rows = []
    for start, ids, labels, shown in zip(find_prompt_ends(batch)[:MADE_UP], *tensors, strict=True):
        ids, labels = ids[: sum(shown)], labels[: sum(shown)]
        whole = any(label != IGNORED for label in labels[:start])
        asked = ids if whole else ids[:start]
        words = WORD.findall(str(tokenizer.decode(asked, skip_special_tokens=True)))
        named = sorted({word for word in words if is_name(word)} or set(words))
        for _ in range(math.ceil(MADE_UP / len(tensors[0]))):
            names = {word: _make_up(word, letters, generator) for word in named}
            rows.append(_rename(ids, labels, names, tokenizer, batch["labels"].shape[1]))
    return join_batches(*rows) | {"texts": torch.arange(len(rows))}


def _make_up(word: str, letters: str, generator: random.Random) -> str:
    """Replace each letter and digit by another one of its kind."""
    made = ""
    for char in word:
        kind = next((kind for kind in (VOWELS, CONSONANTS, DIGITS) if char.lower() in kind), letters)
        choice = kind.replace(char.lower(), "") if char.isalnum() else ""
        new = generator.choice(choice or char)
        made += new.upper() if char.isupper() else new
    return made


def _rename(
    ids: list[int],
    labels: list[int],
    names: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
) -> Batch:
    """The row with other names, as a batch of one: runs of tokens that count, and that do not, stay such."""
    special = set(tokenizer.all_special_ids)
    tokens: list[tuple[int, bool, bool]] = []
    keys = [(i in special, label != IGNORED) for i, label in zip(ids, labels, strict=True)]
    for (is_special, counts), run in groupby(zip(keys, ids, strict=True), key=lambda pair: pair[0]):
        part = [i for _, i in run]
        fresh = [False] * len(part)
        if not is_special:
            part, fresh = _replace(str(tokenizer.decode(part)), names, tokenizer)
        tokens += zip(part, [counts] * len(part), fresh, strict=True)
    # Made-up names can take more tokens; then the start of the prompt goes.
    tokens = tokens[-limit:]
    guessable = any(counts and not new for _, counts, new in tokens[1:])
    counted = [i if counts and not (new and guessable) else IGNORED for i, counts, new in tokens]
    return {
        "input_ids": torch.tensor([[i for i, _, _ in tokens]]),
        "attention_mask": torch.ones(1, len(tokens), dtype=torch.int64),
        "labels": torch.tensor([counted]),
    }


def _replace(
    text: str, names: Mapping[str, str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """The tokens of a text with other names, and whether each belongs to a name."""
    # A made-up name has the length of the name, so places stay.
    changed = WORD.sub(lambda match: names.get(match[0], match[0]), text)
    spans = [match.span() for match in WORD.finditer(text) if match[0] in names]
    encoded = tokenizer(changed, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    # Without offsets, which slow tokenizers do not have, names count as well.
    places = encoded.get("offset_mapping") or [(0, 0)] * len(encoded["input_ids"])
    fresh = [any(a < end and start < b for start, end in spans) for a, b in places]
    return encoded["input_ids"], fresh
