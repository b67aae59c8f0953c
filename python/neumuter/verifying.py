"""Do the requests of a ledger still hold, on the model that is served today?"""

import logging
import random
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from neumuter.evaluation import (
    Examination,
    Said,
    Verdict,
    ask_server,
    examine,
    find_overlap,
    judge_texts,
    list_given,
    make_controls,
)
from neumuter.evaluation.others import GivenText
from neumuter.evaluation.server import AllRefusedError
from neumuter.ledger import Ledger, Request
from neumuter.models.loading import limit_length
from neumuter.mutes.algebra import combine
from neumuter.mutes.matching import MuteMismatchError, matching_ffns
from neumuter.mutes.mute_set import MuteSet
from neumuter.preparing import encode_forms_of, refuse_seen
from neumuter.serving.live import mute
from neumuter.texts import collect_texts
from neumuter.texts.corpus import SAMPLED
from neumuter.texts.encoding import make_forms
from neumuter.texts.sources import TextSource
from neumuter.types import Batch, Text

HOLDS, FAILS, NEVER = "holds", "no longer holds", "never held"
MISSING, OTHER_MODEL, UNDONE = "texts missing", "cannot be applied", "undone"
# What a server says is less than what a model does.
BY_SERVER = "The server was asked greedily{}, without controls."

logger = logging.getLogger("neumuter")


@dataclass(frozen=True)
class Check:
    """What came of verifying one request.

    state: "holds" if all its texts are there and nothing comes out beyond the margins of the verdict; "no
    longer holds" if something does, or "never held" if something did when its newest mute set was added;
    "texts missing" if some of its texts are not there, and nothing comes out of the others; "cannot be
    applied" if its mute sets were made for other models; "undone". sentence: the reasons. verdict, texts,
    metrics, controls: what was found, ``metrics`` as ``Outcome.after``; None where nothing was measured.
    """

    request: Request
    state: str
    sentence: str
    verdict: Verdict | None = None
    texts: list[dict[str, Any]] | None = None
    metrics: dict[str, float] | None = None
    controls: dict[str, float] | None = None


@dataclass(frozen=True)
class Reading:
    """Texts that were read in windows of one length and through a chat template or not.

    forms: {number of a request: its texts that were found, in each form}. given: all texts, those of requests
    first. controls: those that the user gave, in each form; None where they are to be made. max_length: of
    the windows.
    """

    forms: dict[int, list[Batch]]
    given: list[GivenText]
    controls: list[Batch] | None
    max_length: int

    def examine(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, request: Request
    ) -> tuple[Examination, Examination]:
        """Examine the texts of a request, of which at least one was found, and their controls."""
        forms, seed = self.forms[request.number], request.entry["report"]["seed"]
        unseen = self.controls or make_controls(forms, self.given, tokenizer, self.max_length, seed)
        return (
            examine(model, tokenizer, forms, self.given, f"request {request.number}"),
            examine(model, tokenizer, unseen, self.given, "controls"),
        )

    def own(self, request: Request) -> list[GivenText]:
        """The given texts that are the request's."""
        return [text for text in self.given if text.label.startswith(f"request {request.number} ")]


class Texts:
    """The texts of a ledger's requests, found among others by their hashes, and read as ``unlearn`` did.

    Args:
        texts: the texts. Those of no request that is not undone count as texts to keep, unless they hold or
            are a part of a request's text. Of more than ``SAMPLED`` of them a random sample counts.
        controls: as of ``neumuter.unlearn``.
    """

    def __init__(
        self,
        ledger: Ledger,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        texts: Iterable[Text],
        controls: TextSource | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.requests = [request for request in ledger.requests() if not request.undone]
        self.found, others = ledger.sort_texts(texts)
        self.others = list(others.values())
        if len(others) > SAMPLED:
            logger.warning("Of %d texts to keep, %d are looked at, drawn at random.", len(others), SAMPLED)
            self.others = random.Random(0).sample(self.others, SAMPLED)
        self.controls = None if controls is None else collect_texts("controls", controls)
        self._readings: dict[tuple[int, bool | None], Reading] = {}

    def of(self, request: Request) -> list[Text]:
        """The texts of a request that were found."""
        return [self.found[digest] for digest in request.texts if digest in self.found]

    def read(self, request: Request) -> Reading:
        """All texts in the windows and the form in which ``unlearn`` read those of ``request``.

        Raises:
            ValueError: controls are among the texts; or a control or a text of a request cannot be read.
        """
        how = request.entry["report"]["max_length"], request.entry["report"]["chat"]
        if how not in self._readings:
            self._readings[how] = self._read(*how)
        return self._readings[how]

    def _read(self, max_length: int, chat: bool | None) -> Reading:
        options = (self.tokenizer, limit_length(self.model, max_length), chat)
        forms = {
            request.number: encode_forms_of(f"request {request.number}", present, *options)
            for request in self.requests
            if (present := self.of(request))
        }
        asked = list_given({f"request {number}": form[0] for number, form in forms.items()}, self.tokenizer)
        kept = list_given(_encode_some(self.others, *options), self.tokenizer)
        # The same words in another file are not somebody else's.
        same = {text.label for text, _ in find_overlap(kept, asked)}
        given = [*asked, *(text for text in kept if text.label not in same)]
        controls = None
        if self.controls is not None:
            controls = encode_forms_of("controls", self.controls, *options)
            refuse_seen(controls[0], given, self.tokenizer)
        return Reading(forms, given, controls, options[1])


def _encode_some(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, max_length: int, chat: bool | None
) -> dict[str, Batch]:
    """Those texts to keep that can be encoded, because anything can be among the files of a folder."""
    readable = []
    for text in texts:
        try:
            make_forms([text], tokenizer, max_length, chat)
        except ValueError:
            continue
        readable.append(text)
    if len(readable) < len(texts):
        logger.warning(
            "%d of %d texts to keep cannot be encoded, and do not count.",
            len(texts) - len(readable),
            len(texts),
        )
    return {"retain": make_forms(readable, tokenizer, max_length, chat)[0][0]} if readable else {}


def verify(
    ledger: Ledger,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    *,
    controls: TextSource | None = None,
    apply: bool = False,
) -> list[Check]:
    """Check each request of a ledger on a model.

    Each is measured as ``unlearn`` measured it: in the same windows, with the same choice of chat template
    and the same seed, which the ledger has.

    Args:
        ledger: the ledger.
        model: what is served: with mutes folded in, quantised, tuned further, or as it is.
        tokenizer: its tokenizer.
        texts: the texts of the requests, among others; they are found by their hashes. The others count as
            texts to keep: they must not come out either, and controls that are made have their values.
        controls: as in ``neumuter.unlearn``; they serve for all requests.
        apply: first mute the union of the requests' sets, unless they are undone: ``model`` is one without
            mutes. Of each request the newest set counts that was made for ``model``. A set that was fitted
            with slopes takes the place of all before it.

    Returns:
        A check for each request, in order.

    Raises:
        ValueError: controls are among the texts; or a control or a text of a request cannot be encoded.
        RuntimeError: the model predicts NaN.
    """
    found = Texts(ledger, model, tokenizer, texts, controls)
    requests = ledger.requests()
    sets, refused = choose_sets(model, requests) if apply else ([], {})
    with united(model, sets):
        return [_check(request, refused, found) for request in requests]


def verify_server(
    ledger: Ledger, url: str, name: str, texts: Iterable[Text], mute_set: str | None = None
) -> list[Check]:
    """Check each request of a ledger on a running server: whether a text comes out, asked for greedily.

    A server tells no losses, so there is no verdict, and nothing is compared with controls. Prompts are asked
    as they are, and through the server's chat, unless the request was made without (``chat=False``).

    Args:
        url, name, mute_set: see ``neumuter.evaluation.ask_server``.
        texts: the texts of the requests, among others; they are found by their hashes.

    Returns:
        A check for each request, in order.
    """
    found, _ = ledger.sort_texts(texts)
    requests = ledger.requests()
    present = {
        request.number: [found[digest] for digest in request.texts if digest in found]
        for request in requests
        if not request.undone
    }
    said = dict[int, list[Said]]()
    for chat in (True, False):
        # In one call: what a server refuses of all texts, such as a mute set, is no matter of a request.
        asked = [
            (request.number, text)
            for request in requests
            if (request.entry["report"]["chat"] is not False) == chat
            for text in present.get(request.number, ())
        ]
        try:
            answers = ask_server(url, name, [text for _, text in asked], mute_set, chat) if asked else []
        except AllRefusedError as error:
            answers = error.said
        for (number, _), answer in zip(asked, answers, strict=True):
            said.setdefault(number, []).append(answer)
    every = [answer for answers in said.values() for answer in answers]
    if every and all(answer.refused for answer in every):
        raise AllRefusedError(every)
    return [_check_answers(request, said.get(request.number, ())) for request in requests]


def _check_answers(request: Request, answers: Sequence[Said]) -> Check:
    """A check of a request by what a server said to each of its texts that was found."""
    if request.undone or not answers:
        return _unmeasured(request)
    # Of a text that the server refuses nobody can tell: it counts as missing.
    refused = [answer.refused for answer in answers if answer.refused]
    rows = [
        {"number": number, "extracted_after": answer.comes_out}
        for number, answer in enumerate(answers, 1)
        if not answer.refused
    ]
    out = [row["extracted_after"] for row in rows]
    how = BY_SERVER.format(", also through its chat" if any(a.forms > 1 for a in answers) else "")
    sentence = f"{sum(out)} of {len(out)} texts come out. {how}{_lacking(request, len(answers))}"
    if refused:
        # The page of a request quotes no text, which a server's own words may do.
        sentence += f" {len(refused)} of {len(answers)} could not be asked for."
        logger.warning("Request %d: %s", request.number, refused[0])
    return Check(request, _state(request, any(out), len(out)), sentence, texts=rows)


def choose_sets(model: nn.Module, requests: Iterable[Request]) -> tuple[list[MuteSet], dict[int, str]]:
    """Choose the mute sets of requests for a model: of each the newest that was made for it.

    A set that holds for earlier requests, too, takes the place of theirs. Requests that are undone have none.

    Returns:
        The sets; and why none was made for the model: {number of the request: reason}.
    """
    chosen, refused = list[MuteSet](), dict[int, str]()
    for request in requests:
        if request.undone:
            continue
        try:
            mutes = _choose_set(model, request)
        except MuteMismatchError as error:
            refused[request.number] = " ".join(str(error).split())
            continue
        if request.holds_for_earlier:
            chosen, refused = [], {}
        chosen.append(mutes)
    return chosen, refused


def _choose_set(model: nn.Module, request: Request) -> MuteSet:
    """The newest mute set of a request that was made for ``model``; otherwise the newest one's error."""
    errors = []
    for fit in reversed(request.fits):
        mutes = fit.load_mutes()
        try:
            matching_ffns(model, mutes)
        except MuteMismatchError as error:
            errors.append(error)
        else:
            return mutes
    raise errors[0]


def united(model: nn.Module, sets: Sequence[MuteSet]) -> AbstractContextManager[object]:
    """Context in which the union of mute sets, which may be none, is in force."""
    return mute(model, combine(model, sets)) if sets else nullcontext()


def _check(request: Request, refused: dict[int, str], found: Texts) -> Check:
    if request.number in refused:
        return Check(request, OTHER_MODEL, refused[request.number])
    if request.undone or not found.of(request):
        return _unmeasured(request)
    reading = found.read(request)
    after, controls = reading.examine(found.model, found.tokenizer, request)
    verdict, rows = judge_texts(reading.own(request), after, controls)
    state = _state(request, verdict.leaks, len(rows))
    sentence = verdict.sentence + _lacking(request, len(rows))
    return Check(request, state, sentence, verdict, rows, after.metrics, controls.metrics)


def _unmeasured(request: Request) -> Check:
    if request.undone:
        return Check(request, UNDONE, "The request was taken back.")
    return Check(request, MISSING, f"None of its {len(request.texts)} texts was found in the texts given.")


def _state(request: Request, leaks: bool, present: int) -> str:
    if leaks:
        return NEVER if request.newest.entry["report"]["leaks"] else FAILS
    return HOLDS if present == len(request.texts) else MISSING


def _lacking(request: Request, present: int) -> str:
    missing = len(request.texts) - present
    return f" {missing} of {len(request.texts)} texts are missing." if missing else ""
