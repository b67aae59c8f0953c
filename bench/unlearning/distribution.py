"""A fit towards all that a model which never saw the texts may say, instead of a hinge on the true tokens.

The target gives each true token the probability that is estimated for such a model, and all others what is
left, in the proportions that they have in the untouched model. A token that may stay keeps its distribution.
"""

import torch
import torch.nn.functional as F

from bench.unlearning.fitting import Fit
from neumuter.evaluation.unseen import LEAST
from neumuter.training.losses import predicting


class Distribution(Fit):
    """Gains that minimise KL(target ‖ masked) of the tokens to forget, and KL of those to keep."""

    def __init__(self, pair, config, seed, job):
        super().__init__(pair, config, seed)
        self.model, self.batch = job.model, job.forget
        with torch.no_grad():
            chances = self.predict(range(len(job.forget["labels"]))).softmax(-1)
        counted = predicting(job.forget["labels"])
        true = job.forget["input_ids"][:, 1:][counted[:, :-1]][:, None]
        unseen = job.unseen()[:, 1:][counted[:, :-1]][:, None]
        unseen = torch.where(unseen.isnan(), chances.gather(1, true), unseen.clamp(min=LEAST))
        rest = chances.scatter(1, true, 0.0)
        rest *= (1 - unseen) / rest.sum(1, keepdim=True).clamp(min=1e-12)
        rows = counted.nonzero()[:, 0]
        self.targets, self.rows = rest.scatter(1, true, unseen), rows

    def predict(self, rows):
        """The logits of the counted tokens of texts to forget, [N, vocabulary]."""
        part = {key: value[list(rows)] for key, value in self.batch.items()}
        logits = self.model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
        return logits[predicting(part["labels"])].float()

    def hinge(self, losses, _):
        return torch.zeros(())

    def attack(self, gains, ids):
        # Where the samples go round again, a step may have one of them twice.
        rows = [i for i in ids if i < self.pair.forget_count]
        with self.applying(gains):
            said = self.predict(rows).log_softmax(-1)
        targets = torch.cat([self.targets[self.rows == row] for row in rows])
        F.kl_div(said, targets, reduction="none").sum(1).mean().backward()
