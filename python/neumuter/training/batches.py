"""Forget and retain samples side by side: one masked forward pass gives both losses."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neumuter.models.families import input_device
from neumuter.models.head import Head
from neumuter.models.modes import without_dropout
from neumuter.training.losses import predicting
from neumuter.training.masked import Masked
from neumuter.types import IGNORED, Batch

KEYS = ("input_ids", "attention_mask", "labels")
REFERENCE_SAMPLES_PER_PASS = 8
# Retain samples of which no more than this number have their reference kept.
KEPT_REFERENCES = 512
# Tokens that the head is checked on.
PROBE_TOKENS = 8


class PairedBatches:
    """A forget batch, a retain batch, and the reference distribution of the retain batch.

    The reference is the same model with masks off: its last hidden states at the counted retain tokens,
    [N, d] in the model's dtype. The base is frozen, so those of up to ``KEPT_REFERENCES`` samples are
    computed once and kept; of more samples, each step computes those that it needs. Sample ids are positions
    in the forget batch followed by the retain batch, however the samples are split into steps. The neurons of
    experts that no forget token reaches are excluded from selection.

    Args:
        masked: the handle of the model; every recipe takes it from here.
        forget_batch, retain_batch: the texts to forget and those to keep.

    Raises:
        ValueError: a batch, which the message names, is empty or malformed; or the model's logits are not a
            function of its last hidden states.
    """

    def __init__(self, masked: Masked, forget_batch: Batch, retain_batch: Batch) -> None:
        _check("forget_batch", forget_batch)
        _check("retain_batch", retain_batch)
        self.masked, self.forget_batch = masked, forget_batch
        device = input_device(masked.model)
        self.forget_count, self.retain_count = len(forget_batch["labels"]), len(retain_batch["labels"])
        self.device, self._samples = device, dict[int, _Sample]()
        self._batches = (forget_batch, retain_batch)
        retain = range(self.forget_count, self.forget_count + self.retain_count)
        with torch.no_grad(), without_dropout(masked.model), masked.off():
            self.head = Head(masked.model, self._sample(0).ids[None, :PROBE_TOKENS])
            size = REFERENCE_SAMPLES_PER_PASS
            kept = retain if self.retain_count <= KEPT_REFERENCES else retain[:0]
            self._references = [self._hidden(kept[i : i + size]) for i in range(0, len(kept), size)]
            pieces = (forget_batch[key].split(size) for key in KEYS)
            masked.keep_unreached_open(
                dict(zip(KEYS, piece, strict=True)) for piece in zip(*pieces, strict=True)
            )
        if kept:
            sizes = [len(self._sample(i).targets) for i in kept]
            self._references = list(torch.cat(self._references).split(sizes))

    def steps(self, batch_size: int | None, seed: int) -> Iterator[list[int]]:
        """Yield lists of sample ids without end, forget samples first.

        Each kind goes round in a new random order each time; the same seed gives the same lists.

        Args:
            batch_size: samples of each kind; None takes all.
        """
        if batch_size is None:
            while True:
                yield list(range(self.forget_count + self.retain_count))
        generator = torch.Generator().manual_seed(seed)
        kinds = ((0, self.forget_count), (self.forget_count, self.retain_count))
        queues = [shuffled(start, count, generator) for start, count in kinds]
        while True:
            yield [
                next(queue)
                for queue, (_, count) in zip(queues, kinds, strict=True)
                for _ in range(min(batch_size, count))
            ]

    def losses(self, sample_ids: Sequence[int], through: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Run the samples once, under the masks that are in force.

        Args:
            sample_ids: forget samples first, at least one of each kind.
            through: see ``Head.hidden``.

        Returns:
            The token losses of the forget samples, float32 [N] in nats; and KL(reference ‖ masked) per
            counted retain token, a float32 scalar in nats.
        """
        losses, divergences = self.token_losses(sample_ids, through)
        return losses, divergences.mean()

    def token_losses(
        self, sample_ids: Sequence[int], through: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """Do as ``losses``, but return the KL of each counted retain token, float32 [M]."""
        split = sum(i < self.forget_count for i in sample_ids)
        targets = torch.cat([self._sample(i).targets for i in sample_ids[:split]])
        reference = self._reference(sample_ids[split:], through)
        forget, retain = self._hidden(sample_ids, through).split([len(targets), len(reference)])
        return (
            self.head.token_losses(forget, targets),
            self.head.kl_divergences(retain, reference),
        )

    def sample_losses(self, sample_ids: Sequence[int]) -> Sequence[Tensor]:
        """Compute the losses in nats of each sample's counted tokens, forget or retain: float32 [N] each."""
        targets = [self._sample(i).targets for i in sample_ids]
        losses = self.head.token_losses(self._hidden(sample_ids), torch.cat(targets))
        by_sample: tuple[Tensor, ...] = losses.split([len(t) for t in targets])
        return by_sample

    def _sample(self, sample_id: int) -> "_Sample":
        """The sample, taken out of its batch when it is first needed."""
        if sample_id not in self._samples:
            retained = sample_id >= self.forget_count
            row = sample_id - retained * self.forget_count
            ids, mask, labels = (self._batches[retained][key][row] for key in KEYS)
            self._samples[sample_id] = _Sample(ids, mask, labels, self.device)
        return self._samples[sample_id]

    def _reference(self, sample_ids: Sequence[int], through: nn.Module | None) -> Tensor:
        """The last hidden states of the untouched model at the counted tokens of retain samples, [N, d]."""
        if self._references:
            return torch.cat([self._references[i - self.forget_count] for i in sample_ids])
        with torch.no_grad(), without_dropout(self.masked.model), self.masked.off():
            return self._hidden(sample_ids, through)

    def _hidden(self, sample_ids: Sequence[int], through: nn.Module | None = None) -> Tensor:
        """The last hidden states where the samples' counted tokens are predicted, [N, d]."""
        samples = [self._sample(i) for i in sample_ids]
        width = max(len(sample.ids) for sample in samples)
        ids = torch.stack([F.pad(sample.ids, (0, width - len(sample.ids))) for sample in samples])
        where = torch.cat([sample.positions + row * width for row, sample in enumerate(samples)])
        return self.head.hidden(ids, through).flatten(0, 1).index_select(0, where)


class _Sample:
    """One row of a batch: ids [T] without padding, counted tokens [N], and where these are predicted [N]."""

    def __init__(self, ids: Tensor, attention_mask: Tensor, labels: Tensor, device: torch.device) -> None:
        positions = predicting(labels[None])[0].nonzero().flatten()
        parts = (ids[: int(attention_mask.sum())], positions, labels[positions + 1])
        # Without waiting for the device.
        self.ids, self.positions, self.targets = (part.to(device, non_blocking=True) for part in parts)


def _check(name: str, batch: Batch) -> None:
    shape = batch["labels"].shape if isinstance(batch.get("labels"), torch.Tensor) else None
    for key in KEYS:
        value = batch.get(key)
        if not isinstance(value, torch.Tensor) or value.dim() != 2 or value.shape != shape:
            given = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(
                f"{name}[{key!r}] must be an int64 tensor [B, T], one shape for all of {', '.join(KEYS)}; "
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


def shuffled(start: int, count: int, generator: torch.Generator) -> Iterator[int]:
    """Yield start … start + count − 1 without end, in a new random order each time round."""
    while True:
        yield from (start + torch.randperm(count, generator=generator)).tolist()
