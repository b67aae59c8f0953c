"""The gains of a mute set are fitted anew: without a request, or to a new version of the model.

The module is not called ``refit``, so that importing it never hides the function of that name.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from neumuter.calibrating import estimate_ceilings
from neumuter.estimating import estimate_search
from neumuter.evaluation import list_given, mean_token_loss
from neumuter.models.loading import limit_length
from neumuter.mutes.matching import alike_ffns, matching_ffns
from neumuter.mutes.mute_set import MuteSet, MuteSource, load_mutes
from neumuter.mutes.slopes import SlopesSource, load_slopes
from neumuter.preparing import (
    compare_models,
    encode_forms_of,
    need_tokenizer,
    open_network,
    refuse_overlap,
    sample_neighbours,
    warn_of_missing,
)
from neumuter.recipes import FittedConfig, GainsConfig, estimate_work, refit_gains
from neumuter.report.progress import Watch, announce
from neumuter.serving.live import mute
from neumuter.texts import collect_texts, encode, join_batches
from neumuter.texts.encoding import count_rows, count_tokens, sample_rows
from neumuter.texts.sources import TextSource
from neumuter.training.batches import PairedBatches
from neumuter.training.journal import Journal, digest
from neumuter.training.masked import attach
from neumuter.training.processes import are_many, failing_together, find_processes
from neumuter.training.shortage import tell_of_shortage
from neumuter.types import Batch, Callback

# Texts to keep on which the pace of the model is measured.
TIMED_TEXTS = 16


def refit(
    model: nn.Module | str,
    tokenizer: PreTrainedTokenizerBase | str | None,
    existing: MuteSource,
    former: Sequence[SlopesSource] = (),
    undone: Sequence[SlopesSource] = (),
    retain: TextSource | None = None,
    *,
    forget: TextSource | None = None,
    recipe: FittedConfig | None = None,
    samples: int | None = None,
    start_layer: int = 1,
    max_length: int = 256,
    chat: bool | None = None,
    seed: int = 0,
    callback: Callback | None = None,
) -> MuteSet:
    """Fit the gains of a mute set anew: to undo requests, or to move it to a new version of the model.

    To undo, give ``undone``: the gains are fitted from slopes and texts to keep alone. The tokens of
    ``undone`` are raised until the model says them again, and those of ``former`` held down. Where you may
    use the undone texts, give them in ``retain``, too.

    After the model was trained further, give ``forget``, the texts of all requests: the gains start where
    they were, and are fitted to the new weights. They are calibrated (see ``unlearn``) if those of
    ``existing`` were.

    Args:
        existing: the mute set in force, or its file. With ``undone`` it is one that ``unlearn`` found with
            ``former``; with ``forget`` it may be of other weights, but must be of the same architecture.
        former: the slopes of the requests that stay, or their files.
        undone: the slopes of those to undo, or their files.
        forget: the texts that the set makes the model forget, as ``unlearn`` takes them.
        recipe: the constants with which gains are fitted; None takes those of the fitted recipe.
        model, tokenizer, retain, samples, start_layer, max_length, chat, seed, callback: as of ``unlearn``.

    Returns:
        A mute set with the neurons of ``existing``, which takes its place.

    Raises:
        ValueError, TypeError, RuntimeError: as of ``unlearn``; ``undone`` and ``forget`` are both given, or
            neither; or slopes are given twice.
    """
    config, texts, found = recipe or FittedConfig(), None, []
    # Of a difference all processes learn, and of an error in one of them.
    with failing_together():
        if bool(undone) == (forget is not None):
            raise ValueError(
                "give either undone (slopes of the requests to undo) or forget (the texts of all requests)"
            )
        if forget is not None and former:
            raise ValueError(
                "former needs undone: slopes hold only for the weights on which they were measured; with "
                "forget, give the texts of all requests there"
            )
        watch, mutes = Watch(callback), load_mutes(existing)
        known = load_slopes([*former, *undone])
        staying, leaving = known[: len(former)], known[len(former) :]
        if undone:
            warn_of_missing(mutes, len(known))
        network, words = open_network(model, tokenizer)
        length = limit_length(network, max_length)
        if forget is not None:
            alike_ffns(network, mutes)
            texts = encode_forms_of("forget", collect_texts("forget", forget), words, length, chat)[0]
        if retain is not None:
            found += encode_forms_of("retain", collect_texts("retain", retain), words, length, chat)[:1]
        batches = ({"forget": texts} if texts else {}) | ({"retain": found[0]} if found else {})
        given = list_given(batches, words)
        refuse_overlap(given)
    if are_many():
        asked = {
            "recipe": config, "samples": samples, "start_layer": start_layer, "max_length": max_length,
            "chat": chat, "seed": seed,
        }  # fmt: skip
        read = {"existing": mutes, "former": staying, "undone": leaving, "forget": texts, "retain": found}
        compare_models(network, asked | {name: digest(value) for name, value in read.items()})
    if texts is None:
        for fitted in (mutes, *(slopes.at for slopes in known)):
            matching_ffns(network, fitted)
    ceilings = None
    if texts is not None and _is_calibrated(mutes.method):
        ceilings = estimate_ceilings(Journal(), network, words, texts, given, seed, watch)
    # A set for other weights cannot be in force.
    with mute(network, mutes) if texts is None else nullcontext():
        width = next((batch["labels"].shape[1] for batch in (texts, *found) if batch is not None), length)
        others = sum(map(count_rows, found))
        said = sample_neighbours(network, words, texts, width, others, samples, seed, watch)
    if said:
        found.append(encode(said, need_tokenizer(words), length))
    if not found:
        raise ValueError("there is nothing to keep: the model said nothing when sampled from; give retain")
    kept = join_batches(*found)
    _announce_time(network, texts, kept, config.gains, seed)
    with attach(network, start_layer) as masked, watch("Fitting gains", of_steps=True) as advance:
        pair = PairedBatches(masked, texts, kept, ceilings)
        fitted = refit_gains(pair, mutes, staying, leaving, config.gains, seed, advance)
        tell_of_shortage(pair)
    if ceilings is None:
        return fitted
    return dataclasses.replace(fitted, method=fitted.method | {"calibrated": True})


def _is_calibrated(method: Mapping[str, Any]) -> bool:
    """Whether a mute set, or one of those that it was combined of or taken from, is calibrated."""
    parts = [*method.get("combined", []), *([method["from"]] if "from" in method else [])]
    return bool(method.get("calibrated")) or any(map(_is_calibrated, parts))


def _announce_time(
    network: nn.Module, texts: Batch | None, kept: Batch, config: GainsConfig, seed: int
) -> None:
    """Say how long the fit takes, by the pace of the model on a few texts to keep."""
    timed, since = sample_rows(kept, TIMED_TEXTS, seed), time.perf_counter()
    mean_token_loss(network, timed)
    token = (time.perf_counter() - since) / count_tokens(timed)
    processes = find_processes(network)
    work = estimate_work(texts, kept, config, processes=processes.count if processes else 1)
    announce("Fitting gains takes", estimate_search(token, work, 0, count_tokens(kept)))
