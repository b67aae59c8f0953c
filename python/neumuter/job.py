"""The parts of one job of ``neumuter.unlearn``, each of which a later process finds in the journal."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from neumuter.calibrating import estimate_ceilings
from neumuter.estimating import Look, estimate_calibration, estimate_examination, estimate_search, look_at
from neumuter.evaluation import examine, mean_token_loss, most_known, only_secrets, secret_extraction
from neumuter.evaluation.examination import Examination
from neumuter.evaluation.made_up import Words
from neumuter.evaluation.others import Found, GivenText
from neumuter.evaluation.strangers import ask_about_strangers
from neumuter.models.hub import find_model
from neumuter.models.loading import load_tokenizer
from neumuter.mutes.mute_set import MuteSet
from neumuter.mutes.slopes import Slopes
from neumuter.preparing import can_sample, need_tokenizer, sample_neighbours
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
from neumuter.texts import encode
from neumuter.texts.chat import plain
from neumuter.texts.corpus import Corpus
from neumuter.texts.encoding import count_rows, count_tokens, join_windows, sample_rows
from neumuter.texts.neighbours import last_part, rewrite_texts, sample_texts
from neumuter.texts.store import Windows
from neumuter.training.batches import PairedBatches
from neumuter.training.history import count_steps
from neumuter.training.journal import Journal
from neumuter.training.masked import attach
from neumuter.training.processes import agree, find_processes
from neumuter.training.shortage import tell_of_shortage
from neumuter.types import Batch, Text

# What an unfinished run has found so far is made of these.
KEPT = (Examination, Found, Look)
# Retain texts whose loss is measured.
MEASURED_TEXTS = 512
# Texts of the model itself on which harm to what else it knows is measured, and what draws others than those
# that are kept.
CHECKED, OTHER_SEED = 16, 1 << 31

logger = logging.getLogger("neumuter")


@dataclasses.dataclass(frozen=True)
class Request:
    """On these arguments of ``unlearn`` the outcome depends, besides the model and the texts.

    budget: None until the texts are counted.
    """

    recipe: FittedConfig | PaperConfig
    budget: int | float | str | None
    mode: str
    goals: Goals | None
    keep_slopes: bool
    samples: int | None
    made_up: int
    calibrate: bool | None
    rewrite_with: str | None
    start_layer: int
    max_length: int
    chat: bool | None
    seed: int


class Texts(NamedTuple):
    """The texts of a request. given: those to forget and those to keep, in words. controls: in all forms."""

    forget: Corpus
    retain: Corpus | None
    given: list[GivenText]
    controls: list[Batch] | None
    # Tokens of a window.
    length: int


class Job(NamedTuple):
    """The parts of the work, each of which a later process finds in the journal."""

    network: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    request: Request
    texts: Texts
    earlier: MuteSet | None
    known: Sequence[Slopes]
    journal: Journal
    watch: Watch

    def gather_retain(self) -> Windows | Batch:
        """What is to be kept: the texts that were given, and those that models write."""
        request, texts, journal = self.request, self.texts, self.journal
        found = []
        if request.rewrite_with:
            rewritten = journal.once("rewritten", lambda: agree(self._rewrite()))
            found.append(encode(rewritten, need_tokenizer(self.tokenizer), texts.length, request.chat))
        if request.made_up:
            answered = journal.once("answered", lambda: agree(self._ask_about_strangers()))
            found += [answered] if answered else []
            if (count := count_rows(answered) if answered else 0) < request.made_up:
                logger.warning(
                    "%d of %d answers about made-up names are kept: the others say nothing, or hold what is "
                    "to be forgotten.",
                    count,
                    request.made_up,
                )
        others = sum(count_rows(part) for part in (texts.retain and texts.retain.windows, *found) if part)
        if said := journal.once("said", lambda: self._sample(others)):
            found.append(encode(said, need_tokenizer(self.tokenizer), texts.length))
        if not others and not found:
            why = "samples is 0" if request.samples == 0 else "the model said nothing when sampled from"
            raise ValueError(f"there is nothing to keep: {why}; give retain")
        return join_windows(texts.retain and texts.retain.windows, found)

    def _rewrite(self) -> list[Text]:
        """The texts to forget as a masked language model rewrites them."""
        texts, name = self.texts.forget.texts, str(self.request.rewrite_with)
        if isinstance(texts, dict):
            raise ValueError("rewrite_with needs texts in forget, not a batch of token ids")
        network = transformers.AutoModelForMaskedLM.from_pretrained(
            name, trust_remote_code=False, local_files_only=find_model(name)
        ).eval()
        network = network.to("cuda" if torch.cuda.is_available() else "cpu")
        words = Words(self.texts.given)

        def find_secrets(text: Text) -> list[tuple[int, int]]:
            # What is rewritten is to be kept: it must not hold what is to be forgotten.
            prompt = "" if isinstance(text, str) else plain(text)[0]
            return words.find_values(prompt, last_part(text))

        with self.watch("Rewriting texts") as advance:
            return rewrite_texts(
                texts, network, load_tokenizer(name), seed=self.request.seed, callback=advance,
                find_secrets=find_secrets,
            )  # fmt: skip

    def _ask_about_strangers(self) -> Batch | None:
        """What the model answers to prompts with made-up names."""
        forms, given, length = self.texts.forget.forms, self.texts.given, self.texts.length
        words, count, seed = need_tokenizer(self.tokenizer), self.request.made_up, self.request.seed
        return ask_about_strangers(self.network, words, forms[0], given, count, length, seed)

    def _sample(self, others: int) -> list[Text]:
        """What the model says of its own accord, in windows as wide as those of the texts to forget."""
        request, barred = self.request, self.texts.forget.forms[0]
        return sample_neighbours(
            self.network, self.tokenizer, barred, self._width, others, request.samples, request.seed,
            self.watch,
        )  # fmt: skip

    @property
    def _width(self) -> int:
        whole = self.texts.forget.windows
        return whole.width if isinstance(whole, Windows) else whole["labels"].shape[1]

    def measure_own(self, state: str) -> float | None:
        """The loss of texts that the model said before the search, which does not see them.

        None if the model is to say nothing, or cannot.
        """
        if self.request.samples == 0 or not can_sample(self.tokenizer):
            return None
        words, barred = need_tokenizer(self.tokenizer), self.texts.forget.forms[0]
        seed = self.request.seed + OTHER_SEED

        def say() -> list[str]:
            return agree(sample_texts(self.network, words, CHECKED, self._width, seed, barred=barred))

        def measure() -> float:
            return mean_token_loss(self.network, encode(said, words, self.texts.length))

        said: list[str] = self.journal.once("own", say)
        return self.journal.once(f"own {state}", measure) if said else None

    def look(self, state: str, retain_batch: Windows | Batch) -> Look:
        """A look at the loss of texts to keep, and at what the model says of a few texts to forget."""
        measured = sample_rows(retain_batch, MEASURED_TEXTS, self.request.seed)
        asked = self.journal.once("asked", lambda: most_known(self.network, self.texts.forget.forms))
        return self.journal.once(
            f"look {state}", lambda: look_at(self.network, self.tokenizer, measured, asked)
        )

    def measure(self, state: str, ceilings: Tensor | None) -> tuple[Examination, Examination | None]:
        """What the model knows of the texts to forget, and of the controls.

        ceilings: what ``estimate_ceilings`` found; those tokens are secrets that may not stay likely.
        """
        given, unseen = self.texts.given, self.texts.controls

        def find() -> tuple[Examination, Examination | None]:
            found = examine(self.network, self.tokenizer, self.texts.forget.forms, given)
            if secrets := only_secrets(self.texts.forget.forms[0], ceilings):
                # The share of secrets that come out behind the true words before them.
                found.metrics["forget_secrets"] = secret_extraction(self.network, secrets)
            if unseen is None:
                return found, None
            return found, examine(self.network, self.tokenizer, unseen, given, "controls")

        return self.journal.once(state, find)

    def estimate_ceilings(self) -> Tensor | None:
        """How far each token is to be forgotten, [B, T]."""
        words, texts, seed = self.tokenizer, self.texts, self.request.seed
        return estimate_ceilings(
            self.journal, self.network, words, texts.forget.forms[0], texts.given, seed, self.watch
        )

    def announce(self, look: Look, retain_batch: Windows | Batch, calibrates: bool) -> None:
        """Say how long the rest will take."""
        request, texts, journal = self.request, self.texts, self.journal
        if (rows := count_rows(retain_batch)) > MEASURED_TEXTS:
            logger.warning(
                "The retain loss is measured on %d of %d texts, drawn at random.", MEASURED_TEXTS, rows
            )
        processes = find_processes(self.network)
        count = processes.count if processes else 1
        work = estimate_work(texts.forget.windows, retain_batch, request.recipe, request.mode, count)
        # Each budget tried takes as many steps.
        tried = isinstance(request.budget, str)
        taken = count_steps(journal.history)
        done = taken % work.steps if tried else taken
        left = estimate_search(look.token, work, done, count_tokens(retain_batch))
        forms = texts.forget.forms
        once = estimate_examination(look, forms) + estimate_examination(look, texts.controls)
        left += sum(once for state in ("before", "after") if not journal.knows(state))
        if calibrates and not journal.knows("unseen"):
            left += estimate_calibration(look, forms[0])
        announce(f"From here on the job takes{', with one budget tried,' * tried}", left)

    def search(
        self, retain_batch: Windows | Batch, ceilings: Tensor | None
    ) -> tuple[MuteSet, Slopes | None, list[dict[str, Any]] | None]:
        """The mute set, the slopes if they are to be kept, and the budgets if several were tried."""
        request, journal, known = self.request, self.journal, self.known
        config, curve, slopes = request.recipe, None, None
        secrets = only_secrets(self.texts.forget.forms[0], ceilings)
        if request.goals and request.goals.secrets is not None and secrets is None:
            raise ValueError("goal secrets cannot be measured: no word of the texts to forget is a secret")
        with attach(self.network, request.start_layer) as masked:
            pair = PairedBatches(masked, self.texts.forget.windows, retain_batch, ceilings)
            with self.watch("Finding neurons", of_steps=True, history=journal.history) as advance:
                if isinstance(config, PaperConfig):
                    mutes = train_gates(pair, config, request.seed, advance, journal)
                elif isinstance(request.budget, str):
                    mutes, curve = search_budget(
                        pair, request.goals or Goals(), mode=request.mode, config=config, seed=request.seed,
                        callback=advance, existing=self.earlier, forms=self.texts.forget.forms, former=known,
                        journal=journal, secrets=secrets,
                    )  # fmt: skip
                else:
                    mutes = fit_mutes(
                        pair, cast(float, request.budget), request.mode, config, request.seed, advance,
                        self.earlier, former=known, journal=journal,
                    )  # fmt: skip
            tell_of_shortage(pair)
            if ceilings is not None:
                mutes = dataclasses.replace(mutes, method=mutes.method | {"calibrated": True})
            if request.keep_slopes:
                with self.watch("Measuring slopes") as advance:
                    slopes = measure_slopes(pair, mutes, self.earlier, advance)
        return mutes, slopes, curve
