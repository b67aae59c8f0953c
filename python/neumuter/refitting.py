"""Requests are undone: the gains of all others are fitted anew, without any of their texts.

The module is not called ``refit``, so that importing it never hides the function of that name.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from neumuter.models.loading import limit_length
from neumuter.mutes.matching import matching_ffns
from neumuter.mutes.mute_set import MuteSet, MuteSource, load_mutes
from neumuter.mutes.slopes import SlopesSource, load_slopes
from neumuter.recipes import FittedConfig, refit_gains
from neumuter.report.progress import Watch
from neumuter.serving.live import mute
from neumuter.texts import collect_texts, encode, join_batches
from neumuter.texts.sources import TextSource
from neumuter.training.batches import PairedBatches
from neumuter.training.masked import attach
from neumuter.types import Callback
from neumuter.unlearning import encode_forms_of, need_tokenizer, open_network, sample_neighbours


def refit(
    model: nn.Module | str,
    tokenizer: PreTrainedTokenizerBase | str | None,
    existing: MuteSource,
    former: Sequence[SlopesSource],
    undone: Sequence[SlopesSource],
    retain: TextSource | None = None,
    *,
    recipe: FittedConfig | None = None,
    samples: int | None = None,
    start_layer: int = 1,
    max_length: int = 256,
    chat: bool | None = None,
    seed: int = 0,
    callback: Callback | None = None,
) -> MuteSet:
    """Undo requests: fit the gains of the mute set in force anew, from slopes and texts to keep alone.

    The tokens of ``undone`` are raised until the model says them again, and those of ``former`` held down.
    Where you may use the undone texts, give them in ``retain``, too.

    Args:
        existing: the mute set in force, which ``unlearn`` found with ``former``; or its file.
        former: the slopes of the requests that stay, or their files.
        undone: the slopes of those to undo, or their files.
        recipe: the constants with which gains are fitted; None takes those of the fitted recipe.
        model, tokenizer, retain, samples, start_layer, max_length, chat, seed, callback: as of ``unlearn``.

    Returns:
        A mute set with the neurons of ``existing``, which takes its place.

    Raises:
        ValueError, TypeError, RuntimeError: as of ``unlearn``.
    """
    if not undone:
        raise ValueError("undone must name the slopes of at least one request")
    watch, mutes = Watch(callback), load_mutes(existing)
    staying, leaving = load_slopes(former), load_slopes(undone)
    network, words = open_network(model, tokenizer)
    for known in (mutes, *(slopes.at for slopes in (*staying, *leaving))):
        matching_ffns(network, known)
    length = limit_length(network, max_length)
    found = []
    if retain is not None:
        found += encode_forms_of("retain", collect_texts("retain", retain), words, length, chat)[:1]
    with mute(network, mutes):
        width = found[0]["labels"].shape[1] if found else length
        said = sample_neighbours(network, words, None, width, bool(found), samples, seed, watch)
    if said:
        found.append(encode(said, need_tokenizer(words), length))
    if not found:
        raise ValueError("there is nothing to keep: the model said nothing when sampled from; give retain")
    with attach(network, start_layer) as masked, watch("Fitting gains") as advance:
        pair = PairedBatches(masked, None, join_batches(*found))
        return refit_gains(pair, mutes, staying, leaving, (recipe or FittedConfig()).gains, seed, advance)
