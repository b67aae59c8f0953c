"""Whose text comes out instead: what a model says to a prompt can be somebody else's text."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from neumuter.evaluation.passes import find_prompt_ends
from neumuter.types import IGNORED, Batch

# A stretch of this number of tokens of a text gives it away, as its whole completion does.
STRETCH = 8
# A phrase that this number of given texts share is common wording, and gives nobody away.
COMMON = 3
# Where words have no spaces between them: Thai and Lao, Myanmar, Khmer, and CJK with what follows.
UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x10FFFF))


@dataclass(frozen=True)
class GivenText:
    """A text as the user gave it.

    label: its batch and its number from 1, such as "retain 7"; windows of one text have the same. text: all
    of it. prompt: its prompt.
    pieces: the token ids of each run of counted tokens after the prompt; mostly there is one.
    windows: how many windows the whole text has, given or not.
    """

    label: str
    text: str
    prompt: str
    pieces: list[list[int]]
    windows: int = 1

    @property
    def tokens(self) -> int:
        return sum(map(len, self.pieces))

    @property
    def stays(self) -> bool:
        """Whether it is a text to keep."""
        return _stays(self.label)


class Found(NamedTuple):
    """The label of the given text that came out, and the words of it."""

    label: str
    words: str

    @property
    def stays(self) -> bool:
        """Whether it is a text to keep."""
        return _stays(self.label)


def _stays(label: str) -> bool:
    return label.startswith("retain")


def write_ids(tokenizer: PreTrainedTokenizerBase | None) -> Callable[[Sequence[int]], str]:
    """Return what writes token ids as text: the tokenizer, or their numbers where there is none."""
    if tokenizer is None:
        return lambda ids: "".join(f"{i} " for i in ids)
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


def number_texts(batch: Batch) -> list[int]:
    """The number from 0 of each row's text."""
    numbers: list[int] = batch["texts"].tolist() if "texts" in batch else list(range(len(batch["labels"])))
    return numbers


def group_rows(batch: Batch) -> list[list[int]]:
    """The rows of each text, which has several where it is read in windows."""
    rows: dict[int, list[int]] = {}
    for row, number in enumerate(number_texts(batch)):
        rows.setdefault(number, []).append(row)
    return list(rows.values())


def count_windows(batch: Batch) -> list[int]:
    """How many windows each row's text has: as "windows" of the batch says, or else its rows."""
    if "windows" in batch:
        known: list[int] = batch["windows"].tolist()
        return known
    numbers = number_texts(batch)
    counts = Counter(numbers)
    return [counts[number] for number in numbers]


def list_given(batches: Mapping[str, Batch], tokenizer: PreTrainedTokenizerBase | None) -> list[GivenText]:
    """List the rows of batches, in order; see ``find_prompt_ends`` for what is a prompt."""
    write, found = write_ids(tokenizer), []
    for name, batch in batches.items():
        tensors = (batch[key].tolist() for key in ("input_ids", "labels", "attention_mask"))
        columns = number_texts(batch), count_windows(batch), find_prompt_ends(batch)
        for number, windows, start, ids, labels, shown in zip(*columns, *tensors, strict=True):
            ids = ids[: sum(shown)]
            runs = groupby(
                zip(ids[start:], labels[start:], strict=False), key=lambda pair: pair[1] != IGNORED
            )
            pieces = [[i for i, _ in run] for counts, run in runs if counts]
            label = f"{name} {number + 1}"
            found.append(GivenText(label, write(ids), write(ids[:start]), pieces, windows))
    return found


def find_others(
    asked: Sequence[GivenText],
    said: Sequence[Sequence[int]],
    given: Sequence[GivenText],
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[Found | None]:
    """Find in each continuation the text of another person, if there is one.

    That is the whole completion of a given text (each run of counted tokens, where there are several), or
    ``STRETCH`` tokens of it in a row. It does not count if the asked text has these words itself, if
    ``COMMON`` given texts have them, or if the given text goes on from the same prompt. Of several texts with
    the same words, one to keep is named.

    Args:
        asked: the texts whose prompts were continued.
        said: the token ids of each continuation.
        given: the texts that must not come out, the asked ones included.
        tokenizer: decodes; None compares token ids alone.
    """
    write = write_ids(tokenizer)
    spoken = [write(ids) for ids in said]
    candidates: list[dict[str, list[GivenText]]] = [{} for _ in said]
    owners: dict[str, list[GivenText]] = {}
    for text in given:
        # What a window of a longer text has is no whole completion: it can be a full stop.
        for piece in text.pieces if text.windows == 1 else ():
            owners.setdefault(write(piece).strip(), []).append(text)
    for words, texts in owners.items():
        for row, line in enumerate(spoken):
            if words and _holds(line, words):
                candidates[row][words] = texts
    for stretch, (rows, texts) in _common_stretches(said, given).items():
        for row in rows:
            candidates[row][write(stretch).strip()] = texts
    return [_first_of_another(text, found) for text, found in zip(asked, candidates, strict=True)]


def find_overlap(forget: Sequence[GivenText], retain: Sequence[GivenText]) -> list[tuple[GivenText, str]]:
    """Find the forget texts that a retain text equals, holds, or is a part of, and the retain text's label.

    Only parts of ``STRETCH`` tokens or more count.
    """
    kept = [(text.label, words, text.tokens) for text in retain if (words := _squeeze(text.text))]
    every = "\n".join(words for _, words, _ in kept)
    asked = [(text, _squeeze(text.text)) for text in forget]
    every_asked = "\n".join(words for _, words in asked)
    # Most texts are in no other one, which one search through all of them tells.
    parts = [(label, words) for label, words, size in kept if size >= STRETCH and words in every_asked]
    found = []
    for text, words in asked:
        inside = [label for label, part in parts if part in words]
        if words and words in every:
            inside += [
                label
                for label, whole, _ in kept
                if whole == words or (text.tokens >= STRETCH and _holds(whole, words))
            ]
        if inside:
            found.append((text, inside[0]))
    return found


def _common_stretches(
    said: Sequence[Sequence[int]], given: Sequence[GivenText]
) -> dict[tuple[int, ...], tuple[set[int], list[GivenText]]]:
    """Find the stretches that continuations share with given texts: {stretch: (rows, texts)}."""
    found: dict[tuple[int, ...], tuple[set[int], list[GivenText]]] = {}
    for row, ids in enumerate(said):
        for stretch in _stretches(ids):
            found.setdefault(stretch, (set(), []))[0].add(row)
    for text in given:
        for stretch in {stretch for piece in text.pieces for stretch in _stretches(piece)}:
            if stretch in found:
                found[stretch][1].append(text)
    return found


def _stretches(ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for start in range(len(ids) - STRETCH + 1):
        yield tuple(ids[start : start + STRETCH])


def _first_of_another(asked: GivenText, candidates: Mapping[str, Sequence[GivenText]]) -> Found | None:
    for words, texts in candidates.items():
        # A text that has several windows, or that is given twice, is one.
        distinct = {*{text.label: text.text for text in texts}.values()}
        if len(distinct) >= COMMON or words in asked.text:
            continue
        # What a text to keep has as well may be said.
        for text in sorted(texts, key=lambda text: not text.stays):
            own = text.label == asked.label or text.text == asked.text
            if not own and not text.prompt.startswith(asked.prompt):
                return Found(text.label, words)
    return None


def _holds(text: str, words: str) -> bool:
    """Whether ``text`` has these words, not as parts of longer ones."""
    start = text.find(words)
    while start >= 0:
        end = start + len(words)
        if not (_join(text[:start][-1:], words[0]) or _join(words[-1], text[end : end + 1])):
            return True
        start = text.find(words, start + 1)
    return False


def _join(first: str, second: str) -> bool:
    """Whether two characters, of which one may be none, belong to one word."""
    return all(map(_is_of_spaced_word, (first or " ", second or " ")))


def _is_of_spaced_word(char: str) -> bool:
    return char.isalnum() and not any(low <= ord(char) <= high for low, high in UNSPACED)


def _squeeze(text: str) -> str:
    return " ".join(text.split())
