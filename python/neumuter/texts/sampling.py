"""Windows drawn at random while texts are read, so that no more than a sample of them is in memory."""

import random
from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from neumuter.texts.encoding import CutText, cut_texts, find_padding, make_batch
from neumuter.types import Batch, Text

# The ids of a window, and the position of the first that counts.
Window = tuple[Sequence[int], int]


class _Drawn(NamedTuple):
    """A window of the first form, and what the other form has of the same stretch of its text.

    forms: of each form the windows by their places in the text. counts: of each form the windows of the text.
    text: None unless texts are kept.
    """

    number: int
    forms: Sequence[Mapping[int, Window]]
    counts: list[int]
    text: Text | None


class WindowSample:
    """Draws ``size`` of all windows that it is shown, each with the same chance: all, if there are no more.

    Memory holds what is drawn, in each form in which somebody can ask for it: see ``encode_forms``.

    Args:
        max_length, chat: see ``encode``. seed: draws the sample.
        keeps_texts: whether the texts of the windows are kept as well.

    ``windows``: how many it was shown. ``prompted``: whether a text has a prompt. ``refused``: why the chat
    template refuses a text, which then has one form alone; None where it must not refuse any.
    """

    def __init__(
        self,
        size: int,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        chat: bool | None,
        seed: int,
        keeps_texts: bool = False,
    ) -> None:
        self.size, self.tokenizer, self.keeps_texts = size, tokenizer, keeps_texts
        self.windows = 0
        self.prompted = False
        self.refused: list[str] | None = [] if chat is False else None
        self._options = (tokenizer, max_length, chat is False)
        self._generator = random.Random(seed)
        self._drawn: list[_Drawn] = []

    def show(self, text: CutText) -> None:
        """Look at the windows of the next text; Vitter's algorithm R."""
        self.prompted |= not isinstance(text.text, str)
        forms = None
        for place in range(len(text.windows)):
            self.windows += 1
            spot = len(self._drawn)
            if spot == self.size:
                spot = self._generator.randrange(self.windows)
            if spot < self.size:
                forms = forms or self._find_forms(text)
                self._drawn[spot : spot + 1] = [self._draw(text, place, forms)]

    def forms(self) -> list[Batch]:
        """What was drawn, in the order of the texts: in each form a batch, as ``encode_forms`` makes it.

        "texts", int64 [B]: the number of each row's text among all. "windows", int64 [B]: how many windows
        its text has, drawn or not.
        """
        two = self.tokenizer.chat_template is not None and self.prompted
        return [self._make_form(which) for which in range(1 + two)]

    def kept_texts(self) -> list[Text]:
        """The texts of the windows, each once, in order."""
        found = {drawn.number: drawn.text for drawn in self._drawn if drawn.text is not None}
        return [found[number] for number in sorted(found)]

    def _find_forms(self, text: CutText) -> Sequence[Sequence[Window]]:
        if self.tokenizer.chat_template is None:
            return [text.windows]
        if isinstance(text.text, str):
            return [text.windows, text.windows]
        (other,) = cut_texts([text.text], *self._options, [], text.number, self.refused)
        return [text.windows, other.windows]

    def _draw(self, text: CutText, place: int, forms: Sequence[Sequence[Window]]) -> _Drawn:
        total, drawn = len(text.windows), []
        for form in forms:
            # Forms can differ in their number of windows. Those of the same share of the text go together.
            first, last = (of * len(form) // total for of in (place, place + 1))
            places = range(first, max(first + 1, last))
            drawn.append({i: (array("i", form[i][0]), form[i][1]) for i in places})
        kept = text.text if self.keeps_texts else None
        return _Drawn(text.number, drawn, [len(form) for form in forms], kept)

    def _make_form(self, which: int) -> Batch:
        found = {
            (drawn.number, place): (window, drawn.counts[which])
            for drawn in self._drawn
            for place, window in drawn.forms[which].items()
        }
        keys = sorted(found)
        batch = make_batch([found[key][0] for key in keys], find_padding(self.tokenizer))
        return batch | {
            "texts": torch.tensor([number for number, _ in keys]),
            "windows": torch.tensor([found[key][1] for key in keys]),
        }
