"""Made-up names: which words of texts are names and values, and what can stand in their place."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

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
    """The row with other names and values, as a batch of one.

    Runs of tokens that count, and that do not, stay such.
    """
    special = set(tokenizer.all_special_ids)
    tokens: list[tuple[int, bool, bool]] = []
    keys = [(i in special, label != IGNORED) for i, label in zip(ids, labels, strict=True)]
    for (is_special, counts), run in groupby(zip(keys, ids, strict=True), key=lambda pair: pair[0]):
        part = [i for _, i in run]
        fresh = [False] * len(part)
        if not is_special:
            part, fresh = _replace(str(tokenizer.decode(part)), names, values, tokenizer)
        tokens += zip(part, [counts] * len(part), fresh, strict=True)
    # Other words can take more tokens; then the start of the prompt goes, behind the start tokens.
    head = next((place for place, (i, _, _) in enumerate(tokens) if i not in special), 0)
    tokens = tokens[:head] + tokens[max(head, head + len(tokens) - limit) :]
    guessable = any(counts and not new for _, counts, new in tokens[1:])
    counted = [i if counts and not (new and guessable) else IGNORED for i, counts, new in tokens]
    return {
        "input_ids": torch.tensor([[i for i, _, _ in tokens]]),
        "attention_mask": torch.ones(1, len(tokens), dtype=torch.int64),
        "labels": torch.tensor([counted]),
    }


def _replace(
    text: str, names: Mapping[str, str], values: Mapping[str, str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """The tokens of a text with other names and values, and whether each belongs to a name."""
    changed, spans, last = "", [], 0
    for match in WORD.finditer(text):
        word = match[0]
        changed += text[last : match.start()]
        if word in names:
            spans.append((len(changed), len(changed) + len(names[word])))
        changed += names.get(word, values.get(word, word))
        last = match.end()
    changed += text[last:]
    encoded = tokenizer(changed, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    # Without offsets, which slow tokenizers do not have, names count as well.
    places = encoded.get("offset_mapping") or [(0, 0)] * len(encoded["input_ids"])
    fresh = [any(a < end and start < b for start, end in spans) for a, b in places]
    return encoded["input_ids"], fresh
