"""Made-up names: which words of texts are names and values, and what can stand in their place."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import regex
import torch
from transformers import PreTrainedTokenizerBase

from neumuter.evaluation.others import GivenText
from neumuter.types import IGNORED, Batch

# What at most this share of the texts has is a name; with fewer texts than these nobody can tell.
RARE_SHARE, FEW_TEXTS = 0.1, 10
# A word that more of the texts have is none, if there are no texts to keep that would show it.
COMMON_SHARE = 0.5
# Behind these a sentence begins, whose first word has a capital letter whatever it is.
ENDS = frozenset(".!?:…\n")
VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"
# Scripts that write no spaces between words: there each letter is one, with its marks.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORD = regex.compile(rf"[{UNSPACED}]\p{{M}}*|[\p{{L}}\p{{M}}\p{{N}}_--[{UNSPACED}]]+", regex.V1)


class Words:
    """Which words of texts are names, which are common, and which values their completions have.

    Names are the words that few texts have. What more texts have is a name as well if it looks like one (it
    has a digit, or a capital letter inside a sentence, or its script has no capital letters) and no text to
    keep has it: there may be several texts about everybody. Of fewer than ten texts those words are names
    that have a capital letter or a digit, which not all scripts have.
    """

    def __init__(self, given: Sequence[GivenText]) -> None:
        # Windows of one text have one label.
        by_text: dict[str, set[str]] = {}
        for text in given:
            by_text.setdefault(text.label, set()).update(WORD.findall(text.text))
        self.few, self.size = len(by_text) < FEW_TEXTS, len(by_text)
        self.counts = Counter(word for words in by_text.values() for word in words)
        self.kept = {word for text in given if text.stays for word in WORD.findall(text.text)}
        self.inside = {word for text in given for word in _inside_sentences(text.text)}
        letters = {char.lower() for text in given for char in text.text if char.isalpha()}
        # Of other scripts than Latin, those letters that the texts have.
        self.letters = "".join(sorted(char for char in letters if ord(char) > 127))
        # Of each wording, the values of the texts that have it, and whether only texts to keep have them.
        self.worded_alike: dict[tuple[str, ...], dict[tuple[str, ...], bool]] = {}
        for text in given:
            wording, values = self.split(text.prompt, text.text[len(text.prompt) :])
            alike = self.worded_alike.setdefault(wording, {})
            alike[values] = text.stays and alike.get(values, True)

    def is_name(self, word: str) -> bool:
        marked = any(char.isupper() or char.isdigit() for char in word)
        if self.few:
            return marked
        if self.counts[word] <= RARE_SHARE * self.size:
            return True
        if not (marked or word.lower() == word.upper()) or word not in self.inside:
            return False
        return word not in self.kept if self.kept else self.counts[word] <= COMMON_SHARE * self.size

    def find_names(self, prompt: str) -> list[str]:
        """The names in a prompt; all its words where it has none."""
        asked = set(WORD.findall(prompt))
        return sorted(set(filter(self.is_name, asked)) or asked)

    def split(self, prompt: str, completion: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The wording of a completion, with gaps for names and values; and the values."""
        asked, wording, values = set(WORD.findall(prompt)), [], []
        for word in WORD.findall(completion):
            rare = self.is_name(word)
            if rare and word not in asked:
                values.append(word)
            # No word is written so.
            wording.append(word if not rare else "(name)" if word in asked else "(value)")
        return tuple(wording), tuple(values)

    def find_values(self, prompt: str, completion: str) -> list[tuple[int, int]]:
        """Where the values of a completion are: (start, end) of the characters of each."""
        asked = set(WORD.findall(prompt))
        return [
            match.span() for match in WORD.finditer(completion)
            if match[0] not in asked and self.is_name(match[0])
        ]  # fmt: skip

    def swap(self, prompt: str, completion: str, generator: random.Random) -> tuple[dict[str, str], bool]:
        """Draw for each value of a completion that of another text that is worded alike.

        Returns:
            {old: new}, and whether the new values are those of texts to keep alone.
        """
        wording, values = self.split(prompt, completion)
        others = {
            found: stays for found, stays in self.worded_alike.get(wording, {}).items() if found != values
        }
        if not others:
            return {}, False
        drawn = generator.choice(list(others))
        return dict(zip(values, drawn, strict=True)), others[drawn] and bool(values)


def _inside_sentences(text: str) -> Iterator[str]:
    """The words of a text that do not begin a sentence."""
    last = None
    for match in WORD.finditer(text):
        if last is not None and ENDS.isdisjoint(text[last : match.start()]):
            yield match[0]
        last = match.end()


def make_up(word: str, letters: str, generator: random.Random) -> str:
    """Replace each letter and digit by another one of its kind."""
    made = ""
    for char in word:
        kind = next((kind for kind in (VOWELS, CONSONANTS) if char.lower() in kind), letters)
        if char.isdecimal():
            kind = "".join(chr(ord(char) - int(char) + digit) for digit in range(10))
        choice = kind.replace(char.lower(), "") if char.isalnum() else ""
        new = generator.choice(choice or char)
        made += new.upper() if char.isupper() else new
    return made


def rename(
    ids: list[int],
    labels: list[int],
    names: Mapping[str, str],
    values: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
) -> Batch:
    """The row with other names and values, as a batch of one; without any, the row as it is.

    What counts, and what does not, stays such. A token that holds characters of both counts as its last one
    does.
    """
    special = set(tokenizer.all_special_ids)
    tokens: list[_Token] = []
    given = [_Token(i, label != IGNORED, False) for i, label in zip(ids, labels, strict=True)]
    for is_special, run in groupby(given, key=lambda token: token.id in special):
        part = list(run)
        tokens += part if is_special else _replace(part, names, values, tokenizer)
    # Other words can take more tokens; then the start of the prompt goes, behind the start tokens.
    head = next((place for place, token in enumerate(tokens) if token.id not in special), 0)
    tokens = tokens[:head] + tokens[max(head, head + len(tokens) - limit) :]
    guessable = any(token.counts and not token.new for token in tokens[1:])
    counted = [token.id if token.counts and not (token.new and guessable) else IGNORED for token in tokens]
    return {
        "input_ids": torch.tensor([[token.id for token in tokens]]),
        "attention_mask": torch.ones(1, len(tokens), dtype=torch.int64),
        "labels": torch.tensor([counted]),
    }


class _Token(NamedTuple):
    """A token of a row: whether it counts, and whether it belongs to a made-up name."""

    id: int
    counts: bool
    new: bool


def _replace(
    tokens: Sequence[_Token],
    names: Mapping[str, str],
    values: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
) -> list[_Token]:
    """The tokens of a text with other names and values."""
    ids = [token.id for token in tokens]
    text = _decode(ids, tokenizer)
    matches = [match for match in WORD.finditer(text) if match[0] in names or match[0] in values]
    if not matches:
        return list(tokens)
    counts = _mark_characters(tokens, text, tokenizer)
    # Of each character of the new text: whether it counts, and whether it belongs to a name.
    marks: list[tuple[bool, bool]] = []
    changed, last = "", 0
    for match in matches:
        start, end = match.span()
        new = names.get(match[0], values.get(match[0], ""))
        changed += text[last:start] + new
        marks += [(counted, False) for counted in counts[last:start]]
        # Of a longer word, the last character goes on.
        marks += [(counts[min(start + at, end - 1)], match[0] in names) for at in range(len(new))]
        last = end
    changed += text[last:]
    marks += [(counted, False) for counted in counts[last:]]
    made, start = [], 0
    encoded, ends = _encode(changed, tokenizer)
    for i, end in zip(encoded, ends, strict=True):
        # Several tokens may make up one character.
        inside = marks[start:end] or marks[:end][-1:] or marks[:1]
        made.append(_Token(i, inside[-1][0], any(new for _, new in inside)))
        start = end
    return _put_right(made, _encode(text, tokenizer)[0], tokens)


def _mark_characters(tokens: Sequence[_Token], text: str, tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Whether the token counts in which each character of ``text`` ends: bool [characters]."""
    marks: list[bool] = []
    for place, token in enumerate(tokens):
        if place + 1 == len(tokens) or tokens[place + 1].counts != token.counts:
            end = len(_decode([token.id for token in tokens[: place + 1]], tokenizer))
            marks += [token.counts] * (min(end, len(text)) - len(marks))
    return marks


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens of a text, and where each of them ends in it, in characters."""
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False
    )
    ids: list[int] = encoded["input_ids"]
    if tokenizer.is_fast:
        return ids, [end for _, end in encoded["offset_mapping"]]
    return ids, [len(_decode(ids[: place + 1], tokenizer)) for place in range(len(ids))]


def _put_right(made: list[_Token], alone: list[int], tokens: Sequence[_Token]) -> list[_Token]:
    """Begin as ``tokens`` do, if what was ``made`` of them begins as what their text is ``alone``.

    Some tokenizers put a space before any text, which is not there behind the special token of a chat.
    """
    pairs = zip(reversed(alone), (token.id for token in reversed(tokens)), strict=False)
    shared = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(alone), len(tokens)))
    head = len(alone) - shared
    if [token.id for token in made[:head]] != alone[:head]:
        return made
    return [*tokens[: len(tokens) - shared], *made[head:]]
