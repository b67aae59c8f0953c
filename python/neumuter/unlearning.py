"""The whole job in one call: find neighbours, measure, search, measure again.

The module is not called ``unlearn``, so that importing it never hides the function of that name.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neumuter.calibrating import choose_calibration
from neumuter.evaluation import judge_texts, list_given, make_controls
from neumuter.evaluation.made_up import FEW_TEXTS
from neumuter.files import PathLike, made_folder
from neumuter.job import KEPT, Job, Request, Texts
from neumuter.models.content import describe_model
from neumuter.models.loading import limit_length
from neumuter.mutes.algebra import combine
from neumuter.mutes.fingerprint import refuse_unsketchable
from neumuter.mutes.matching import matching_ffns
from neumuter.mutes.mute_set import MuteSet, MuteSource, load_mutes
from neumuter.mutes.slopes import SlopesSource, check_listed, load_slopes
from neumuter.outcome import MUTE_FILE, SLOPES_FILE, Outcome, write_sets
from neumuter.preparing import (
    compare_models,
    encode_forms_of,
    name_windows,
    open_network,
    refuse_overlap,
    refuse_same,
    refuse_seen,
    warn_of_missing,
    warn_of_unvisited,
)
from neumuter.recipes import FittedConfig, Goals, PaperConfig
from neumuter.recipes.search import UNKNOWN_SECRETS
from neumuter.recipes.share import LEAST, NEURONS_PER_TEXT, are_few, choose_share
from neumuter.report.progress import Watch
from neumuter.serving.live import mute
from neumuter.texts import collect_texts
from neumuter.texts.chat import TEMPLATE_USED
from neumuter.texts.corpus import Corpus, read_corpus
from neumuter.texts.duplicates import find_same
from neumuter.texts.encoding import count_rows
from neumuter.texts.sources import TextSource
from neumuter.training.journal import Journal, check_shared, digest, refuse_unfinished
from neumuter.training.masked import split_ffns
from neumuter.training.neurons import refuse_taken, refuse_unmasked
from neumuter.training.processes import (
    agree,
    are_many,
    check_same,
    describe_layout,
    failing_together,
    find_most,
    find_processes,
    is_first,
)
from neumuter.training.selection import neuron_count
from neumuter.training.shortage import remember_shortage
from neumuter.types import Callback

FEW_TEXTS_GIVEN = (
    "Fewer than %d texts are given, counting those to keep: every word with a capital letter or a digit is "
    "taken for a name, and where a prompt has none, every word is. What identifies the texts is estimated "
    "less well, and controls are less like them. Give more texts to keep."
)

logger = logging.getLogger("neumuter")


def unlearn(
    model: nn.Module | str,
    tokenizer: PreTrainedTokenizerBase | str | None,
    forget: TextSource,
    retain: TextSource | None = None,
    *,
    budget: int | float | str | None = None,
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
    the same arguments; what differs is refused in all of them, and so is what one of them alone refuses at
    the start. They share the samples of each step, and all return the outcome of the first one, which alone
    writes ``folder``, one that all of them share, and shows progress.

    Args:
        model: a causal language model of transformers; or its folder or name, which is loaded.
        tokenizer: its tokenizer; or a folder or name. None takes that of a model given by name; it may also
            be None where all texts are batches of token ids and ``samples`` is 0.
        forget: the texts to forget: a path, a list of texts, of (prompt, completion) pairs or of chat
            messages, a ``datasets.Dataset``, or a batch of token ids; see ``neumuter.texts.collect_texts``.
        retain: texts that must stay, likewise. None takes texts that the model itself says, which protects
            less.
        budget: how many neurons to touch: a share (float in (0, 1]) or a number (int); or "auto", the
            smallest share that reaches the ``goals``. None takes 0.01, but at least 20 neurons for each
            window of texts to forget, of 100 windows or more 60, as far as neurons are free; in mode "mute"
            always 0.01.
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
        samples: how many texts the model itself adds to those to keep: by default 32, or where there are
            retain, rewritten or made-up texts half as many as these, from 16 to 256.
        made_up: how many prompts to forget, with made-up names, the model answers itself; these answers are
            kept as well. They protect what resembles the forget texts, but take a larger budget to forget.
        calibrate: forget each token no further than to the probability that a model which never saw the
            texts would give it, by an estimate (see ``neumuter.evaluation.estimate_unseen``), and of each run
            of tokens that identify a text first of all the one that is nearest to being forgotten. For texts
            with prompts; others are forgotten as without. None does so where it can be done: with the
            fitted recipe, mode "modulate" and no trained support, a tokenizer, and up to 1,024 windows of
            texts.
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
            another one. Where nothing was left, the run starts anew. If several processes share the model and
            one of them ran out of memory, fewer samples go through the model at a time.
        callback: called as (step, total, info) after every step of the search, instead of a progress bar;
            info has "phase", "loss", "forget_loss" and "kl" in nats, and "muted", the share of neurons.

    Returns:
        An ``Outcome``; ``outcome.save(folder)`` writes the mute file and the report.

    Raises:
        ValueError, TypeError: an argument is not as above; or texts are to be forgotten and to be kept (equal
            texts are found among all, parts of others among those that are looked at one by one); or
            ``resume``, and something that matters has changed; or the run would replace ``existing`` or
            ``former`` in ``folder``.
        FileExistsError: an unfinished run is in ``folder``, and ``resume`` is false.
        NothingSelectedError: the recipe found no neuron; a ValueError.
        RuntimeError: the model is attached or muted already, the loss diverged, or the model predicts NaN.
        torch.OutOfMemoryError: one sample alone does not fit into memory, or processes share the model; a
            RuntimeError.
    """
    start = time.perf_counter()
    with failing_together():
        check_listed(former)
        config = _check_recipe(recipe, budget, mode, existing, goals, bool(former) or keep_slopes)
        if former and (existing is None or mode == "mute"):
            raise ValueError('former needs existing, the mute set that is in force, and mode "modulate"')
        if made_up < 0:
            raise ValueError(f"made_up must be at least 0, got {made_up}")
        if resume and folder is None:
            raise ValueError("resume needs folder, where the unfinished run is")
        request = Request(
            config, budget, mode, goals, keep_slopes, samples, made_up, calibrate, rewrite_with, start_layer,
            max_length, chat, seed,
        )  # fmt: skip
    # Before anything else, because what they do next depends on it.
    check_same(lambda: vars(request) | {"resume": resume, "folder": None if folder is None else "given"})
    if folder is not None:
        check_shared(folder)
        with failing_together():
            _refuse_replaced(folder, existing=[existing], former=former)
            if not resume and is_first():
                refuse_unfinished(folder)
    with failing_together():
        earlier = None if existing is None else load_mutes(existing)
        known = load_slopes(former)
        if earlier and known:
            warn_of_missing(earlier, len(known))
        network, words = open_network(model, tokenizer)
        fitted = [*([earlier] if earlier else []), *(slopes.at for slopes in known)]
        neurons = _count_neurons(network, start_layer, fitted)
        # With slopes the neurons of the earlier set are fitted anew, so none need be free.
        free = neurons - (earlier.count if earlier and not known else 0)
        refuse_taken(neuron_count(budget, neurons) if isinstance(budget, int | float) else 1, free)
        watch = Watch(callback)
        texts = _read_texts(forget, retain, controls, words, limit_length(network, max_length), request)
        warn_of_unvisited(config, mode, texts.forget)
        if isinstance(config, FittedConfig):
            request = dataclasses.replace(
                request, budget=_choose_budget(budget, mode, texts.forget, neurons, free)
            )
        calibrates = choose_calibration(calibrate, config, mode, words, texts.forget)
        if goals and goals.secrets is not None and not calibrates:
            raise ValueError(UNKNOWN_SECRETS)
    given = {
        "forget": texts.forget, "retain": texts.retain, "existing": earlier, "former": known,
        # Those that are made of the other texts say nothing new.
        "controls": None if controls is None else texts.controls,
    }  # fmt: skip
    journal = _open_journal(folder, resume, request, given, network)
    for slopes in known:
        matching_ffns(network, slopes.at)
    job = Job(network, words, request, texts, earlier, known, journal, watch)
    with nullcontext() if folder is None else remember_shortage(folder, resume):
        return agree(_run(job, folder, start, calibrates))


def _run(job: Job, folder: PathLike | None, start: float, calibrates: bool) -> Outcome:
    """Measure, search, and measure again; ``start`` is when the job began, in seconds."""
    network, texts, earlier, journal = job.network, job.texts, job.earlier, job.journal
    with mute(network, earlier) if earlier else nullcontext():
        retain_batch = job.gather_retain()
        look_before = job.look("before", retain_batch)
        own_before = job.measure_own("before")
        job.announce(look_before, retain_batch, calibrates)
        ceilings = job.estimate_ceilings() if calibrates else None
        before, controls_before = job.measure("before", ceilings)
    mutes, slopes, curve = job.search(retain_batch, ceilings)
    if folder is not None and is_first():
        with made_folder(folder) as made:
            write_sets(made, mutes, slopes)
    # With slopes, the mutes are those of all requests.
    others = earlier if not job.known else None
    with mute(network, combine(network, [others, mutes]) if others else mutes):
        after, controls_after = job.measure("after", ceilings)
        look_after = job.look("after", retain_batch)
        own_after = job.measure_own("after")
    metrics = {
        "before": before.metrics | _name_losses(look_before.loss, own_before),
        "after": after.metrics | _name_losses(look_after.loss, own_after),
    }
    verdict, judged = judge_texts(texts.given, after, controls_after, before, controls_before)
    return Outcome(
        mutes=dataclasses.replace(mutes, metrics=metrics),
        slopes=slopes,
        **metrics,
        controls=controls_after.metrics if controls_after else None,
        verdict=verdict,
        texts=judged,
        texts_given=texts.forget.total,
        windows_given=count_rows(texts.forget.windows),
        curve=curve,
        history=journal.history,
        samples=[
            {"prompt": old["prompt"], "truth": old["truth"], "before": old["said"], "after": new["said"]}
            for old, new in zip(look_before.said, look_after.said, strict=True)
        ],
        seconds=journal.seconds + time.perf_counter() - start,
        peak_memory=find_most(measure_peak_memory()),
        max_length=job.request.max_length,
        chat=job.request.chat,
    )


def _name_losses(retain: float, own: float | None) -> dict[str, float]:
    return {"retain_loss": retain} | ({} if own is None else {"own_loss": own})


def _count_neurons(network: nn.Module, start_layer: int, fitted: Iterable[MuteSet]) -> int:
    """Count the neurons that a search may touch, or raise what it would raise once texts were measured.

    fitted: the sets of earlier requests.
    """
    find_processes(network)
    _, ffns = split_ffns(network, start_layer)
    for ffn in ffns:
        refuse_unsketchable(ffn)
    widths = {ffn.path: ffn.width for ffn in ffns}
    for mutes in fitted:
        refuse_unmasked(mutes, widths)
    return sum(widths.values())


def _choose_budget(
    budget: float | int | str | None, mode: str, corpus: Corpus, neurons: int, free: int
) -> float | int | str:
    """Choose the budget by the number of texts where none is asked for; warn if it is small for them.

    Args:
        neurons: those that may be touched, of which ``free`` belong to no earlier request.
    """
    count = count_rows(corpus.windows)
    if budget is None:
        budget = min(choose_share(count, neurons, mode), free / neurons)
        if budget > LEAST:
            logger.info("For %s, %s of the neurons may be touched.", name_windows(corpus), f"{budget:.2%}")
    if isinstance(budget, str):
        return budget
    taken = neuron_count(budget, neurons)
    if are_few(count, taken):
        logger.warning(
            "%d neurons may be too few for %s: in measurements with fewer than %d neurons for each text, "
            "some texts still came out. docs/choose-a-budget.md says more.",
            taken, name_windows(corpus), NEURONS_PER_TEXT,
        )  # fmt: skip
    return budget


def _refuse_replaced(folder: PathLike, **sources: Sequence[object]) -> None:
    """Raise ValueError if a file that an argument names is one that the run writes into ``folder``."""
    written = [(Path(folder) / name).resolve() for name in (MUTE_FILE, SLOPES_FILE)]
    for argument, files in sources.items():
        for file in files:
            if isinstance(file, str | os.PathLike) and Path(file).resolve() in written:
                raise ValueError(f"{argument} {file} would be replaced: name another folder")


def _read_texts(
    forget: TextSource,
    retain: TextSource | None,
    controls: TextSource | None,
    tokenizer: PreTrainedTokenizerBase | None,
    length: int,
    request: Request,
) -> Texts:
    """Read all texts, and refuse those that contradict each other."""
    options = (tokenizer, length, request.chat, request.seed)
    corpus = read_corpus("forget", forget, *options, keeps_texts=bool(request.rewrite_with))
    kept = None if retain is None else read_corpus("retain", retain, *options)
    read = {"forget": corpus.forms} | ({"retain": kept.forms} if kept else {})
    given = list_given({name: forms[0] for name, forms in read.items()}, tokenizer)
    same = [] if kept is None else find_same(corpus.hashes, kept.hashes)
    # A template's words hide that a whole text holds a prompt and its completion, and it can make those alike
    # that are not without it.
    both = any(len(forms) > 1 for forms in read.values())
    plain = {name: forms[0 if request.chat is False else -1] for name, forms in read.items()} if both else {}
    refuse_overlap([*given, *list_given(plain, tokenizer)], same, corpus.total)
    if controls is None:
        # Nobody can make any without a tokenizer.
        unseen = make_controls(corpus.forms, given, tokenizer, length, request.seed) if tokenizer else None
    else:
        found = collect_texts("controls", controls)
        unseen = encode_forms_of("controls", found, tokenizer, length, request.chat)
        if not isinstance(found, dict):
            refuse_same(found, {"forget": corpus} | ({"retain": kept} if kept else {}))
        refuse_seen(unseen[0], given, tokenizer)
    if tokenizer and len({text.label for text in given}) < FEW_TEXTS:
        logger.warning(FEW_TEXTS_GIVEN, FEW_TEXTS)
    if request.chat is None and max(len(corpus.forms), len(kept.forms) if kept else 0) > 1:
        logger.warning(TEMPLATE_USED)
    return Texts(corpus, kept, given, unseen, length)


def _open_journal(
    folder: PathLike | None, resume: bool, request: Request, given: Mapping[str, Any], network: nn.Module
) -> Journal:
    """The file from which a later call with the same arguments goes on.

    given: {argument: what was read from it}.

    Raises:
        ValueError: processes were given something else, or another model; or the file is of another call.
    """
    if folder is None and not are_many():
        return Journal()
    digests = {name: digest(value) for name, value in given.items()}
    weights = compare_models(network, digests)
    asked = vars(request) | digests | describe_model(network)
    return Journal(folder, asked, weights, describe_layout(network), resume, kinds=KEPT)


def _check_recipe(
    recipe: str | FittedConfig | PaperConfig,
    budget: int | float | str | None,
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
    if isinstance(config, PaperConfig) and (budget is not None or existing is not None or with_slopes):
        raise ValueError(
            'recipe "paper" takes no budget, no existing, no former and no keep_slopes; use "fitted"'
        )
    return config


def measure_peak_memory() -> int:
    """Measure the largest memory that was in use so far, in bytes: of the fullest GPU, or of the process."""
    if torch.cuda.is_available():
        return max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
