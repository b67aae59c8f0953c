"""The paper's recipe is the official algorithm, written out plainly."""

import math

import pytest
import torch
import torch.nn.functional as F

import neumuter
from neumuter import recipes
from neumuter.training.batches import PairedBatches
from neumuter_kernels import reference as reference_ops
from tests import models
from tests.neumuter.test_recipes import FORGET, KEEP, ragged


class Plain:
    """The authors' algorithm written out from its description: two forward passes of whole batches, whole
    logits, a sample of the mask in each pass for each FFN, torch's own losses and Adam."""

    def __init__(self, model, forget, retain):
        self.model, self.batches = model, (forget, retain)
        self.downs = [layer.mlp.down_proj for layer in model.model.layers]
        start = math.log(11.0)  # where the gate without noise is 1
        self.scores = [
            torch.full((models.WIDTH,), start, requires_grad=i > 0) for i in range(len(self.downs))
        ]

    def masks(self, seed, step, kind):
        for layer, score in enumerate(self.scores):
            noise = reference_ops.gate_noise(torch.tensor([kind]), models.WIDTH, seed, step, layer)
            yield (((noise[0] + score) * 3).sigmoid() * 1.2 - 0.1).clamp(0, 1).double()

    def logits(self, ids, masks=()):
        hooks = [
            down.register_forward_pre_hook(lambda _, args, m=mask: (args[0] * m,))
            for down, mask in zip(self.downs, masks, strict=False)
        ]
        try:
            return self.model(input_ids=ids).logits
        finally:
            for hook in hooks:
                hook.remove()

    def step(self, optimizer, config, seed, number, forget_rows, retain_rows):
        forget, retain = (
            {key: value[list(rows)] for key, value in batch.items()}
            for batch, rows in zip(self.batches, (forget_rows, retain_rows), strict=True)
        )
        logits = self.logits(forget["input_ids"], self.masks(seed, number, 0))
        lm = F.cross_entropy(logits[:, :-1].flatten(0, 1), forget["labels"][:, 1:].flatten())
        q = self.logits(retain["input_ids"], self.masks(seed, number, 1)).softmax(-1)
        with torch.no_grad():
            p = self.logits(retain["input_ids"]).softmax(-1)
        divergence = (p * ((p + 1e-12).log() - (q + 1e-12).log())).sum(-1)
        kl = divergence[retain["attention_mask"].bool()].mean()
        opened = torch.stack([(s - math.log(0.1 / 1.1) / 3).sigmoid().mean() for s in self.scores[1:]])
        weight = -1 if lm <= config.stop_loss else 5
        optimizer.zero_grad()
        (weight * lm + config.sparsity * (1 - opened).mean() + config.kl_weight * kl).backward()
        optimizer.step()
        return lm.item()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_papers_recipe_is_the_official_algorithm(batch_size):
    """With the same noise and the same order, after 50 steps: the same scores, the same neurons."""
    double = models.build_double("llama")
    forget, retain = ragged(FORGET, 8, 3, 6), ragged(KEEP, 5, 8, 2, 7, 4)
    epochs = 50 // math.ceil(3 / batch_size) + 1
    # The authors' values but for these: with λ = 500 all gates of so small a model stay open.
    config = recipes.PaperConfig(epochs, batch_size, sparsity=2.0, stop_loss=5.0, threshold=0.9)
    seen = []
    with neumuter.attach(double) as masked:
        pair = PairedBatches(masked, forget, retain)
        order = [pair.epoch(number, 4) for number in range(epochs)]
        mutes = recipes.train_gates(
            pair, config, 4, lambda step, total, info: seen.append((total, info["forget_loss"]))
        )
        trained = list(masked.full_scores().items())
    assert seen[0][0] == len(seen) >= 50
    plain = Plain(double, forget, retain)
    optimizer = torch.optim.Adam(plain.scores, lr=0.1)
    losses = []
    for pairs in order:
        for start in range(0, 3, batch_size):
            rows, others = zip(*pairs[start : start + batch_size], strict=True)
            numbers = [other - 3 for other in others]
            losses.append(plain.step(optimizer, config, 4, len(losses), rows, numbers))
    assert {loss > 5 for loss in losses} == {True, False}  # both ascent and descent
    assert [loss for _, loss in seen] == pytest.approx(losses, abs=1e-5)
    for (path, score), expected in zip(trained, plain.scores[1:], strict=True):
        torch.testing.assert_close(score, expected.detach(), atol=1e-5, rtol=0)
        chosen = (expected.sigmoid() < 0.9).nonzero().flatten()
        found = mutes.layers[path].indices.tolist() if path in mutes.layers else []
        assert found == chosen.tolist()
    assert 0 < mutes.count < models.WIDTH


def test_refined_the_papers_recipe_has_a_mask_for_each_sample_and_none_before_the_start_layer():
    config = recipes.PaperConfig(2, batch_size=2, lr=1.0, sparsity=0.0, threshold=0.9, refined=True)
    with neumuter.attach(models.build("llama")) as masked:
        pair = PairedBatches(masked, FORGET, KEEP)
        sampled, run = [], masked.sampling

        def sampling(seed, step, sample_ids, *rest, **options):
            sampled.append((sample_ids.tolist(), rest))
            return run(seed, step, sample_ids, *rest, **options)

        masked.sampling = sampling
        mutes = recipes.train_gates(pair, config, seed=4)
        assert masked._open is None
    assert mutes.method["refined"] is True
    pairs = [pair.epoch(number, 4) for number in range(2)]
    assert sampled == [
        ([a for a, _ in part] + [b for _, b in part], ())
        for epoch in pairs
        for part in (epoch[:2], epoch[2:])
    ]
