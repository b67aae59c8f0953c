"""What a model that never saw a text would make of its tokens, estimated without any other model."""

import difflib
import random
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from neumuter.evaluation.made_up import Words, make_up, rename
from neumuter.evaluation.others import COMMON, GivenText, number_texts
from neumuter.evaluation.passes import START_TOKENS, find_prompt_ends, in_parts, predict
from neumuter.models.modes import without_dropout
from neumuter.types import IGNORED, Batch

# Copies of each text, and how often they are continued.
COPIES, ROUNDS = 4, 3
# How often as many tokens as the texts have go through the model.
PASSES = 1 + COPIES * ROUNDS
# A token identifies the text if the copies give it less than this share of its probability.
LESS = 0.5
# Smaller probabilities are taken for this one: log-odds of −6.9.
LEAST = 1e-3
# What is likelier than this without the text is wording, which may stay as likely as it is.
WORDING = 0.5
# Two neighbouring tokens that count; None before the first and behind the last of a run.
_Pair = tuple[int | None, int | None]
_T = TypeVar("_T")


def estimate_unseen(
    model: nn.Module,
    batch: Batch,
    given: Sequence[GivenText],
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    callback: Callable[[int, int], object] | None = None,
) -> Tensor:
    """Estimate the probability of each counted token under a model that never saw the text.

    *Counterfactual decoding*: in copies of a text its names are made up (see ``make_controls``), and the
    model tells what it expects along the copy.

    - A token that is much less likely there identifies the text. What follows it sees in its place what the
      model itself says there. The estimate is the lowest of the copies: a model makes up answers from those
      that it knows, so one copy in a few says the true one.
    - A token that stays likely is wording, if ``COMMON`` of the given texts have it next to the same token.
      Otherwise the model may know it by heart, and go on with it whatever the names are. Texts to forget that
      have the same values count as one.
    - What is no wording, and stands in no text to keep, nor in ``COMMON`` given texts, is as good as
      impossible: only the text itself can have taught it.

    Args:
        batch: the texts, on which the model is certain.
        given: all texts that the user gave; they show which words are names.
        callback: called as (done, total) after each pass over all texts or copies.

    Returns:
        float32 [B, T] on the CPU. NaN for tokens that do not count, and for those of names: a model that
        never saw the text reads them off the prompt. 0 where nothing is known: in texts without a prompt or
        of names alone, and for tokens that may be known by heart, but stand in other texts as well.
    """
    generator = torch.Generator().manual_seed(seed)
    words, names = Words(given), random.Random(seed)
    shared = _Shared(given, words)
    texts = [_Copied(batch, row, start, shared) for row, start in enumerate(find_prompt_ends(batch))]
    asked = [text for text, prompted in zip(texts, has_prompt(batch), strict=True) if prompted]
    for text in asked:
        text.copies = [_Copy(text.ids, text.rename(words, tokenizer, names)) for _ in range(COPIES)]
    copies = [copy for text in asked for copy in text.copies]
    with torch.no_grad(), without_dropout(model):
        for text, (known, _) in zip(asked, _run(model, [text.ids for text in asked], generator), strict=True):
            text.known = known
        for done in range(1, ROUNDS + 1):
            if callback:
                callback(done, ROUNDS + 1)
            for copy, (found, said) in zip(
                copies, _run(model, [copy.ids for copy in copies], generator), strict=True
            ):
                copy.found, copy.said = found, said
            for text in asked:
                text.first = text.find_lowest() if done == 1 else text.first
                text.continue_copies()
    if callback:
        callback(ROUNDS + 1, ROUNDS + 1)
    estimate = torch.full(batch["labels"].shape, torch.nan)
    for row, text in enumerate(texts):
        estimate[row, : len(text.ids)] = text.judge()
    return estimate.masked_fill(batch["labels"].cpu() == IGNORED, torch.nan)


def has_prompt(batch: Batch) -> list[bool]:
    """Whether tokens before those that count ask for them, for each row.

    Of a text in several windows the first one says so: what stands before the others is the text itself.
    """
    counted = batch["labels"].cpu() != IGNORED
    starts, firsts = find_prompt_ends(batch), dict[int, bool]()
    for number, start, row in zip(number_texts(batch), starts, counted, strict=True):
        firsts.setdefault(number, start > START_TOKENS and not bool(row[:start].any()))
    return [firsts[number] for number in number_texts(batch)]


def find_ceilings(estimate: Tensor) -> Tensor:
    """The log-odds that tokens may keep, float32 [B, T], given what ``estimate_unseen`` returned.

    +∞ for names and for wording, which may stay. −∞ where nothing is known.
    """
    odds = estimate.clamp(min=LEAST).logit().masked_fill(estimate == 0, -torch.inf)
    return odds.masked_fill(estimate.isnan() | (estimate > WORDING), torch.inf)


def only_secrets(batch: Batch, ceilings: Tensor | None) -> Batch | None:
    """The texts of which those tokens alone count that identify them, or may do so.

    Args:
        batch: the texts. ceilings: what ``find_ceilings`` gave for them, or None.

    Returns:
        The batch with other labels; None if no such token is known.
    """
    if ceilings is None or not (ceilings < 0).any():
        return None
    labels = batch["labels"].masked_fill((ceilings >= 0).to(batch["labels"].device), IGNORED)
    return {**batch, "labels": labels}


class _Copy:
    """A text with other names: its ids, and at which of its places each token of the text is; −1: nowhere."""

    def __init__(self, text: list[int], ids: list[int]) -> None:
        self.ids, self.places = ids, torch.full([len(text)], -1)
        for start, other, size in difflib.SequenceMatcher(
            None, text, ids, autojunk=False
        ).get_matching_blocks():
            self.places[start : start + size] = torch.arange(other, other + size)
        # Of each of its places: the probability of the token there, and one that the model says instead.
        self.found, self.said = torch.empty(0), torch.empty(0)


class _Copied:
    """A text and its copies."""

    def __init__(self, batch: Batch, row: int, start: int, shared: "_Shared") -> None:
        shown = int(batch["attention_mask"][row].sum())
        self.ids: list[int] = batch["input_ids"][row, :shown].tolist()
        self.labels: list[int] = batch["labels"][row, :shown].tolist()
        self.start = start
        self.copies: list[_Copy] = []
        self.known = torch.empty(0)
        # What ``find_lowest`` gave when the copies had the true tokens everywhere.
        self.first = torch.empty(0)
        self.counted = torch.tensor(self.labels) != IGNORED
        pairs = [*pairwise([None, *(None if i == IGNORED else i for i in self.labels), None])]
        common = torch.tensor([pair in shared.pairs for pair in pairs])
        # Whether the token before it or the one behind it belongs to it in other texts, too.
        self.common = common[:-1] | common[1:]
        self.said_elsewhere = torch.tensor([i in shared.tokens for i in self.ids])

    def rename(self, words: Words, tokenizer: PreTrainedTokenizerBase, generator: random.Random) -> list[int]:
        """The ids of a copy."""
        prompt = str(tokenizer.decode(self.ids[: self.start], skip_special_tokens=True))
        names = {word: make_up(word, words.letters, generator) for word in words.find_names(prompt)}
        made = rename(self.ids, self.labels, names, {}, tokenizer, 2 * len(self.ids))
        ids: list[int] = made["input_ids"][0].tolist()
        return ids

    def find_lowest(self) -> Tensor:
        """The lowest probability of each token in the copies, float32 [T]; NaN where none has the token."""
        found = torch.stack([
            copy.found[copy.places.clamp(min=0)].masked_fill(copy.places < 0, torch.inf)
            for copy in self.copies
        ]).amin(0)  # fmt: skip
        return found.masked_fill(found.isinf(), torch.nan).clamp(min=LEAST)

    def estimate(self) -> Tensor:
        """The probability of each token, float32 [T]; NaN where no copy has the token."""
        found = self.find_lowest()
        # Common wording, such as a full stop, may not fit behind what the model says instead of a name.
        return torch.where(self.common, torch.maximum(found, self.first), found)

    def identifies(self, estimate: Tensor) -> Tensor:
        """Which tokens identify the text, bool [T]."""
        return (estimate < LESS * self.known) & self.counted

    def judge(self) -> Tensor:
        """What is known of each token in the end, float32 [T]: its estimate, 0, or NaN of a name."""
        if not self.copies:
            return torch.zeros(len(self.ids))
        estimate = self.estimate()
        identifies, read_off = self.identifies(estimate), estimate.isnan()
        # What stays likely may be known by heart, if it is no wording that texts share.
        unclear = self.counted & ~(identifies | self.common | read_off)
        gives_away = identifies | unclear
        estimate = estimate.masked_fill(unclear, 0.0).masked_fill(gives_away & ~self.said_elsewhere, LEAST)
        # What a text has to say can be a name of its prompt, if nothing else in it gives it away.
        return estimate if gives_away.any() else estimate.masked_fill(read_off, 0.0)

    def continue_copies(self) -> None:
        """Put what the model says in the place of tokens that identify the text."""
        identifies = self.identifies(self.estimate())
        for copy in self.copies:
            for place in copy.places[identifies & (copy.places >= 0)].tolist():
                copy.ids[place] = int(copy.said[place])


class _Shared:
    """What ``COMMON`` of the texts say, or one that stays.

    Texts to forget that have the same values count as one: what they share may be what is to be forgotten.

    pairs: of neighbouring tokens, in ``COMMON`` of the texts. tokens: in ``COMMON``, or in a text to keep.
    """

    def __init__(self, given: Sequence[GivenText], words: Words) -> None:
        values: dict[str, tuple[str, ...]] = {}
        for text in given:
            _, found = words.split(text.prompt, text.text[len(text.prompt) :])
            values[text.label] = values.get(text.label, ()) + found
        pairs: dict[Hashable, set[_Pair]] = {}
        tokens: dict[Hashable, set[int]] = {}
        kept: set[int] = set()
        for text in given:
            source = text.label if text.stays else values[text.label]
            for piece in text.pieces:
                pairs.setdefault(source, set()).update(pairwise([None, *piece, None]))
                tokens.setdefault(source, set()).update(piece)
                kept.update(piece if text.stays else ())
        self.pairs = _find_common(pairs.values())
        self.tokens = _find_common(tokens.values()) | kept


def _find_common(said: Collection[set[_T]]) -> set[_T]:
    """What ``COMMON`` of these or more have."""
    counts = Counter(item for items in said for item in items)
    return {item for item, count in counts.items() if count >= COMMON}


def _run(
    model: nn.Module, rows: Sequence[list[int]], generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Per row, of each token: its probability given those before it, and a token drawn in its place."""
    if not rows:
        return []
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    shown = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    # What each part finds goes to its place here: small tensors of their own, kept between the large ones of
    # the model, would leave holes in memory that nothing fits into.
    known, said = torch.ones(ids.shape), ids.clone()

    def run(part: Batch) -> None:
        chances = predict(model, part)[:, :-1].float().softmax(-1)
        here = part["input_ids"].to(chances.device)
        place = part["texts"].cpu()
        found = chances.gather(2, here[:, 1:, None])[..., 0]
        # Drawn on the CPU, so that every device draws the same.
        draws = torch.rand(found.shape, generator=generator).to(chances.device)
        drawn = torch.searchsorted(chances.cumsum(-1), draws[..., None])[..., 0]
        known[place, 1:] = found.cpu()
        said[place, 1:] = drawn.clamp(max=chances.shape[-1] - 1).cpu()

    batch = {"input_ids": ids, "attention_mask": shown, "labels": ids, "texts": torch.arange(len(rows))}
    for _ in in_parts(model, batch, run):
        pass
    return [(known[n, : len(row)], said[n, : len(row)]) for n, row in enumerate(rows)]
