"""Forget and retain samples side by side: one masked forward pass gives both losses."""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neumuter.models.families import input_device
from neumuter.models.head import Head
from neumuter.models.modes import without_dropout
from neumuter.training.losses import predicting
from neumuter.training.masked import Masked
from neumuter.types import IGNORED, KEYS, Batch, check_batch, check_kind

# Without gradients.
SAMPLES_PER_PASS = 8
# Retain samples of which no more than this number have their reference kept.
KEPT_REFERENCES = 512
# Tokens that the head is checked on.
PROBE_TOKENS = 8


class PairedBatches:
    """A forget batch, a retain batch, and the reference distribution of the retain batch.

    The reference is the same model with masks off: its last hidden states at the retain tokens, [N, d] in the
    model's dtype. The base is frozen, so those of up to ``KEPT_REFERENCES`` samples are computed when the
    first step needs them, and kept; of more samples, each step computes those that it needs. Sample ids are
    positions in the forget batch followed by the retain batch, however the samples are split into steps. The
    neurons of experts that no forget token reaches are excluded from selection.

    Args:
        masked: the handle of the model; every recipe takes it from here.
        forget_batch, retain_batch: the texts to forget and those to keep.

    Raises:
        ValueError: a batch, which the message names, is empty or malformed; or the model's logits are not a
            function of its last hidden states.
    """

    def __init__(self, masked: Masked, forget_batch: Batch, retain_batch: Batch) -> None:
        check_kind("masked", masked, Masked, "the handle that neumuter.attach(model) returns")
        _check("forget_batch", forget_batch)
        _check("retain_batch", retain_batch)
        self.masked, self.forget_batch = masked, forget_batch
        device = input_device(masked.model)
        self.forget_count, self.retain_count = len(forget_batch["labels"]), len(retain_batch["labels"])
        self.device, self._samples = device, dict[int, _Sample]()
        self._batches = (forget_batch, retain_batch)
        # By whether they are those of all tokens.
        self._references: dict[bool, Sequence[Tensor]] = {}
        with torch.no_grad(), without_dropout(masked.model), masked.off():
            self.head = Head(masked.model, self._sample(0).ids[None, :PROBE_TOKENS])
            pieces = (forget_batch[key].split(SAMPLES_PER_PASS) for key in KEYS)
            masked.keep_unreached_open(
                dict(zip(KEYS, piece, strict=True)) for piece in zip(*pieces, strict=True)
            )

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

    def epoch(self, number: int, seed: int) -> list[tuple[int, int]]:
        """Draw pairs of sample ids (forget, retain) of an epoch, which is one pass over the forget samples.

        Retain samples come in turn, too: each comes once before any comes again, through all epochs.
        """
        kinds = ((0, self.forget_count), (self.forget_count, self.retain_count))
        queues = [_in_turn(first, count, number * self.forget_count, seed) for first, count in kinds]
        return list(itertools.islice(zip(*queues, strict=True), self.forget_count))

    def losses(
        self, sample_ids: Sequence[int], through: nn.Module | None = None, everywhere: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Run the samples once, under the masks that are in force.

        Args:
            sample_ids: forget samples first, at least one of each kind.
            through: see ``Head.hidden``.
            everywhere: take KL at every token of the retain samples, the last one and those of prompts
                included, instead of where a counted token is predicted.

        Returns:
            The token losses of the forget samples, float32 [N] in nats; and KL(reference ‖ masked) per
            retain token, a float32 scalar in nats.
        """
        losses, divergences = self.token_losses(sample_ids, through, everywhere)
        return losses, divergences.mean()

    def token_losses(
        self, sample_ids: Sequence[int], through: nn.Module | None = None, everywhere: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Do as ``losses``, but return the KL of each retain token, float32 [M]."""
        split = sum(i < self.forget_count for i in sample_ids)
        reference = self._reference(sample_ids[split:], through, everywhere)
        targets = torch.cat([self._sample(i).targets for i in sample_ids[:split]])
        forget, retain = self._hidden(sample_ids, through, everywhere).split([len(targets), len(reference)])
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

    def count_tokens(self, sample_ids: Sequence[int], everywhere: bool = False) -> tuple[int, int]:
        """Count the losses and the divergences that ``token_losses`` gives for these samples."""
        counts = [0, 0]
        for i in sample_ids:
            counts[i >= self.forget_count] += len(self._places(i, everywhere))
        return counts[0], counts[1]

    def _sample(self, sample_id: int) -> "_Sample":
        """The sample, taken out of its batch when it is first needed."""
        if sample_id not in self._samples:
            retained = sample_id >= self.forget_count
            row = sample_id - retained * self.forget_count
            ids, mask, labels = (self._batches[retained][key][row] for key in KEYS)
            self._samples[sample_id] = _Sample(ids, mask, labels, self.device)
        return self._samples[sample_id]

    def _reference(self, sample_ids: Sequence[int], through: nn.Module | None, everywhere: bool) -> Tensor:
        """The last hidden states of the untouched model of retain samples, [M, d]."""
        retain, size = range(self.forget_count, self.forget_count + self.retain_count), SAMPLES_PER_PASS
        with torch.no_grad(), without_dropout(self.masked.model), self.masked.off():
            if len(retain) > KEPT_REFERENCES:
                return self._hidden(sample_ids, through, everywhere)
            # Of all samples at once: all processes have to run the same forward passes.
            if everywhere not in self._references:
                groups = [retain[i : i + size] for i in range(0, len(retain), size)]
                hidden = torch.cat([self._hidden(ids, through, everywhere) for ids in groups])
                lengths = [len(self._places(i, everywhere)) for i in retain]
                self._references[everywhere] = hidden.split(lengths)
        return torch.cat([self._references[everywhere][i - self.forget_count] for i in sample_ids])

    def _hidden(
        self, sample_ids: Sequence[int], through: nn.Module | None = None, everywhere: bool = False
    ) -> Tensor:
        """The last hidden states of the samples at their ``_places``, [N, d]."""
        samples = [self._sample(i).ids for i in sample_ids]
        width = max(map(len, samples))
        ids = torch.stack([F.pad(sample, (0, width - len(sample))) for sample in samples])
        where = torch.cat([self._places(i, everywhere) + row * width for row, i in enumerate(sample_ids)])
        return self.head.hidden(ids, through).flatten(0, 1).index_select(0, where)

    def _places(self, sample_id: int, everywhere: bool) -> Tensor:
        """Where a sample's counted tokens are predicted; everywhere, all positions of a retain sample."""
        sample = self._sample(sample_id)
        if everywhere and sample_id >= self.forget_count:
            return torch.arange(len(sample.ids), device=sample.ids.device)
        return sample.positions


class _Sample:
    """One row of a batch: ids [T] without padding, counted tokens [N], and where these are predicted [N]."""

    def __init__(self, ids: Tensor, attention_mask: Tensor, labels: Tensor, device: torch.device) -> None:
        positions = predicting(labels[None])[0].nonzero().flatten()
        parts = (ids[: int(attention_mask.sum())], positions, labels[positions + 1])
        # Without waiting for the device.
        self.ids, self.positions, self.targets = (part.to(device, non_blocking=True) for part in parts)


def _check(name: str, batch: Batch) -> None:
    if not isinstance(batch, Mapping):
        check_batch(name, batch)
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


def _in_turn(first: int, count: int, start: int, seed: int) -> Iterator[int]:
    """Yield first … first + count − 1 without end, in a new order each time round, from ``start`` on."""
    for turn in itertools.count(start // count):
        order = list(range(first, first + count))
        random.Random(f"{seed} {first} {turn}").shuffle(order)
        yield from order[start % count :]
        start = 0


def check_pair(pair: object) -> None:
    """Raise TypeError unless ``pair`` is what recipes take."""
    check_kind("pair", pair, PairedBatches, "PairedBatches(masked, forget_batch, retain_batch)")


def shuffled(start: int, count: int, generator: torch.Generator) -> Iterator[int]:
    """Yield start … start + count − 1 without end, in a new random order each time round."""
    while True:
        yield from (start + torch.randperm(count, generator=generator)).tolist()
