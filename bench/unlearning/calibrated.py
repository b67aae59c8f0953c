"""CALIBRATED: is each token forgotten no further than a model that never saw the texts would know it?

SYNTH's first model. All tokens of a record behind its prompt count, the wording around the secrets included,
as with texts that people give. The estimate of what a model that never saw them would make of them is
compared with the model that is retrained without them; then gains are fitted with it and without.
"""

import functools

import torch

import neumuter
from bench.unlearning.synth import RECIPE, Setting
from neumuter import evaluation
from neumuter.evaluation import estimate_unseen, find_ceilings, list_given
from neumuter.recipes import FittedConfig, GainsConfig
from neumuter.serving.live import mute
from neumuter.types import IGNORED

# The method was chosen on seeds 5, 6 and 7. Nobody has tuned anything on these.
SEEDS = (307, 311, 313)
SHARE = 0.05
GAINS = GainsConfig(steps=RECIPE["steps"], batch_size=RECIPE["batch_size"])
METHODS = {"plain": False, "calibrated": True}


class Worded(Setting):
    """SYNTH with all tokens behind the prompts to forget."""

    def __init__(self, seed):
        super().__init__("gated, 0.9 M", seed)
        self.texts = [(record.prompt, record.continuation) for record in self.forget]
        self.batch = self.encode(self.forget, "continuation")

    def measure(self, model):
        worded = {
            "worded_ma": evaluation.memorization_accuracy(model, self.batch),
            "worded_loss": evaluation.mean_token_loss(model, self.batch),
            "worded_min_k": evaluation.min_k_scores(model, self.batch).mean().item(),
        }
        return super().measure(model) | worded

    def find(self, calibrate):
        outcome = neumuter.unlearn(
            self.full, self.tokenizer, self.batch, self.neighbours("retain"), budget=SHARE,
            recipe=FittedConfig(GAINS), calibrate=calibrate, samples=0, start_layer=0, seed=self.seed,
            callback=lambda *_: None,
        )  # fmt: skip
        with mute(self.full, outcome.mutes):
            return {"share": outcome.mutes.share} | self.measure(self.full)

    def estimate(self):
        """How the estimate agrees with the retrained model on which tokens are likely, and its mean loss."""
        given = list_given({"forget": self.batch}, self.tokenizer)
        estimate = estimate_unseen(self.full, self.batch, given, self.tokenizer, self.seed)
        known = _chances(self.full, self.batch)
        # A name is read off the prompt, as it is by the model that knows the text.
        estimate = torch.where(estimate.isnan(), known, estimate)
        true = _chances(self.retrained(), self.batch)
        counted = self.batch["labels"][:, 1:] != IGNORED
        agree = ((estimate > 0.5) == (true > 0.5))[:, 1:][counted].float().mean().item()
        loss = -find_ceilings(estimate)[:, 1:][counted].sigmoid().log().mean().item()
        return {"agree": agree, "worded_loss": loss}


def _chances(model, batch):
    """The probability of each token given those before it, [B, T]; 1 of the first."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    found = logits[:, :-1].softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return torch.cat([torch.ones(len(found), 1), found], 1)


def cases(quick=False):
    """Yields a case for each seed and method, and what the estimate says."""
    for seed in SEEDS[:1] if quick else SEEDS:
        setting = functools.cache(functools.partial(Worded, seed))
        yield from _cases(seed, setting, quick)


def _cases(seed, setting, quick):
    yield {"seed": seed, "method": "before"}, lambda: {"share": 0.0} | setting().measure(setting().full)
    if not quick:
        yield (
            {"seed": seed, "method": "retrained"},
            lambda: {"share": 0.0} | setting().measure(setting().retrained()),
        )
        yield {"seed": seed, "method": "estimate"}, lambda: setting().estimate()
    for method, calibrate in METHODS.items():
        yield {"seed": seed, "method": method}, functools.partial(_find, setting, calibrate)


def _find(setting, calibrate):
    return setting().find(calibrate)
