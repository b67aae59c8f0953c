"""Batches of token ids from texts."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from neumuter.texts.chat import has_two_forms, plain, render, uses_template
from neumuter.texts.rows import text_of
from neumuter.texts.store import Windows
from neumuter.texts.windows import cut_windows
from neumuter.types import IGNORED, Batch, Text, check_batch, check_kind, check_texts

logger = logging.getLogger("neumuter")

# Texts that are tokenised together, and their characters: of long texts there are fewer.
CHUNK_TEXTS, CHUNK_CHARACTERS = 1000, 1 << 20
# What fills a shorter row of each tensor of a batch.
PADDING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}


def encode(
    texts: Iterable[Any], tokenizer: PreTrainedTokenizerBase, max_length: int, chat: bool | None = None
) -> Batch:
    """Encode texts as one batch, padded on the right to the longest.

    Special tokens at the start are the tokenizer's own; an end token that it appends is left out. A prompt
    and its completion are tokenised together: these are the tokens that the model says. A token that holds
    characters of both counts.

    A text of more than ``max_length`` tokens takes several rows, in windows: each of its tokens counts in
    exactly one, and at least half a window of the text stands before it, except at the text's start. A
    prompt that does not fit into the window of its completion loses its start. Both are logged.

    Args:
        texts: as ``read_texts`` returns them, or rows with their columns.
        max_length: tokens of a row, at least 2.
        chat: whether prompts with completions, and conversations, go through the tokenizer's chat template.
            None: if it has one. False: a conversation becomes its messages, one a line.

    Returns:
        {"input_ids", "attention_mask", "labels"}, int64 [B, T] each. Labels are the ids, −100 on padding,
        on prompts, on start tokens, and on tokens that count in another row.

    Raises:
        TypeError, ValueError: one of the texts is no text, or has no token that can be predicted, because it
            has only one; or it must go through a chat template that does not exist or does not take it. The
            message names the text by its number from 1.
    """
    batch, _, notes = _encode(texts, tokenizer, max_length, chat)
    for note in notes:
        logger.warning(note)
    return batch


def encode_forms(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, max_length: int, chat: bool | None = None
) -> list[Batch]:
    """Encode texts in each form in which somebody can ask for them: through a chat template and without.

    Args:
        texts, tokenizer, max_length, chat: as in ``encode``.

    Returns:
        The batch that ``encode`` gives; and where a template applies, that of the other form. With chat=False
        this one has a text that the template refuses as it is, which is logged. They also have "texts",
        int64 [B]: the number from 0 of each row's text.
    """
    forms, notes = make_forms(texts, tokenizer, max_length, chat)
    for note in notes:
        logger.warning(note)
    return forms


def make_forms(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, max_length: int, chat: bool | None = None
) -> tuple[list[Batch], list[str]]:
    """Do as ``encode_forms``, but return what a user has to know instead of logging it."""
    batch, numbers, notes = _encode(texts, tokenizer, max_length, chat)
    forms = [batch | {"texts": torch.tensor(numbers)}]
    if has_two_forms(texts, tokenizer):
        refused: list[str] | None = [] if chat is False else None
        batch, numbers, _ = _encode(texts, tokenizer, max_length, chat is False, refused)
        forms.append(batch | {"texts": torch.tensor(numbers)})
        notes += describe_refused(refused)
    return forms, notes


def _encode(
    texts: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat: bool | None,
    refused: list[str] | None = None,
) -> tuple[Batch, list[int], list[str]]:
    """The batch, the number from 0 of each row's text, and what a user has to know."""
    rows, numbers, notes = [], [], list[str]()
    for text in cut_texts(texts, tokenizer, max_length, chat, notes, refused=refused):
        rows += text.windows
        numbers += [text.number] * len(text.windows)
    return make_batch(rows, find_padding(tokenizer)), numbers, notes


def make_batch(windows: Sequence[tuple[Sequence[int], int]], padding: int) -> Batch:
    """Make a batch of windows, each its ids and the position of the first that counts."""
    longest = max(len(ids) for ids, _ in windows)

    def padded(sequences: Iterable[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in sequences])

    return {
        "input_ids": padded((list(ids) for ids, _ in windows), padding),
        "attention_mask": padded(([1] * len(ids) for ids, _ in windows), 0),
        "labels": padded(([IGNORED] * first + list(ids[first:]) for ids, first in windows), IGNORED),
    }


def find_padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """Find the token id that fills up rows."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


class CutText(NamedTuple):
    """A text in windows.

    text: as it was given. number: from 0. windows: the ids of each, and the position of the first id that
    counts.
    """

    text: Any
    number: int
    windows: list[tuple[list[int], int]]


def cut_texts(
    texts: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat: bool | None,
    notes: list[str],
    before: int = 0,
    refused: list[str] | None = None,
) -> Iterator[CutText]:
    """Tokenise texts, ``CHUNK_TEXTS`` at a time, and cut them into windows; see ``encode``.

    Args:
        notes: has at the end what a user has to know.
        before: how many texts came before; numbers, also those in errors, go on from there.
        refused: takes up why the chat template refuses a text, which then goes without it. None raises.
    """
    check_kind("tokenizer", tokenizer, PreTrainedTokenizerBase, "a tokenizer of transformers")
    check_texts("texts", texts)
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    cut = lost = 0
    count = before
    chunks = _gather(_show(texts, tokenizer, chat, before, refused))
    parts = (part for chunk in chunks for part in zip(chunk, _tokenize_chunk(chunk, tokenizer), strict=True))
    for count, (shown, (ids, head, start)) in enumerate(parts, before + 1):
        windows = cut_windows(ids, start, head, max_length) if len(ids) > 1 else []
        if not windows:
            raise ValueError(
                f"text {count} has no token to predict within max_length={max_length}: {shown.text!r:.60}"
            )
        yield CutText(shown.text, count - 1, windows)
        cut += len(windows) > 1
        lost += windows[0][1] < start
    if count == before:
        raise ValueError("texts holds no text")
    if cut:
        notes.append(
            f"{cut} of {count} texts do not fit into {max_length} tokens: they are read in windows of that "
            "length, and each token counts in one of them."
        )
    if lost:
        notes.append(f"{lost} of {count} prompts do not fit into {max_length} tokens: they lose their start.")


def describe_refused(refused: Sequence[str] | None) -> list[str]:
    """Say of which texts there is one form alone; nothing where ``refused`` (see ``cut_texts``) is empty."""
    if not refused:
        return []
    return [
        f"{len(refused)} of the texts cannot go through the chat template, so they are measured without it: "
        f"{refused[0]}"
    ]


def store_windows(
    texts: Iterable[Any], tokenizer: PreTrainedTokenizerBase, max_length: int, chat: bool | None = None
) -> Windows:
    """Encode texts as ``encode`` does, one after the other, into a file: for more than fit into memory.

    Args:
        texts, tokenizer, max_length, chat: as of ``encode``; ``texts`` may be an iterator.

    Raises:
        TypeError, ValueError: as of ``encode``.
    """
    check_kind("tokenizer", tokenizer, PreTrainedTokenizerBase, "a tokenizer of transformers")
    windows, notes = Windows(find_padding(tokenizer)), list[str]()
    for text in cut_texts(texts, tokenizer, max_length, chat, notes):
        for ids, first in text.windows:
            windows.add(ids, first)
    for note in notes:
        logger.warning(note)
    return windows


def join_batches(*batches: Batch) -> Batch:
    """Join batches, one below the other, padded on the right to the widest."""
    for number, batch in enumerate(batches, 1):
        check_batch(f"batch {number}", batch)
    width = max(batch["labels"].shape[1] for batch in batches)
    return {
        name: torch.cat(
            [F.pad(batch[name].cpu(), (0, width - batch[name].shape[1]), value=value) for batch in batches]
        )
        for name, value in PADDING.items()
    }


def join_windows(windows: Windows | Batch | None, batches: Sequence[Batch]) -> Windows | Batch:
    """Join the rows of batches to windows, which are changed in place; without ``Windows``, to a batch."""
    if not isinstance(windows, Windows):
        return join_batches(*([windows] if windows else []), *batches)
    for batch in batches:
        windows.add_rows(batch)
    return windows


def count_rows(batch: Batch | Windows) -> int:
    """Count the rows of a batch, or windows."""
    return len(batch) if isinstance(batch, Windows) else len(batch["labels"])


def count_tokens(batch: Batch | Windows) -> int:
    """Count the tokens of a batch, or of windows, whether they count in losses or not."""
    return batch.tokens if isinstance(batch, Windows) else int(batch["attention_mask"].sum())


def sample_rows(batch: Batch | Windows, count: int, seed: int) -> Batch:
    """Draw ``count`` rows of a batch at random, in their order; all of them if there are no more."""
    total = count_rows(batch)
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    if isinstance(batch, Windows):
        return batch.rows(drawn.tolist())
    if total <= count:
        return batch
    return {name: value[drawn] for name, value in batch.items()}


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Tokenise a text that a model is to continue: without the end token that some tokenizers append.

    Returns:
        The ids; and how many of them, at the start, the tokenizer has put before the text.
    """
    # verbose=False keeps transformers from warning of texts that are too long for the model.
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    inner: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return _without_end(ids, inner)


def _without_end(ids: list[int], inner: list[int]) -> tuple[list[int], int]:
    """What ``tokenize`` returns, given the ids with special tokens and without."""
    for head in range(len(ids) - len(inner) + 1):
        if ids[head : head + len(inner)] == inner:
            return ids[: head + len(inner)], head
    return ids, 0


class _Shown(NamedTuple):
    """A text as a model is shown it.

    text: as it was given. whole: all of it. prompt: what of this comes before the part that counts; None if
    all counts. rendered: whether a chat template has put it so, which writes the start token itself.
    """

    text: Any
    whole: str
    prompt: str | None
    rendered: bool


def _show(
    texts: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    chat: bool | None,
    before: int,
    refused: list[str] | None,
) -> Iterator[_Shown]:
    for count, given in enumerate(texts, before + 1):
        try:
            text = text_of(given)
            if isinstance(text, str):
                shown = _Shown(given, text, None, False)
            else:
                rendered = uses_template(text, tokenizer, chat)
                prompt, completion = plain(text)
                if rendered:
                    try:
                        prompt, completion = render(text, tokenizer)
                    except ValueError as error:
                        if refused is None:
                            raise ValueError(f"{error}; chat=False (--no-chat) asks without it") from None
                        refused.append(f"text {count}: {error}")
                        rendered = False
                shown = _Shown(given, prompt + completion, prompt, rendered)
        except (TypeError, ValueError) as error:
            raise type(error)(f"text {count}: {error}") from None
        yield shown


def _gather(texts: Iterable[_Shown]) -> Iterator[list[_Shown]]:
    """Yield texts ``CHUNK_TEXTS`` at a time, or fewer of ``CHUNK_CHARACTERS`` together."""
    chunk, characters = list[_Shown](), 0
    for text in texts:
        chunk.append(text)
        characters += len(text.whole)
        if len(chunk) == CHUNK_TEXTS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _tokenize_chunk(
    texts: Sequence[_Shown], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], int, int]]:
    """Yield of each text its ids, how many start tokens they have, and the first that counts."""

    def run(strings: list[str], **options: bool) -> dict[str, list[Any]]:
        # verbose=False: see ``tokenize``. Masks are made of the ids here.
        options |= {"verbose": False, "return_attention_mask": False, "return_token_type_ids": False}
        return dict(tokenizer(strings, **options)) if strings else {"input_ids": []}

    pairs = any(text.prompt is not None for text in texts)
    offsets = {"return_offsets_mapping": True} if pairs and tokenizer.is_fast else {}
    inside = run([text.whole for text in texts], add_special_tokens=False, **offsets)
    special = iter(run([text.whole for text in texts if not text.rendered])["input_ids"])
    prompts = [text.prompt for text in texts if text.prompt is not None and not tokenizer.is_fast]
    alone = iter(run(prompts, add_special_tokens=False)["input_ids"])
    for number, text in enumerate(texts):
        inner: list[int] = inside["input_ids"][number]
        if text.rendered:
            ids, head = inner, int(inner[:1] == [tokenizer.bos_token_id])
        else:
            ids, head = _without_end(next(special), inner)
        if text.prompt is None:
            yield ids, head, head
            continue
        # A template's start token is one of the text's own.
        own = ids if text.rendered else ids[head:]
        if offsets:
            ends = (end for _, end in inside["offset_mapping"][number])
            before = next((i for i, end in enumerate(ends) if end > len(text.prompt)), len(own))
        else:
            before = _count_shared(own, next(alone))
        yield ids, head, before if text.rendered else head + before


def _count_shared(ids: Sequence[int], prompt: Sequence[int]) -> int:
    """Count the tokens at the start of ``ids`` that are those of the prompt alone."""
    return next((i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), len(prompt))
