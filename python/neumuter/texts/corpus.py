"""Texts of any number, read once: all their windows in a file, and a sample of them in memory."""

import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from neumuter.texts.encoding import make_forms, store_windows
from neumuter.texts.sources import TextSource, collect_texts, stream_texts
from neumuter.texts.store import Windows
from neumuter.types import Batch, Text

# What looks at texts one by one looks at so many; at a random sample where there are more.
SAMPLED = 1024

logger = logging.getLogger("neumuter")


class Corpus(NamedTuple):
    """Texts that were read once.

    windows: of all texts; where a batch of token ids was given, this batch. sample: ``SAMPLED`` texts drawn
    at random, or all if there are no more; or the batch. forms: the sample in all forms, as ``encode_forms``
    gives them, with the numbers that the texts have among all.
    """

    windows: Windows | Batch
    sample: list[Text] | Batch
    forms: list[Batch]


def read_corpus(
    name: str,
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    chat: bool | None,
    seed: int,
) -> Corpus:
    """Read the texts of the argument ``name``, of which only the sample and an index stay in memory.

    Args:
        source: see ``collect_texts``. max_length, chat: see ``encode``. seed: draws the sample.
        tokenizer: may be None for a batch of token ids.

    Raises:
        TypeError, ValueError: as of ``collect_texts`` and ``encode``; the message has the name.
    """
    if isinstance(source, Mapping):
        batch = collect_texts(name, source)
        assert isinstance(batch, dict)
        return Corpus(batch, batch, [batch])
    if tokenizer is None:
        raise ValueError("tokenizer must be given: texts, and texts that the model says, are encoded by it")
    sample: list[tuple[int, Text]] = []
    count = 0

    def watched(texts: Iterable[Text]) -> Iterator[Text]:
        # Vitter's algorithm R.
        nonlocal count
        generator = random.Random(seed)
        for count, text in enumerate(texts, 1):
            if count <= SAMPLED:
                sample.append((count - 1, text))
            elif (place := generator.randrange(count)) < SAMPLED:
                sample[place] = (count - 1, text)
            yield text

    try:
        windows = store_windows(watched(stream_texts(name, source)), tokenizer, max_length, chat)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(name) else f"{name}: {message}") from None
    if count > len(sample):
        logger.warning(
            "%s has %d texts: %d of them, drawn at random, are looked at one by one. The search has all.",
            name, count, len(sample),
        )  # fmt: skip
    sample.sort(key=lambda drawn: drawn[0])
    numbers, texts = torch.tensor([number for number, _ in sample]), [text for _, text in sample]
    forms, _ = make_forms(texts, tokenizer, max_length, chat)
    return Corpus(windows, texts, [form | {"texts": numbers[form["texts"]]} for form in forms])
