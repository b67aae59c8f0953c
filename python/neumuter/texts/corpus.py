"""Texts of any number, read once: all their windows in a file, and a sample of them in memory."""

import logging
from array import array
from collections.abc import Mapping
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from neumuter.texts.duplicates import hash_text
from neumuter.texts.encoding import count_rows, cut_texts, describe_refused, find_padding
from neumuter.texts.sampling import WindowSample
from neumuter.texts.sources import TextSource, collect_texts, stream_texts
from neumuter.texts.store import Windows
from neumuter.types import Batch, Text

# What looks at windows one by one looks at so many; at a random sample where there are more.
SAMPLED = 1024

logger = logging.getLogger("neumuter")


class Corpus(NamedTuple):
    """Texts that were read once.

    windows: of all texts; where a batch of token ids was given, this batch. forms: ``SAMPLED`` windows drawn
    at random, or all if there are no more, in all forms: see ``WindowSample.forms``; or the batch. Of a long
    text only some windows may be among them. total: the number of all texts. prompted: whether a text has a
    prompt; of a batch nobody knows. hashes: of all texts what ``hash_text`` returns, int64 [total], 8 bytes
    each; of a batch there are none. texts: those of the windows in ``forms``, if they were to be kept; or the
    batch.
    """

    windows: Windows | Batch
    forms: list[Batch]
    total: int
    prompted: bool | None
    hashes: torch.Tensor
    texts: list[Text] | Batch

    @property
    def all_seen(self) -> bool:
        """Whether all windows are in ``forms``."""
        return count_rows(self.windows) == count_rows(self.forms[0])


def read_corpus(
    name: str,
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    chat: bool | None,
    seed: int,
    keeps_texts: bool = False,
) -> Corpus:
    """Read the texts of the argument ``name``, of which only the sample and an index stay in memory.

    Memory holds 16 bytes of each window and 8 of each text, beside the sample.

    Args:
        source: see ``collect_texts``. max_length, chat: see ``encode``. seed: draws the sample.
        tokenizer: may be None for a batch of token ids.
        keeps_texts: whether the texts of the sample stay in memory as well.

    Raises:
        TypeError, ValueError: as of ``collect_texts`` and ``encode``; the message has the name.
    """
    if isinstance(source, Mapping):
        batch = collect_texts(name, source)
        assert isinstance(batch, dict)
        return Corpus(batch, [batch], count_rows(batch), None, torch.empty(0, dtype=torch.int64), batch)
    if tokenizer is None:
        raise ValueError("tokenizer must be given: texts, and texts that the model says, are encoded by it")
    sample = WindowSample(SAMPLED, tokenizer, max_length, chat, seed, keeps_texts)
    windows, hashes, notes = Windows(find_padding(tokenizer)), array("q"), list[str]()
    try:
        for text in cut_texts(stream_texts(name, source), tokenizer, max_length, chat, notes):
            for ids, first in text.windows:
                windows.add(ids, first)
            hashes.append(hash_text(text.text))
            sample.show(text)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(name) else f"{name}: {message}") from None
    for note in notes + describe_refused(sample.refused):
        logger.warning("%s: %s", name, note)
    found = Corpus(
        windows,
        sample.forms(),
        len(hashes),
        sample.prompted,
        torch.frombuffer(hashes, dtype=torch.int64),
        sample.kept_texts(),
    )
    if not found.all_seen:
        seen = len(found.forms[0]["texts"].unique())
        share = describe_sample(len(found.forms[0]["texts"]), len(windows), seen, found.total)
        logger.warning("%s: %s, drawn at random, are looked at one by one. The search has all.", name, share)
    return found


def describe_sample(windows: int, all_windows: int, texts: int, all_texts: int) -> str:
    """Say how many windows of how many texts are looked at."""
    if all_windows == all_texts:
        return f"{texts} of {all_texts} texts"
    return f"{windows} of {all_windows} windows, from {texts} of {all_texts} texts"
