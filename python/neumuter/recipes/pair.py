"""Forget and neighbour samples side by side: one masked forward pass gives both losses."""

import contextlib

import torch
import torch.nn.functional as F

from neumuter.losses import IGNORED, kl_divergence, predicting, token_losses

PADDING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
REFERENCE_ROWS = 8  # samples per forward pass of the reference
REFERENCE_BYTES = 1 << 30


class Pair:
    """A forget batch, a neighbour batch, and the reference distribution of the latter.

    Both batches are dicts of int64 tensors ``input_ids``, ``attention_mask`` and ``labels`` [B, T],
    padded on the right; a label is -100 where a token does not count (padding, a prompt). The
    reference is the logits of the same model with masks off on the counted neighbour tokens, [N, V]
    in the model's dtype. The base is frozen, so it is computed once and kept, unless that takes more
    than REFERENCE_BYTES; then it is computed again in every step. Sample ids are positions in the
    forget batch followed by the neighbour batch, however the samples are split into steps.

    Raises ValueError, naming the batch, if one is empty or malformed.
    """

    def __init__(self, masked, forget_batch, neighbour_batch):
        _check("forget_batch", forget_batch)
        _check("neighbour_batch", neighbour_batch)
        self.model = masked.model
        device = next(self.model.parameters()).device
        self.forget_count, self.neighbour_count = len(forget_batch["labels"]), len(neighbour_batch["labels"])
        width = max(forget_batch["labels"].shape[1], neighbour_batch["labels"].shape[1])
        self.samples = {
            key: torch.cat(
                [
                    F.pad(batch[key], (0, width - batch[key].shape[1]), value=value)
                    for batch in (forget_batch, neighbour_batch)
                ]
            ).to(device)
            for key, value in PADDING.items()
        }
        self.lengths = self.samples["attention_mask"].sum(1).tolist()
        self.masked = masked
        neighbours = list(range(self.forget_count, self.forget_count + self.neighbour_count))
        first = self._reference(neighbours[:1])
        counts = predicting(self.samples["labels"][self.forget_count :]).sum(1).tolist()
        self.kept = None
        if sum(counts) * first.shape[1] * first.element_size() <= REFERENCE_BYTES:
            groups = [neighbours[i : i + REFERENCE_ROWS] for i in range(0, len(neighbours), REFERENCE_ROWS)]
            self.kept = torch.cat([self._reference(ids) for ids in groups]).split(counts)

    def steps(self, batch_size, seed):
        """Endless lists of sample ids, forget samples first: ``batch_size`` of each kind, or all if None.

        Either kind goes round in a new random order each time; the same seed gives the same lists.
        """
        if batch_size is None:
            while True:
                yield list(range(self.forget_count + self.neighbour_count))
        generator = torch.Generator().manual_seed(seed)
        kinds = ((0, self.forget_count), (self.forget_count, self.neighbour_count))
        queues = [_shuffled(start, count, generator) for start, count in kinds]
        while True:
            yield [
                next(queue)
                for queue, (_, count) in zip(queues, kinds, strict=True)
                for _ in range(min(batch_size, count))
            ]

    def losses(self, sample_ids):
        """One forward pass of the samples under the masks that are in force.

        Returns the token losses of the forget samples, float32 [N] in nats, and KL(reference ‖ masked)
        per counted neighbour token, a float32 scalar in nats.
        """
        logits, labels = self._predictions(sample_ids)
        split = sum(i < self.forget_count for i in sample_ids)
        where = predicting(labels[split:])
        if self.kept is None:
            reference = self._reference(sample_ids[split:])
        else:
            reference = torch.cat([self.kept[i - self.forget_count] for i in sample_ids[split:]])
        return token_losses(logits[:split], labels[:split]), kl_divergence(reference, logits[split:][where])

    @torch.no_grad()
    def _reference(self, sample_ids):
        """The untouched model's logits of the samples' counted tokens, [N, V]."""
        with without_dropout(self.model), self.masked.off():
            logits, labels = self._predictions(sample_ids)
        return logits[predicting(labels)]

    def _predictions(self, sample_ids):
        """Logits and labels of the samples, cut to the longest of them."""
        width = max(self.lengths[i] for i in sample_ids)
        batch = {key: value[sample_ids, :width] for key, value in self.samples.items()}
        output = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        )
        return output.logits, batch["labels"]


@contextlib.contextmanager
def without_dropout(model):
    """The model in evaluation mode, and back: the only noise in training is that of the gates."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check(name, batch):
    shape = batch["labels"].shape if isinstance(batch.get("labels"), torch.Tensor) else None
    for key in PADDING:
        value = batch.get(key)
        if not isinstance(value, torch.Tensor) or value.dim() != 2 or value.shape != shape:
            given = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(
                f"{name}[{key!r}] must be an int64 tensor [B, T], one shape for all of {', '.join(PADDING)}; "
                f"got {given}"
            )
    if not predicting(batch["labels"]).any(1).all() or not len(batch["labels"]):
        raise ValueError(
            f"every sample of {name} must count a token (a label other than -100) after its first one"
        )
    if (batch["attention_mask"].diff(dim=1) > 0).any():
        raise ValueError(f"{name} must be padded on the right, so attention_mask must never rise in a row")
    if ((batch["labels"] != IGNORED) & (batch["attention_mask"] == 0)).any():
        raise ValueError(f"{name} counts padding: labels must be -100 where attention_mask is 0")


def _shuffled(start, count, generator):
    while True:
        yield from (start + torch.randperm(count, generator=generator)).tolist()
