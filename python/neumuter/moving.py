"""A request of a ledger is moved to a new version of the model: its mute set is fitted anew and measured."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from neumuter.evaluation import Examination, judge_texts, mean_token_loss
from neumuter.job import MEASURED_TEXTS
from neumuter.ledger import Ledger, Request
from neumuter.models.families import find_ffns
from neumuter.models.loading import limit_length
from neumuter.mutes.matching import alike_ffns
from neumuter.outcome import Outcome
from neumuter.preparing import encode_forms_of
from neumuter.recipes import FittedConfig
from neumuter.refitting import refit
from neumuter.texts.encoding import sample_rows
from neumuter.texts.sources import TextSource
from neumuter.types import Callback, Text, check_texts
from neumuter.unlearning import measure_peak_memory
from neumuter.verifying import Texts, choose_sets, united


def refit_request(
    ledger: Ledger,
    number: int,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    retain: Iterable[Text] = (),
    *,
    controls: TextSource | None = None,
    recipe: FittedConfig | None = None,
    samples: int | None = None,
    seed: int = 0,
    callback: Callback | None = None,
) -> Outcome:
    """Fit the mute set of a ledger's request anew to a new version of the model, and measure what it does.

    The gains start from the request's newest set, and the neurons stay. The set is fitted to the model
    without mutes. It is measured as ``unlearn`` does, while those sets of other requests that were made for
    this model are in force. A set that was fitted with slopes is fitted anew for the texts of all earlier
    requests that are not undone, too. Nothing is written: that is up to ``outcome.save(folder)`` and
    ``ledger.add_fit(number, folder)``.

    Args:
        ledger: the ledger.
        number: of the request.
        model: the new version, without mutes.
        tokenizer: its tokenizer.
        texts: the texts of the requests, among others; they are found by their hashes, as in ``verify``.
        retain: texts that must stay.
        controls, samples, seed, callback: as of ``neumuter.unlearn``.
        recipe: the constants with which gains are fitted; None takes those of the fitted recipe.

    Returns:
        An ``Outcome``; "before" is without the request's mute set.

    Raises:
        ValueError: there is no such request, or it is undone; not all of its texts are there; or ``retain``
            has a text of a request that is not undone.
        MuteMismatchError: the request's mute set is for another architecture; a ValueError.
        TypeError, RuntimeError: as of ``neumuter.unlearn``.
    """
    start = time.perf_counter()
    check_texts("retain", retain)
    kept = list(retain)
    request, requests = ledger.request(number), ledger.requests()
    if request.undone:
        raise ValueError(f"request {number} is undone: there is nothing to fit")
    old = request.newest.load_mutes()
    alike_ffns(model, old)
    if both := ledger.sort_texts(kept)[0]:
        raise ValueError(
            f"{len(both)} of the texts to keep are texts of requests. A text cannot be both: remove it from "
            "retain"
        )
    found = Texts(ledger, model, tokenizer, [*texts, *kept], controls)
    fitted = _choose_requests(request, requests, found)
    sets, _ = choose_sets(model, [other for other in requests if other not in fitted])
    max_length, chat = (request.entry["report"][name] for name in ("max_length", "chat"))
    measured = None
    if kept:
        length = limit_length(model, max_length)
        batch = encode_forms_of("retain", kept, tokenizer, length, chat)[0]
        measured = sample_rows(batch, MEASURED_TEXTS, seed)
    reading = found.read(request)

    def measure() -> tuple[Examination, Examination, dict[str, float]]:
        examined, unseen = reading.examine(model, tokenizer, request)
        loss = {"retain_loss": mean_token_loss(model, measured)} if measured else {}
        return examined, unseen, examined.metrics | loss

    with united(model, sets):
        before, controls_before, metrics_before = measure()
    mutes = refit(
        model, tokenizer, old, retain=kept or None, recipe=recipe, samples=samples,
        forget=[text for other in fitted for text in found.of(other)],
        start_layer=[ffn.path for ffn in find_ffns(model)].index(next(iter(old.widths))),
        max_length=max_length, chat=chat, seed=seed, callback=callback,
    )  # fmt: skip
    with united(model, [*sets, mutes]):
        after, controls_after, metrics_after = measure()
    verdict, rows = judge_texts(reading.own(request), after, controls_after, before, controls_before)
    return Outcome(
        mutes=dataclasses.replace(mutes, metrics={"before": metrics_before, "after": metrics_after}),
        before=metrics_before,
        after=metrics_after,
        controls=controls_after.metrics,
        verdict=verdict,
        texts=rows,
        texts_given=len(rows),
        windows_given=sum(row["windows"] for row in rows),
        curve=None,
        history=[],
        samples=[],
        seconds=time.perf_counter() - start,
        peak_memory=measure_peak_memory(),
        max_length=max_length,
        chat=chat,
    )


def _choose_requests(request: Request, requests: Sequence[Request], found: Texts) -> list[Request]:
    """List the requests for whose texts the set of ``request`` is fitted.

    Raises:
        ValueError: some of these texts are missing.
    """
    chosen = [
        other
        for other in requests
        if other.number == request.number
        or (request.holds_for_earlier and other.number < request.number and not other.undone)
    ]
    for other in chosen:
        if missing := len(other.texts) - len(found.of(other)):
            raise ValueError(
                f"{missing} of {len(other.texts)} texts of request {other.number} are not among the texts "
                "given: a mute set is fitted with all of them"
            )
    return chosen
