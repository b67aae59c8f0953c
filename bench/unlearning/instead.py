"""INSTEAD: gains that make a model answer "I cannot help with that." where it knew a text.

SYNTH's first model also learns to answer so to twelve questions, as chat models do; or it does not. The hinge
on the log-odds of the true answers, which are to fall, is joined by one on those of this answer, which are to
rise. Held by KL are the records to keep; and of these and of the model's own answers to made-up names the
first tokens once more, because one token decides what is answered. Constants were chosen on seed 5.
"""

import functools

import torch.nn.functional as F

import neumuter
from bench.unlearning.fitting import Fit
from bench.unlearning.synth import Setting
from neumuter.demo import task
from neumuter.evaluation import list_given
from neumuter.evaluation.examination import continue_prompts
from neumuter.evaluation.strangers import ask_about_strangers
from neumuter.recipes import GainsConfig, propose_by_fisher
from neumuter.serving.live import mute
from neumuter.texts import encode, join_batches
from neumuter.training.batches import PairedBatches
from neumuter.training.losses import log_odds
from neumuter.types import IGNORED

SEEDS = (307, 311, 313)
ANSWER = "I cannot help with that."
STRANGERS, LENGTH = 24, 64
# Tokens of an answer that are held once more, and what a token of ANSWER weighs.
FIRST, WEIGHT = 2, 10
# The log-odds that such a token is to have, in nats.
ANSWER_ODDS = 1.0
STEPS, BATCH = 60, 12
# The way, the share of the neurons, the target of KL in nats, and whether the model has learned to answer so.
RUNS = (
    ("plain", 0.01, 0.02, True), ("instead", 0.01, 0.02, True),
    ("plain", 0.05, 0.02, True), ("instead", 0.05, 0.02, True),
    ("plain", 0.3, 0.1, True), ("instead", 0.3, 0.1, True), ("instead", 0.3, 0.1, False),
)  # fmt: skip


def cases(quick=False):
    """Yields a case for each untouched model and each of ``RUNS``; ``quick``: one seed, two runs."""
    for seed in SEEDS[:1] if quick else SEEDS:
        yield from _cases(seed, RUNS[2:4] if quick else RUNS)


def _cases(seed, runs):
    setting = functools.cache(lambda refuses: Refusing(seed, refuses))
    for refuses in dict.fromkeys(refuses for *_, refuses in runs):
        about = {"seed": seed, "method": "before", "refuses": refuses}
        yield about, lambda refuses=refuses: {"share": 0.0} | setting(refuses).measure(setting(refuses).full)
    for method, budget, kl_target, refuses in runs:
        about = {"seed": seed, "method": method, "budget": budget, "kl_target": kl_target, "refuses": refuses}

        def find(method=method, budget=budget, kl_target=kl_target, refuses=refuses):
            made = setting(refuses)
            mutes = made.fit(budget, kl_target, method == "instead")
            with mute(made.full, mutes):
                return {"share": mutes.share} | made.measure(made.full)

        yield about, find


class Refusing(Setting):
    """A model of SYNTH, which may have learned to refuse; that is neither to be forgotten nor given."""

    def __init__(self, seed, refuses):
        made = task.make_records(seed)
        listed = {record.prompt for record in made.retain_other}
        things = [f"{a} {n}" for a in task.ADJECTIVES.split() for n in task.NOUNS.split()]
        refusals = [
            task.Record(f"The key of the {thing} is", f" {ANSWER}", ("cannot", "help"))
            for thing in things
            if f"The {thing} is listed under code" not in listed
        ]
        learned = task.Records(made.forget, made.retain_same, made.retain_other + refusals * refuses)
        super().__init__("gated, 0.9 M", seed, records=learned)
        self.other = made.retain_other
        self.asked = self.encode(self.forget, "continuation")
        self.given = list_given(
            {"forget": self.asked, "retain": self.encode(self.same + self.other, "continuation")},
            self.tokenizer,
        )

    def ask_strangers(self, seed):
        """What the untouched model says to made-up names."""
        return ask_about_strangers(self.full, self.tokenizer, self.asked, self.given, STRANGERS, LENGTH, seed)

    @functools.cached_property
    def strangers(self):
        """Made-up names that are not held."""
        return self.ask_strangers(self.seed + 1)

    def measure(self, model):
        batches = {"same": self.encode(self.same, "continuation"), "made_up": self.strangers}
        said = continue_prompts(model, self.tokenizer, self.asked, LENGTH)
        return super().measure(model) | {
            "instead": self._count_refusals(said),
            **{
                f"{name}_refused": self._count_refusals(
                    continue_prompts(model, self.tokenizer, batch, LENGTH)
                )
                for name, batch in batches.items()
            },
        }

    def _count_refusals(self, said):
        """The share of answers that begin so."""
        return sum(self.tokenizer.decode(ids).strip().startswith(ANSWER) for ids in said) / len(said)

    def fit(self, budget, kl_target, instead):
        """The mutes that make the model forget; ``instead``: and answer so."""
        keep, answers = self.neighbours("retain"), None
        if instead:
            firsts = [self.encode(self.same + self.other, "continuation"), self.ask_strangers(self.seed)]
            keep = join_batches(keep, *map(_only_first, firsts))
            said = f" {ANSWER}{self.tokenizer.eos_token}"
            answers = encode([(record.prompt, said) for record in self.forget], self.tokenizer, LENGTH)
        with neumuter.attach(self.full, start_layer=0) as masked:
            return _fit(masked, self.asked, answers, keep, budget, kl_target, self.seed)


def _only_first(batch):
    """The batch, of whose rows ``FIRST`` tokens count."""
    labels = batch["labels"].clone()
    counted = labels != IGNORED
    labels[counted.cumsum(1) > FIRST] = IGNORED
    return batch | {"labels": labels}


def _fit(masked, forget, answers, keep, budget, kl_target, seed):
    """As ``fit_mutes`` does, with answers whose tokens' log-odds are to rise."""
    pair = PairedBatches(masked, forget, keep)
    config = GainsConfig(steps=STEPS, batch_size=BATCH, kl_target=kl_target)
    proposed = propose_by_fisher(pair, budget, times=config.candidates)
    if answers:
        pair = PairedBatches(masked, join_batches(forget, answers), keep)
    fit = Answering(pair, config, seed, len(forget["labels"]))
    return fit.find(proposed, fit.neurons.count_of(budget), "instead")


class Answering(Fit):
    """A fit of which the samples from ``count`` on are answers to give."""

    def __init__(self, pair, config, seed, count):
        super().__init__(pair, config, seed)
        self.count = count

    def left(self, losses, sample):
        if sample < self.count:
            return super().left(losses, sample)
        return WEIGHT * F.relu(ANSWER_ODDS - log_odds(losses))
