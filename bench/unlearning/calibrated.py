"""CALIBRATED: is each token forgotten no further than a model that never saw the texts would know it?

All tokens behind a prompt count, the wording around the secrets included, as with texts that people give. The
estimate of what a model that never saw them would make of them is compared with the model that is retrained
without them; then gains are fitted with it and without it.
"""

import dataclasses
import functools

import torch

from bench.unlearning import real, synth
from bench.unlearning.methods import fit
from bench.unlearning.pretrained import GEMMA, SMOLLM2
from neumuter import evaluation
from neumuter.recipes import GainsConfig
from neumuter.recipes.schedule import LEAST_STEPS
from neumuter.serving.live import mute
from neumuter.training.masked import attach
from neumuter.types import IGNORED


class Compared:
    """What is the same of both models.

    A subclass is a ``Setting`` and says ``seeds``, ``share``, ``batch``, the texts to forget, ``secrets``,
    these with their secrets alone counted, ``retain``, those to keep, and ``unseen``, the estimate.
    """

    methods = ("calibrated", "plain")

    def find(self, method):
        """What is left with the mute set of ``find_mutes``."""
        mutes = self.find_mutes(method)
        with mute(self.full, mutes):
            return {"share": mutes.share} | self.measure(self.full)

    def find_mutes(self, method):
        """A mute set as ``unlearn`` finds it, without the estimate ("plain"), or in more steps ("longer")."""
        job = self.job(self.share)
        if method == "plain":
            # All tokens count alike, in as many steps as the default takes.
            job = dataclasses.replace(job, unseen=None)
            sizes = {"steps": None, "batch_size": GainsConfig.batch_size}
        else:
            sizes = {"steps": 2 * LEAST_STEPS} if method == "longer" else {}
        with attach(self.full, start_layer=0) as masked:
            return fit(job, masked, **sizes)

    def compare(self):
        """How the estimate agrees with the retrained model on which tokens are likely, and its mean loss.

        Where nothing is estimated, as of names, which are read off the prompt, the model stands for itself.
        """
        known = _chances(self.full, self.batch)
        estimate = torch.where(self.unseen > 0, self.unseen, known)
        true = _chances(self.retrained(), self.batch)
        counted = self.batch["labels"][:, 1:] != IGNORED
        agree = ((estimate > 0.5) == (true > 0.5))[:, 1:][counted].float().mean().item()
        loss = -estimate[:, 1:][counted].log().mean().item()
        return {"agree": agree, "worded_loss": loss}

    def measure(self, model):
        worded = {
            "worded_ma": evaluation.memorization_accuracy(model, self.batch),
            "worded_loss": evaluation.mean_token_loss(model, self.batch),
            "worded_min_k": evaluation.min_k_scores(model, self.batch).mean().item(),
        }
        return super().measure(model) | worded


class Worded(Compared, synth.Setting):
    """SYNTH with all tokens behind the prompts to forget."""

    # The method was chosen on seeds 5 to 12. Nobody has tuned anything on these.
    seeds, share = (307, 311, 313), 0.05
    methods = (*Compared.methods, "longer")

    def __init__(self, seed):
        super().__init__("gated, 0.9 M", seed)
        self.batch = self.encode(self.forget, "continuation")
        self.secrets = self.encode(self.forget, "secret")
        self.retain = self.encode(self.same + self.other, "continuation")

    @functools.cached_property
    def unseen(self):
        return self.estimate(self.neighbours("retain"))

    def job(self, share):
        return dataclasses.replace(super().job(share), forget=self.batch, unseen=lambda: self.unseen)


class Asked(Compared, real.People):
    """REAL."""

    seeds, share = real.SEEDS, 0.01

    def __init__(self, seed, name=SMOLLM2):
        super().__init__(seed, name)
        self.batch = self.forget


class AskedOfGemma(Asked):
    """REAL with a second family, on one seed."""

    seeds = (313,)

    def __init__(self, seed):
        super().__init__(seed, GEMMA)


def _chances(model, batch):
    """The probability of each token given those before it, [B, T]; 1 of the first."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    found = logits[:, :-1].float().softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return torch.cat([torch.ones(len(found), 1), found], 1)


SETTINGS = {"gated, 0.9 M": Worded, SMOLLM2: Asked, GEMMA: AskedOfGemma}


def cases(quick=False):
    """Yields a case for each model, seed and method, and what the estimate says."""
    for model, kind in [*SETTINGS.items()][: 1 if quick else None]:
        for seed in kind.seeds[: 1 if quick else None]:
            setting = functools.cache(functools.partial(kind, seed))
            yield from _cases({"model": model, "seed": seed}, setting, quick)


def _cases(about, setting, quick):
    yield about | {"method": "before"}, lambda: {"share": 0.0} | setting().measure(setting().full)
    if not quick:
        yield (
            about | {"method": "retrained"},
            lambda: {"share": 0.0} | setting().measure(setting().retrained()),
        )
        yield about | {"method": "estimate"}, lambda: setting().compare()
    for method in Compared.methods if quick else SETTINGS[about["model"]].methods:
        yield about | {"method": method}, lambda method=method: setting().find(method)
