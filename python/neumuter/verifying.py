"""Do the requests of a ledger still hold, on the model that is served today?"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from neumuter.evaluation import (
    Verdict,
    ask_server,
    examine,
    judge_texts,
    list_given,
    make_controls,
)
from neumuter.evaluation.others import GivenText
from neumuter.ledger import Ledger, Request
from neumuter.models.loading import limit_length
from neumuter.mutes.algebra import combine
from neumuter.mutes.matching import MuteMismatchError, matching_ffns
from neumuter.mutes.mute_set import MuteSet
from neumuter.serving.live import mute
from neumuter.texts import encode_forms
from neumuter.types import Batch, Text

HOLDS, FAILS, NEVER = "holds", "no longer holds", "never held"
MISSING, OTHER_MODEL, UNDONE = "texts missing", "cannot be applied", "undone"


@dataclass(frozen=True)
class Check:
    """What came of verifying one request.

    state: "holds" if nothing comes out beyond the margins of the verdict; "no longer holds", or "never held"
    if it did not when it was added; "texts missing" if none of its texts is there; "cannot be applied" if its
    mute set was made for another model; "undone". sentence: the reasons. verdict, texts, metrics, controls:
    what was found, ``metrics`` as ``Outcome.after``; None where nothing was measured.
    """

    request: Request
    state: str
    sentence: str
    verdict: Verdict | None = None
    texts: list[dict[str, Any]] | None = None
    metrics: dict[str, float] | None = None
    controls: dict[str, float] | None = None


def verify(
    ledger: Ledger,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    *,
    apply: bool = False,
    max_length: int = 256,
    chat: bool | None = None,
    seed: int = 0,
) -> list[Check]:
    """Check each request of a ledger on a model.

    Args:
        ledger: the ledger.
        model: what is served: with mutes folded in, quantised, tuned further, or as it is.
        tokenizer: its tokenizer.
        texts: the texts of the requests, among others; they are found by their hashes.
        apply: mute the union of the sets that are not undone first: ``model`` is one without mutes. A set
            that was fitted with slopes takes the place of all before it.
        max_length, chat, seed: as in ``neumuter.unlearn``.

    Returns:
        A check for each request, in order.

    Raises:
        RuntimeError: the model predicts NaN.
    """
    found = ledger.find_texts(texts)
    requests = ledger.requests()
    length = limit_length(model, max_length)
    forms = {
        request.number: encode_forms(present, tokenizer, length, chat)
        for request in requests
        if not request.undone and (present := [found[digest] for digest in request.texts if digest in found])
    }
    given = list_given({f"request {number}": form[0] for number, form in forms.items()}, tokenizer)
    refused: dict[int, str] = {}
    with _applied(model, requests, refused) if apply else nullcontext():
        return [
            _check(request, refused, model, tokenizer, forms.get(request.number), given, seed)
            for request in requests
        ]


def verify_server(ledger: Ledger, url: str, name: str, texts: Iterable[Text]) -> list[Check]:
    """Check each request of a ledger on a running server: whether a text comes out, asked for greedily.

    A server tells no losses, so there is no verdict.

    Args:
        url, name: see ``neumuter.evaluation.ask_server``.
        texts: as in ``verify``.

    Returns:
        A check for each request, in order.
    """
    found = ledger.find_texts(texts)
    checks = []
    for request in ledger.requests():
        present = [found[digest] for digest in request.texts if digest in found]
        if request.undone or not present:
            checks.append(_unmeasured(request))
            continue
        said = [answer.comes_out for answer in ask_server(url, name, present)]
        state = _failed(request) if any(said) else HOLDS
        sentence = f"{sum(said)} of {len(said)} texts come out.{_lacking(request, len(said))}"
        rows = [{"number": number, "extracted_after": out} for number, out in enumerate(said, 1)]
        checks.append(Check(request, state, sentence, texts=rows))
    return checks


@contextmanager
def _applied(model: nn.Module, requests: Sequence[Request], refused: dict[int, str]) -> Iterator[None]:
    """Context in which the sets of requests are muted; ``refused`` gets those that are for another model."""
    fitting: list[MuteSet] = []
    for request in requests:
        if request.undone:
            continue
        mutes = request.load_mutes()
        try:
            matching_ffns(model, mutes)
        except MuteMismatchError as error:
            refused[request.number] = " ".join(str(error).split())
        else:
            # A set that was fitted with the slopes of earlier requests holds for them, too.
            fitting = [mutes] if "former" in mutes.method else [*fitting, mutes]
    if not fitting:
        yield
        return
    with mute(model, combine(model, fitting)):
        yield


def _check(
    request: Request,
    refused: dict[int, str],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    forms: list[Batch] | None,
    given: Sequence[GivenText],
    seed: int,
) -> Check:
    if request.number in refused:
        return Check(request, OTHER_MODEL, refused[request.number])
    if forms is None:
        return _unmeasured(request)
    label = f"request {request.number}"
    after = examine(model, tokenizer, forms, given, label)
    controls = examine(model, tokenizer, make_controls(forms, given, tokenizer, seed), given, "controls")
    own = [text for text in given if text.label.startswith(f"{label} ")]
    verdict, rows = judge_texts(own, after, controls)
    state = _failed(request) if verdict.leaks else HOLDS
    sentence = verdict.sentence + _lacking(request, len(rows))
    return Check(request, state, sentence, verdict, rows, after.metrics, controls.metrics)


def _unmeasured(request: Request) -> Check:
    if request.undone:
        return Check(request, UNDONE, "The request was taken back.")
    return Check(request, MISSING, f"None of its {len(request.texts)} texts was found in the texts given.")


def _failed(request: Request) -> str:
    return NEVER if request.entry["report"]["leaks"] else FAILS


def _lacking(request: Request, present: int) -> str:
    missing = len(request.texts) - present
    return f" {missing} of {len(request.texts)} texts are missing." if missing else ""
