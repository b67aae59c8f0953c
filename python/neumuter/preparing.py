"""What comes before training: the model is opened, texts are encoded and compared, and others are sampled."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neumuter.evaluation import find_overlap, list_given
from neumuter.evaluation.others import GivenText
from neumuter.models.content import describe_model, describe_tensors, digest_weights
from neumuter.models.loading import load_model, load_tokenizer
from neumuter.mutes.mute_set import MuteSet
from neumuter.recipes import FittedConfig, PaperConfig
from neumuter.recipes.schedule import count_unvisited
from neumuter.report.progress import Watch
from neumuter.texts import encode_forms
from neumuter.texts.corpus import Corpus
from neumuter.texts.duplicates import find_same, hash_text
from neumuter.texts.encoding import count_rows
from neumuter.texts.neighbours import sample_texts
from neumuter.training.processes import agree, check_same, describe_layout
from neumuter.types import Batch, Text, check_kind, check_model

# Neighbour texts that the model says itself where there are no others. Where there are, half of them, or half
# of the others if that is more: with fewer beside 240 answers, what else a model knows was lost. At most so
# many.
SAMPLES, MOST_SAMPLES = 32, 256
# Texts whose continuations the report shows, and that an error shows.
SHOWN_TEXTS = 4

logger = logging.getLogger("neumuter")


def open_network(
    model: nn.Module | str, tokenizer: PreTrainedTokenizerBase | str | None
) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    own = None
    if isinstance(model, str | Path):
        model, own = load_model(str(model))
    check_model(model)
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(str(tokenizer))
    kinds = (PreTrainedTokenizerBase, type(None))
    check_kind("tokenizer", tokenizer, kinds, "a tokenizer of transformers, its folder or name, or None")
    return model, tokenizer if tokenizer is not None else own


def compare_models(network: nn.Module, given: Mapping[str, object]) -> dict[str, str]:
    """Raise ValueError in all processes if they hold different models, or were given something else.

    given: {argument: what it is, or a digest}.

    Returns:
        The digests of the model's tensors; see ``neumuter.models.content``.
    """
    # Only processes with the same layout and shapes can gather the tensors.
    shape = {
        "the model's layout": describe_layout(network),
        "the shape of the model": describe_tensors(network),
    }
    check_same(lambda: {**given, **describe_model(network), **shape})
    weights = digest_weights(network)
    check_same(lambda: {f"{name} of the model": found for name, found in weights.items()})
    return weights


def need_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ValueError(
            "tokenizer must be given, because texts are encoded by it, also those that the model itself says"
        )
    return tokenizer


def encode_forms_of(
    name: str,
    texts: list[Text] | Batch,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    chat: bool | None,
) -> list[Batch]:
    """Encode the texts of the argument ``name`` in all their forms."""
    if isinstance(texts, dict):
        return [texts]
    try:
        return encode_forms(texts, need_tokenizer(tokenizer), max_length, chat)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def warn_of_missing(existing: MuteSet, slopes: int) -> None:
    """Warn if an existing mute set holds for more requests than there are slopes of."""
    told = existing.method.get("former")
    if told is None:
        return
    # One that was fitted anew holds for those alone of which it had slopes.
    requests = told if existing.method.get("recipe") == "refit" else told + 1
    if slopes < requests:
        logger.warning(
            "The existing mute set holds for %d requests, and there are slopes of %d: the texts of the "
            "others may come back.",
            requests,
            slopes,
        )


def warn_of_unvisited(config: FittedConfig | PaperConfig, mode: str, corpus: Corpus) -> None:
    """Warn if the steps that were asked for leave texts to forget out."""
    if isinstance(config, PaperConfig):
        return
    count = count_rows(corpus.windows)
    phases = [config.support, config.gains if mode == "modulate" else None]
    missed = min(
        (count_unvisited(count, phase.steps, phase.batch_size) for phase in phases if phase), default=0
    )
    if missed:
        logger.warning(
            "No step visits %d of %s: there are too few steps for so many. Ask for more steps, or for a "
            "larger batch_size; the default number of steps visits all.",
            missed,
            name_windows(corpus),
        )


def name_windows(corpus: Corpus) -> str:
    """Name the windows of a corpus to forget, as in "240 texts to forget"."""
    count = count_rows(corpus.windows)
    return f"{count} {'texts' if count == corpus.total else 'windows of texts'} to forget"


def refuse_overlap(
    given: Sequence[GivenText], same: Sequence[tuple[int, int]] = (), count: int | None = None
) -> None:
    """Raise ValueError that shows them if texts are to be forgotten and to be kept.

    Args:
        given: the texts that are looked at one by one; among them alone, one that is a part of another is
            found.
        same: the numbers from 0 of equal texts to forget and to keep, of all texts.
        count: the number of all texts to forget; by default those in ``given``.
    """
    forget = [text for text in given if text.label.startswith("forget")]
    retain = [text for text in given if text.label.startswith("retain")]
    overlap = {f"forget {number + 1}": f"retain {other + 1}" for number, other in same}
    overlap = dict((text.label, other) for text, other in find_overlap(forget, retain)) | overlap
    if overlap:
        words = {text.label: f": {text.text!r:.80}" for text in reversed(forget)}
        shown = [f"{label} and {other}{words.get(label, '')}" for label, other in overlap.items()]
        count = count or len(words)
        raise ValueError(
            f"{len(overlap)} of {count} texts to forget are among the texts to keep. A text cannot be "
            f"both: remove it from one of them. {'; '.join(shown[:SHOWN_TEXTS])}"
        )


def refuse_seen(
    controls: Batch, given: Sequence[GivenText], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Raise ValueError that shows one if controls are among the given texts."""
    if overlap := find_overlap(list_given({"controls": controls}, tokenizer), given):
        text, other = overlap[0]
        raise ValueError(
            f"controls must be texts that the model never saw, but {text.label} is {other}: {text.text!r:.80}"
        )


def refuse_same(controls: Sequence[Text], corpora: Mapping[str, Corpus]) -> None:
    """Raise ValueError that shows one if controls are among all texts of corpora, {name: corpus}."""
    hashes = torch.tensor([hash_text(text) for text in controls])
    for name, corpus in corpora.items():
        for number, other in find_same(hashes, corpus.hashes)[:1]:
            raise ValueError(
                f"controls must be texts that the model never saw, but controls {number + 1} is "
                f"{name} {other + 1}: {controls[number]!r:.80}"
            )


def count_samples(others: int) -> int:
    """Count the texts that the model itself says, beside so many others that are to be kept."""
    return min(MOST_SAMPLES, max(SAMPLES // 2, others // 2)) if others else SAMPLES


def sample_neighbours(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    barred: Batch | None,
    length: int,
    others: int,
    samples: int | None,
    seed: int,
    watch: Watch,
) -> list[Text]:
    """Neighbours of ``length`` tokens that the model itself says, with the mutes that are in force.

    ``others``: how many other texts are to be kept. ``samples``: None follows from them.
    """
    count = count_samples(others) if samples is None else samples
    if count < 0:
        raise ValueError(f"samples must be at least 0, got {count}")
    if count == 0:
        return []
    words = need_tokenizer(tokenizer)
    if others and not can_sample(words):
        logger.warning(
            "This tokenizer has no start token, so no texts are sampled from the model to be kept."
        )
        return []
    if not others:
        logger.warning(
            "There are no retain texts: texts sampled from the model itself stand in for them. They protect "
            "what else the model knows less well."
        )
    with watch("Sampling neighbours") as advance:
        return agree([*sample_texts(network, words, count, length, seed, advance, barred=barred)])


def can_sample(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether there is a token that texts of the model itself start with."""
    return tokenizer is not None and (tokenizer.bos_token_id, tokenizer.eos_token_id) != (None, None)
