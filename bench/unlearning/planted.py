"""PLANTED: a text is learned by known neurons alone. Which methods find them?

The demo's model learns the records of a few more customers, but only some neurons, drawn at random, may
change: their rows of the gate and up projections and their columns of the down projection. Every method then
chooses that number of neurons, and the chosen ones are compared with the planted ones.
"""

import copy
import functools

import torch

from bench.unlearning.methods import MASKS
from bench.unlearning.synth import Setting
from neumuter import evaluation
from neumuter.demo import task
from neumuter.models.families import find_ffns
from neumuter.serving.live import mute
from neumuter.training.losses import token_losses

# Nobody has tuned anything on these.
SEEDS = (307, 311, 313)
RECORDS, SHARE = 4, 0.01
MOST_STEPS, LR, WINDOWS = 300, 4e-3, 8
CHECK_EVERY, KEPT = 10, 0.97  # when planting ends: all planted records come out, and this share of the others
METHODS = ("neumuter, modulate", "neumuter, trained support", "fisher", "attribution", "activation", "random")


def cases(quick=False):
    """Yields a case for each seed and method, and those of the models before and after planting."""
    for seed in SEEDS[:1] if quick else SEEDS:
        yield from _cases(seed, ("fisher", "random") if quick else METHODS)


def _cases(seed, methods):
    setting = functools.cache(lambda: Planted(seed))
    yield {"seed": seed, "method": "before"}, lambda: setting().measure(setting().full)
    for method in methods:
        yield {"seed": seed, "method": method}, lambda method=method: setting().find(method)


class Planted(Setting):
    """SYNTH's first model, of which ``planted``, {path: ids}, have learned ``forget``; all else stays."""

    def __init__(self, seed):
        super().__init__("gated, 0.9 M", seed)
        known = {record.prompt for record in self.forget + self.same}
        new = task.make_records(seed + 1000)
        self.same = self.forget + self.same
        self.forget = [r for r in new.forget + new.retain_same if r.prompt not in known][:RECORDS]
        self.planted = self._plant()

    def _plant(self):
        generator = torch.Generator().manual_seed(self.seed)
        self.full = copy.deepcopy(self.full).requires_grad_(False)
        planted, parts = {}, []
        for ffn in find_ffns(self.full):
            ids = torch.randperm(ffn.width, generator=generator)[: round(SHARE * ffn.width)]
            planted[ffn.path] = ids
            weights = (ffn.module.gate_proj.weight, ffn.module.up_proj.weight, ffn.down.weight)
            for weight, shape in zip(weights, [(-1, 1), (-1, 1), (1, -1)], strict=True):
                frozen = torch.ones(ffn.width, dtype=torch.bool)
                frozen[ids] = False
                parts.append((weight.requires_grad_(True), frozen.view(shape)))
        optimizer = torch.optim.Adam([weight for weight, _ in parts], lr=LR)
        others = task.with_text(
            self.encode(self.same + self.other, "record"), self.text[:: len(self.text) // WINDOWS]
        )
        batches = [self.encode(self.forget, "record"), others]
        for step in range(MOST_STEPS):
            optimizer.zero_grad()
            for batch in batches:
                logits = self.full(batch["input_ids"], batch["attention_mask"]).logits
                token_losses(logits, batch["labels"]).mean().backward()
            for weight, frozen in parts:
                weight.grad.masked_fill_(frozen, 0)
            optimizer.step()
            if (
                step % CHECK_EVERY == 0
                and self._rate(self.forget) == 1
                and self._rate(self.same + self.other) >= KEPT
            ):
                break
        self.full.requires_grad_(False)
        return planted

    def _rate(self, records):
        return evaluation.extraction_rate(self.full, self.encode(records, "continuation"))

    def find(self, method):
        """What the neurons that ``method`` chooses have in common with the planted ones, and what they do."""
        mutes = MASKS[method](self.job(SHARE))
        total = sum(len(ids) for ids in self.planted.values())
        both = sum(
            int(torch.isin(layer.indices, self.planted[path]).sum()) for path, layer in mutes.layers.items()
        )
        with mute(self.full, mutes):
            found = self.measure(self.full)
        return {"share": mutes.share, "precision": both / mutes.count, "recall": both / total} | found
