"""The whole job in one call: find neighbours, measure, search, measure again.

The module is not called ``unlearn``, so that importing it never hides the function of that name.
"""

from __future__ import annotations

import dataclasses
import logging
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase

from neumuter.calibrating import choose_calibration, estimate_ceilings, widen_margin
from neumuter.estimating import (
    Look,
    estimate_calibration,
    estimate_examination,
    estimate_search,
    look_at,
)
from neumuter.evaluation import examine, judge_texts, list_given, make_controls, most_known
from neumuter.evaluation.examination import Examination
from neumuter.evaluation.others import Found, GivenText
from neumuter.evaluation.strangers import ask_about_strangers
from neumuter.files import PathLike, made_folder
from neumuter.models.hub import find_model
from neumuter.models.loading import limit_length, load_tokenizer
from neumuter.mutes.algebra import combine
from neumuter.mutes.fingerprint import adapter_fingerprint, fingerprint
from neumuter.mutes.matching import matching_ffns
from neumuter.mutes.mute_set import MuteSource, load_mutes
from neumuter.mutes.slopes import SlopesSource, load_slopes
from neumuter.outcome import Outcome, write_sets
from neumuter.preparing import (
    encode_forms_of,
    need_tokenizer,
    open_network,
    refuse_overlap,
    refuse_seen,
    sample_neighbours,
)
from neumuter.recipes import (
    FittedConfig,
    Goals,
    PaperConfig,
    estimate_work,
    fit_mutes,
    measure_slopes,
    search_budget,
    train_gates,
)
from neumuter.report.progress import Watch, announce
from neumuter.serving.live import mute
from neumuter.texts import collect_texts, encode
from neumuter.texts.chat import TEMPLATE_USED
from neumuter.texts.corpus import read_corpus
from neumuter.texts.encoding import count_rows, count_tokens, join_windows, sample_rows
from neumuter.texts.neighbours import rewrite_texts
from neumuter.texts.sources import TextSource
from neumuter.texts.store import Windows
from neumuter.training.batches import PairedBatches
from neumuter.training.journal import Journal, digest, refuse_unfinished
from neumuter.training.masked import attach, neuron_count, split_ffns
from neumuter.training.processes import agree, describe_layout, find_processes, is_first
from neumuter.types import Batch, Callback, Text

# What an unfinished run has found so far is made of these.
KEPT = (Examination, Found, Look)
# Retain texts whose loss is measured.
MEASURED_TEXTS = 512

logger = logging.getLogger("neumuter")


def unlearn(
    model: nn.Module | str,
    tokenizer: PreTrainedTokenizerBase | str | None,
    forget: TextSource,
    retain: TextSource | None = None,
    *,
    budget: int | float | str = 0.01,
    mode: str = "modulate",
    recipe: str | FittedConfig | PaperConfig = "fitted",
    existing: MuteSource | None = None,
    former: Sequence[SlopesSource] = (),
    keep_slopes: bool = False,
    goals: Goals | None = None,
    controls: TextSource | None = None,
    samples: int | None = None,
    made_up: int = 0,
    calibrate: bool | None = None,
    rewrite_with: str | None = None,
    start_layer: int = 1,
    max_length: int = 256,
    chat: bool | None = None,
    seed: int = 0,
    folder: PathLike | None = None,
    resume: bool = False,
    callback: Callback | None = None,
) -> Outcome:
    """Find the neurons of ``model`` that hold the forget texts, and measure what muting them does.

    The model is left untouched: ``neumuter.mute`` applies the outcome to it, ``neumuter.fold`` writes it into
    the weights.

    In a process group of torch.distributed all processes must call it, each with its copy of the model and
    the same arguments. They share the samples of each step, and all return the outcome of the first one,
    which alone writes ``folder`` and shows progress.

    Args:
        model: a causal language model of transformers; or its folder or name, which is loaded.
        tokenizer: its tokenizer; or a folder or name. None takes that of a model given by name; it may also
            be None where all texts are batches of token ids and ``samples`` is 0.
        forget: the texts to forget: a path, a list of texts, of (prompt, completion) pairs or of chat
            messages, a ``datasets.Dataset``, or a batch of token ids; see ``neumuter.texts.collect_texts``.
        retain: texts that must stay, likewise. None takes texts that the model itself says, which protects
            less.
        budget: how many neurons to touch: a share (float in (0, 1]) or a number (int); or "auto", the
            smallest share that reaches the ``goals``.
        mode: "modulate" gives the selected neurons signed gains, "mute" silences them.
        recipe: "fitted" or "paper", or the constants of one. The paper's recipe finds its own number of
            neurons and silences them: it takes no budget, mode, existing set or goals.
        existing: a mute set of earlier requests, or its file, that stays in force; the retain texts must not
            hold its texts.
        former: the slopes of earlier requests, or their files: with them the outcome's mute set holds for
            all requests, and takes the place of ``existing``, whose gains are fitted anew. Without them the
            existing set's gains stay as they are, and part of its texts can come back.
        keep_slopes: measure the slopes of this request's texts, for ``former`` of later ones. They are made
            of the texts: keep them like the texts.
        goals: for ``budget="auto"``; by default no text may be extracted any more.
        controls: texts of the same kind that the model never saw, with which the verdict compares the texts
            to forget; likewise. None makes them from the texts to forget, by other names and values.
        samples: how many texts the model itself adds to the retain texts: by default 32, or 16 where there
            are retain or made-up texts.
        made_up: how many prompts to forget, with made-up names, the model answers itself; these answers are
            kept as well. They protect what resembles the forget texts, but take a larger budget to forget.
        calibrate: forget each token no further than to the probability that a model which never saw the
            texts would give it, by an estimate (see ``neumuter.evaluation.estimate_unseen``), and of each run
            of tokens that identify a text first of all the one that is nearest to being forgotten. For texts
            with prompts; others are forgotten as without. None does so where it can be done: with the
            fitted recipe, mode "modulate" and no trained support, a tokenizer, and up to 1,024 texts.
        rewrite_with: the name of a masked language model that rewrites the forget texts as neighbours.
        start_layer: the first FFN that may be touched, from 0.
        max_length: tokens of a window; a longer text becomes several (see ``neumuter.texts.encode``). A
            model with fewer positions sets a lower limit.
        chat: whether prompts with completions, and chat messages, go through the tokenizer's chat template.
            None: if it has one. What the model knows of the forget texts is measured in both forms, and
            the worse counts.
        seed: seeds the search and the sampled neighbours. The same call on the same machine gives the same
            result.
        folder: where to write the mute file as soon as it is found, before the last measurements; and every
            minute, for its owner alone, what is found so far (unfinished.safetensors), which
            ``outcome.save(folder)`` removes.
        resume: go on from what an unfinished run with the same arguments left in ``folder``, to the same
            result on the same kind of machine, but for rounding if the number of processes or the layout is
            another one. Where nothing was left, the run starts anew.
        callback: called as (step, total, info) after every step, instead of a progress bar.

    Returns:
        An ``Outcome``; ``outcome.save(folder)`` writes the mute file and the report.

    Raises:
        ValueError, TypeError: an argument is not as above, or texts are to be forgotten and to be kept; or
            ``resume``, and something that matters has changed.
        FileExistsError: an unfinished run is in ``folder``, and ``resume`` is false.
        NothingSelectedError: the recipe found no neuron; a ValueError.
        RuntimeError: the model is attached or muted already, the loss diverged, or the model predicts NaN.
    """
    start = time.perf_counter()
    config = _check_recipe(recipe, budget, mode, existing, goals, bool(former) or keep_slopes)
    if former and (existing is None or mode == "mute"):
        raise ValueError('former needs existing, the mute set that is in force, and mode "modulate"')
    if made_up < 0:
        raise ValueError(f"made_up must be at least 0, got {made_up}")
    if resume and folder is None:
        raise ValueError("resume needs folder, where the unfinished run is")
    if folder is not None and not resume and is_first():
        refuse_unfinished(folder)
    earlier = None if existing is None else load_mutes(existing)
    known = load_slopes(former)
    network, words = open_network(model, tokenizer)
    for slopes in known:
        matching_ffns(network, slopes.at)
    # What the search would refuse after the texts were measured.
    processes = find_processes(network)
    _, ffns = split_ffns(network, start_layer)
    if not isinstance(budget, str):
        neuron_count(budget, sum(ffn.width for ffn in ffns))
    length = limit_length(network, max_length)
    watch = Watch(callback)
    corpus = read_corpus("forget", forget, words, length, chat, seed)
    kept = None if retain is None else read_corpus("retain", retain, words, length, chat, seed)
    forms = corpus.forms
    calibrates = choose_calibration(calibrate, config, mode, words, corpus)
    given = list_given({"forget": forms[0]} | ({"retain": kept.forms[0]} if kept else {}), words)
    refuse_overlap(given)
    unseen = _make_controls(controls, forms, given, words, length, chat, seed)
    if chat is None and max(len(forms), len(kept.forms) if kept else 0) > 1:
        logger.warning(TEMPLATE_USED)
    journal = Journal()
    if folder is not None:
        request = {
            "forget": digest(corpus), "retain": digest(kept), "controls": digest(unseen),
            "existing": digest(earlier), "former": digest(known), "recipe": config, "goals": goals,
            "budget": budget, "mode": mode, "keep_slopes": keep_slopes, "samples": samples,
            "made_up": made_up, "calibrate": calibrate, "rewrite_with": rewrite_with,
            "start_layer": start_layer, "max_length": max_length, "chat": chat, "seed": seed,
        }  # fmt: skip
        weights = fingerprint(ffns, {}) | adapter_fingerprint(network)
        layout = describe_layout(network)
        journal = Journal(folder, request, weights, layout, resume, kinds=KEPT)
    found = []
    if rewrite_with:
        rewritten = journal.once(
            "rewritten", lambda: agree(_rewrite(corpus.sample, rewrite_with, seed, watch))
        )
        found.append(encode(rewritten, need_tokenizer(words), length, chat))
    with mute(network, earlier) if earlier else nullcontext():
        if made_up:
            options = (need_tokenizer(words), forms[0], given, made_up, length, seed)
            answered = journal.once("answered", lambda: agree(ask_about_strangers(network, *options)))
            found += [answered] if answered else []
        whole = corpus.windows
        width = whole.width if isinstance(whole, Windows) else whole["labels"].shape[1]
        others = kept is not None or bool(found)
        said = journal.once(
            "said",
            lambda: sample_neighbours(network, words, forms[0], width, others, samples, seed, watch),
        )
        if said:
            found.append(encode(said, need_tokenizer(words), length))
        if not others and not found:
            raise ValueError(
                "there is nothing to keep: the model said nothing when sampled from; give retain"
            )
        retain_batch = join_windows(kept and kept.windows, found)
        measured = sample_rows(retain_batch, MEASURED_TEXTS, seed)
        if len(measured["labels"]) < count_rows(retain_batch):
            logger.warning(
                "The retain loss is measured on %d of %d texts, drawn at random.",
                len(measured["labels"]),
                count_rows(retain_batch),
            )
        asked = journal.once("asked", lambda: most_known(network, forms))

        def look() -> Look:
            return look_at(network, words, measured, asked)

        look_before = journal.once("look before", look)
        work = estimate_work(whole, retain_batch, config, mode, processes.count if processes else 1)
        # Each budget tried takes as many steps.
        tried = isinstance(budget, str)
        done = len(journal.history) % work.steps if tried else len(journal.history)
        left = estimate_search(look_before.token, work, done, count_tokens(retain_batch))
        left += _estimate_measuring(journal, look_before, forms, unseen, calibrates)
        announce(f"From here on the job takes{', with one budget tried,' * tried}", left)
        ceilings = None
        if calibrates:
            # A callback is told of steps.
            shown = watch if callback is None else None
            ceilings = estimate_ceilings(journal, network, words, corpus, given, seed, shown)

        def measure() -> tuple[Examination, Examination | None]:
            return (
                examine(network, words, forms, given),
                examine(network, words, unseen, given, "controls") if unseen else None,
            )

        before, controls_before = journal.once("before", measure)
    curve = None
    with attach(network, start_layer) as masked, watch("Finding neurons", journal.history) as advance:
        pair = PairedBatches(masked, whole, retain_batch, ceilings)
        if isinstance(config, FittedConfig) and ceilings is not None:
            config = widen_margin(config)
        if isinstance(config, PaperConfig):
            mutes = train_gates(pair, config, seed, advance, journal)
        elif isinstance(budget, str):
            mutes, curve = search_budget(
                pair, goals or Goals(), mode=mode, config=config, seed=seed,
                callback=advance, existing=earlier, forms=forms, former=known, journal=journal,
            )  # fmt: skip
        else:
            mutes = fit_mutes(
                pair, budget, mode, config, seed, advance, earlier, former=known, journal=journal
            )
        if ceilings is not None:
            mutes = dataclasses.replace(mutes, method=mutes.method | {"calibrated": True})
        measured_slopes = measure_slopes(pair, mutes, earlier) if keep_slopes else None
    if folder is not None and is_first():
        with made_folder(folder) as made:
            write_sets(made, mutes, measured_slopes)
    # With slopes, the mutes are those of all requests.
    with mute(network, combine(network, [earlier, mutes]) if earlier and not known else mutes):
        after, controls_after = journal.once("after", measure)
        look_after = journal.once("look after", look)
    metrics = {
        "before": before.metrics | {"retain_loss": look_before.loss},
        "after": after.metrics | {"retain_loss": look_after.loss},
    }
    verdict, texts = judge_texts(given, after, controls_after, before, controls_before)
    outcome = Outcome(
        mutes=dataclasses.replace(mutes, metrics=metrics),
        slopes=measured_slopes,
        **metrics,
        controls=controls_after.metrics if controls_after else None,
        verdict=verdict,
        texts=texts,
        curve=curve,
        history=journal.history,
        samples=[
            {"prompt": old["prompt"], "truth": old["truth"], "before": old["said"], "after": new["said"]}
            for old, new in zip(look_before.said, look_after.said, strict=True)
        ],
        seconds=journal.seconds + time.perf_counter() - start,
        peak_memory=measure_peak_memory(),
        max_length=max_length,
        chat=chat,
    )
    return agree(outcome)


def _make_controls(
    controls: TextSource | None,
    forms: list[Batch],
    given: Sequence[GivenText],
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    chat: bool | None,
    seed: int,
) -> list[Batch] | None:
    """The texts that the model never saw, in all their forms; None where nobody can make any."""
    if controls is None:
        return make_controls(forms, given, tokenizer, seed) if tokenizer else None
    found = encode_forms_of("controls", collect_texts("controls", controls), tokenizer, max_length, chat)
    refuse_seen(found[0], given, tokenizer)
    return found


def _estimate_measuring(
    journal: Journal, look: Look, forms: list[Batch], unseen: list[Batch] | None, calibrates: bool
) -> float:
    """Estimate the seconds that all but the search takes, as far as ``journal`` does not know it."""
    once = estimate_examination(look, forms) + estimate_examination(look, unseen)
    left = sum(once for state in ("before", "after") if not journal.knows(state))
    if calibrates and not journal.knows("unseen"):
        left += estimate_calibration(look, forms[0])
    return left


def _check_recipe(
    recipe: str | FittedConfig | PaperConfig,
    budget: int | float | str,
    mode: str,
    existing: MuteSource | None,
    goals: Goals | None,
    with_slopes: bool,
) -> FittedConfig | PaperConfig:
    names: dict[object, FittedConfig | PaperConfig] = {"fitted": FittedConfig(), "paper": PaperConfig()}
    config = recipe if isinstance(recipe, FittedConfig | PaperConfig) else names.get(recipe)
    if config is None:
        raise ValueError(f'recipe must be "fitted", "paper", a FittedConfig or a PaperConfig, got {recipe!r}')
    if isinstance(budget, str) and budget != "auto":
        raise ValueError(f'budget must be a share (0.01), a number (300) or "auto", got {budget!r}')
    if goals is not None and budget != "auto":
        raise ValueError('goals need budget="auto"')
    if mode not in ("mute", "modulate"):
        raise ValueError(f'mode must be "mute" or "modulate", got {mode!r}')
    if isinstance(config, PaperConfig) and (existing is not None or with_slopes):
        raise ValueError('recipe "paper" takes no existing, no former and no keep_slopes; use "fitted"')
    return config


def _rewrite(texts: list[Text] | Batch, model: str, seed: int, watch: Watch) -> list[Text]:
    """Neighbours by a masked language model."""
    if isinstance(texts, dict):
        raise ValueError("rewrite_with needs texts in forget, not a batch of token ids")
    network = transformers.AutoModelForMaskedLM.from_pretrained(
        model, trust_remote_code=False, local_files_only=find_model(model)
    ).eval()
    network = network.to("cuda" if torch.cuda.is_available() else "cpu")
    with watch("Rewriting texts") as advance:
        return rewrite_texts(texts, network, load_tokenizer(model), seed=seed, callback=advance)


def measure_peak_memory() -> int:
    """Measure the largest memory that was in use so far, in bytes: of the GPU, or else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
