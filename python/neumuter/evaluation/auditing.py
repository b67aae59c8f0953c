"""Which texts of a corpus a model knows by heart: a cheap pass over all, then a close look at some."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from neumuter.evaluation.controls import make_controls
from neumuter.evaluation.examination import examine
from neumuter.evaluation.language import losses_by_sample, refuse_nan
from neumuter.evaluation.membership import min_k_score
from neumuter.evaluation.memory import extracted
from neumuter.evaluation.others import group_rows, list_given, number_texts
from neumuter.evaluation.verdict import STANDS_OUT
from neumuter.models.loading import limit_length
from neumuter.texts import encode_forms
from neumuter.types import Batch, Text, check_texts

# Texts that are encoded and measured at a time.
TEXTS_AT_A_TIME = 256
# Texts that controls are made from, where none are given.
MODELS_OF_CONTROLS = 64


@dataclass(frozen=True)
class Known:
    """A text that a model knows better than texts that it never saw.

    number: its number in the corpus from 1. text: the text. kind: "by heart" if it comes out, "likely" if it
    does not, but is likelier than nearly all controls. extracted, sampled, loss, min_k: see ``Examination``.
    """

    number: int
    text: Text
    kind: str
    extracted: bool
    sampled: float
    loss: float
    min_k: float


class Audit(NamedTuple):
    """known: the texts that the model knows, those that come out first, then the likeliest ones. texts: the
    number of texts of the corpus. controls: the number of controls."""

    known: list[Known]
    texts: int
    controls: int


def audit(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    controls: Sequence[Text] | None = None,
    *,
    max_length: int = 256,
    chat: bool | None = None,
    seed: int = 0,
    callback: Callable[[int], object] | None = None,
) -> Audit:
    """Find the texts of a corpus that the model knows, so that they can be forgotten.

    A first pass measures each text in all forms in which somebody can ask for it. Those that come out in one,
    or that are likelier in one than 95 % (``STANDS_OUT``) of the controls by Min-40%, are examined.

    Args:
        model: the model as it is now.
        tokenizer: its tokenizer.
        texts: the corpus, as ``neumuter.texts.read_texts`` returns it; it is read once, in order.
        controls: texts of the same kind that the model never saw. None makes them from the first texts of the
            corpus, by other names and values.
        max_length, chat: as in ``neumuter.unlearn``.
        seed: seeds the controls.
        callback: called with the number of texts measured so far.

    Raises:
        ValueError: there is no text, or no control, or one cannot be encoded.
        TypeError: ``texts`` or ``controls`` is one text, or the name of a file.
        RuntimeError: the model predicts NaN.
    """
    check_texts("texts", texts)
    if controls is not None:
        check_texts("controls", controls)
    length = limit_length(model, max_length)
    options = (tokenizer, length, chat)
    rest = iter(texts)
    first = list(islice(rest, TEXTS_AT_A_TIME))
    if not first:
        raise ValueError("texts holds no text")
    if controls is None:
        shown = _encode("texts", first[:MODELS_OF_CONTROLS], *options)
        given = list_given({"texts": shown[0]}, tokenizer)
        unseen = make_controls(shown, given, tokenizer, length, seed)
    else:
        unseen = _encode("controls", controls, *options)
    levels = [_measure(model, form)[1].quantile(STANDS_OUT) for form in unseen]
    known, done = list[Known](), 0
    for part in chain([first], _parts(rest)):
        forms = _encode(f"texts {done + 1} to {done + len(part)}", part, *options)
        found = torch.zeros(len(part), dtype=torch.bool)
        for place, form in enumerate(forms):
            comes_out, min_k = _measure(model, form)
            # Controls without prompts have one form, where these texts may have two.
            found |= comes_out | (min_k > levels[min(place, len(levels) - 1)])
        if chosen := found.nonzero().flatten().tolist():
            candidates = {done + place + 1: part[place] for place in chosen}
            known += _look_closely(model, tokenizer, candidates, [_take(form, chosen) for form in forms])
        done += len(part)
        if callback:
            callback(done)
    known.sort(key=lambda text: (not text.extracted, -text.sampled, -text.min_k))
    return Audit(known, done, len(group_rows(unseen[0])))


def _parts(texts: Iterator[Text]) -> Iterator[list[Text]]:
    while part := list(islice(texts, TEXTS_AT_A_TIME)):
        yield part


def _encode(
    name: str, texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, max_length: int, chat: bool | None
) -> list[Batch]:
    """Do as ``encode_forms``; errors number the texts among those of this name."""
    try:
        return encode_forms(texts, tokenizer, max_length, chat)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _measure(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each text whether it, or a window of it, comes out, and its Min-40%: bool and float64 [texts]."""
    out, losses = extracted(model, batch).tolist(), losses_by_sample(model, batch)
    refuse_nan(model, losses)
    windows = group_rows(batch)
    return (
        torch.tensor([any(out[row] for row in rows) for rows in windows]),
        torch.tensor(
            [min_k_score(torch.cat([losses[row] for row in rows])) for rows in windows], dtype=torch.float64
        ),
    )


def _take(form: Batch, chosen: Sequence[int]) -> Batch:
    """The rows of some texts, which are counted anew."""
    places = {number: place for place, number in enumerate(chosen)}
    rows = [row for row, number in enumerate(number_texts(form)) if number in places]
    taken = {key: value[rows] for key, value in form.items()}
    return taken | {"texts": torch.tensor([places[number] for number in number_texts(taken)])}


def _look_closely(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Mapping[int, Text], forms: Sequence[Batch]
) -> Iterator[Known]:
    """Examine texts, {number in the corpus: text}, in all ``forms``."""
    found = examine(model, tokenizer, forms, list_given({"forget": forms[0]}, tokenizer))
    for row, (number, text) in enumerate(texts.items()):
        yield Known(
            number=number,
            text=text,
            kind="by heart" if found.extracted[row] else "likely",
            extracted=found.extracted[row],
            sampled=found.sampled[row],
            loss=found.loss[row],
            min_k=found.min_k[row],
        )
