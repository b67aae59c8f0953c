"""INSTEAD: gains that make a model answer "I cannot help with that." where it knew a text.

SYNTH's first model also learns to answer so to twelve questions, as chat models do; or it does not. The hinge
on the log-odds of the true answers, which are to fall, is joined by one on those of this answer, which are to
rise. Held by KL are the records to keep; and of these and of the model's own answers to made-up names the
first tokens once more, because one token decides what is answered. Constants were chosen on seed 5.
"""

import functools
import math

import torch
import torch.nn.functional as F

import neumuter
from bench.unlearning.synth import Setting
from neumuter.demo import task
from neumuter.evaluation import list_given
from neumuter.evaluation.examination import continue_prompts
from neumuter.evaluation.strangers import ask_about_strangers
from neumuter.recipes import propose_by_fisher
from neumuter.serving.live import mute
from neumuter.texts import encode, join_batches
from neumuter.training.batches import PairedBatches
from neumuter.training.losses import log_odds, weigh_harm
from neumuter.training.neurons import Neurons
from neumuter.types import IGNORED

SEEDS = (307, 311, 313)
ANSWER = "I cannot help with that."
STRANGERS, LENGTH = 24, 64
# Tokens of an answer that are held once more, and what a token of ANSWER weighs.
FIRST, WEIGHT = 2, 10
STEPS, CHOOSING, BATCH, LR, MARGIN = 60, 20, 12, 0.1, 1.0
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
    pair, neurons = PairedBatches(masked, forget, keep), Neurons(masked)
    count = len(forget["labels"])
    support = neurons.ids(propose_by_fisher(pair, budget, times=3.0))
    if answers:
        pair = PairedBatches(masked, join_batches(forget, answers), keep)
    gains, eta, source = torch.ones(len(support), device=neurons.device), 30.0, pair.steps(BATCH, seed)
    for steps in (CHOOSING, STEPS - CHOOSING):
        if steps != CHOOSING:
            chosen = (gains - 1).abs().topk(neurons.count_of(budget)).indices
            support, gains = support[chosen], gains[chosen]
        gains.requires_grad_()
        adam = torch.optim.Adam([gains], LR, (0.9, 0.99))
        for step in range(steps):
            adam.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * step / steps)) / 2
            ids = next(source)
            mask = neurons.start.index_put((support,), gains)
            with masked.applying(neurons.by_layer(mask)):
                losses, divergences = pair.token_losses(ids)
            told = torch.cat([torch.full([pair.count_tokens([i])[0]], i >= count) for i in ids])
            told = told.to(losses.device)
            signs, weights = torch.where(told, -1, 1), torch.where(told, WEIGHT, 1)
            odds = weights * F.relu(MARGIN + signs * log_odds(losses))
            adam.zero_grad()
            (odds.mean() + eta * weigh_harm(divergences).mean()).backward()
            adam.step()
            with torch.no_grad():
                gains.clamp_(-2, 2)
            kl = divergences.mean().item()
            eta = min(max(eta * math.exp(0.15 * min(max(kl / kl_target - 1, -1), 1)), 1.0), 100.0)
        gains = gains.detach()
    return neurons.mute_set(support, gains, "modulate", (-2.0, 2.0), {"recipe": "instead"}, seed)
