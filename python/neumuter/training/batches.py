"""Forget and retain samples side by side: one masked forward pass gives both losses."""

import hashlib
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neumuter.models.devices import move
from neumuter.models.families import input_device
from neumuter.models.head import Head
from neumuter.models.modes import without_dropout
from neumuter.models.pieces import Pieces
from neumuter.texts.store import Windows
from neumuter.training.losses import find_runs, predicting
from neumuter.training.masked import Masked
from neumuter.training.processes import check_same, find_processes
from neumuter.training.references import References
from neumuter.training.sources import HardFirst, InTurn
from neumuter.types import KEYS, Batch, check_kind, check_rows

# That are computed apart from each other, or without gradients.
SAMPLES_PER_PASS = 8
# Padded inputs are a multiple of this number of tokens wide, and have at least this number of counted tokens.
BUCKET = 64
# Tokens that the head is checked on.
PROBE_TOKENS = 8


class Inputs(NamedTuple):
    """What a forward pass over samples needs, as tensors whose sizes say nothing of the samples if padded.

    ids: int64 [B, W], forget samples first. samples: their sample ids, int64 [B]. places: where the counted
    tokens are predicted, row·W + position, int64 [N + M], forget tokens first. targets: the forget tokens,
    int64 [N]. references: what ``References.lay_out`` gives for the retain tokens, [M] or [M, d]. weights:
    float32 [N + M], 0 for padding and 1 for tokens that are there. ceilings: of the forget tokens, float32
    [N]; see ``PairedBatches``. split: the number of forget samples.
    """

    ids: torch.Tensor
    samples: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    references: torch.Tensor
    weights: torch.Tensor
    ceilings: torch.Tensor
    split: int

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(part for part in self if isinstance(part, torch.Tensor))

    def to(self, device: torch.device) -> "Inputs":
        """The same on ``device``, without waiting for it."""
        ids, samples, places, targets, references, weights, ceilings = (
            move(part, device) for part in self.tensors
        )
        return Inputs(ids, samples, places, targets, references, weights, ceilings, self.split)


class PairedBatches:
    """A forget batch, a retain batch, and the reference distribution of the retain batch.

    The reference is the same model with masks off: its last hidden states at the retain tokens, [N, d] in the
    model's dtype. The base is frozen, so they are computed when the first step needs them, and kept: 1 GiB on
    the model's device, or 4 GiB in the host's memory. Where there are more, each step computes those that it
    needs. Sample ids are positions in the forget batch followed by the retain batch, however the samples are
    split into steps. The neurons of experts that no forget token reaches are excluded from selection.

    In a process group all processes must be given the same texts. Recipes then divide the samples of each
    step among them (``processes``); what is called here directly is not divided.

    Args:
        masked: the handle of the model; every recipe takes it from here.
        forget_batch, retain_batch: the texts to forget and those to keep, or ``Windows`` of more than fit
            into memory. None: no text is to be forgotten.
        ceilings: the log-odds that each token of the forget batch may keep, float32 [B, T] like its labels;
            None: −∞, so that each is forgotten as far as a recipe goes.

    Raises:
        ValueError: a batch, which the message names, is empty or malformed; or the model's logits are not a
            function of its last hidden states.
    """

    def __init__(
        self,
        masked: Masked,
        forget_batch: Batch | Windows | None,
        retain_batch: Batch | Windows,
        ceilings: Tensor | None = None,
    ) -> None:
        check_kind("masked", masked, Masked, "the handle that neumuter.attach(model) returns")
        _check("retain_batch", retain_batch)
        if forget_batch is None:
            forget_batch = {key: torch.zeros(0, 1, dtype=torch.int64) for key in KEYS}
        else:
            _check("forget_batch", forget_batch)
        self.masked, self._ceilings = masked, _check_ceilings(forget_batch, ceilings)
        device = input_device(masked.model)
        self._batches = [
            batch if isinstance(batch, Windows) else {key: batch[key].cpu() for key in KEYS}
            for batch in (forget_batch, retain_batch)
        ]
        self.forget_count, self.retain_count = (
            len(batch) if isinstance(batch, Windows) else len(batch["labels"]) for batch in self._batches
        )
        self.device, self._samples = device, dict[int, _Sample]()
        self.processes = find_processes(masked.model)
        # Of single samples, and of those of a step.
        self.pieces = Pieces(masked.model, SAMPLES_PER_PASS, masked.recomputation)
        every = self.forget_count + self.retain_count
        self.at_once = Pieces(masked.model, every, masked.recomputation)
        # By whether they are those of all tokens.
        self._references: dict[bool, References] = {}
        with torch.no_grad(), without_dropout(masked.model), masked.off():
            self.head = Head(masked.model, self._sample(0).ids[None, :PROBE_TOKENS].to(device))
            if self.forget_count:
                # One after the other: a tensor for each part takes more memory than its windows.
                parts = (
                    torch.arange(start, min(start + SAMPLES_PER_PASS, self.forget_count))
                    for start in range(0, self.forget_count, SAMPLES_PER_PASS)
                )
                masked.keep_unreached_open(self.forget_rows(part) for part in parts)
        if getattr(self.head.model.config, "quantization_config", None):
            self._refuse_without_gradient()

    def forget_rows(self, numbers: Tensor) -> Batch:
        """The forget samples ``numbers``, int64 [B], as a batch."""
        batch = self._batches[0]
        if isinstance(batch, Windows):
            return batch.rows(numbers.tolist())
        return {key: batch[key][numbers] for key in KEYS}

    def steps(self, batch_size: int | None, seed: int) -> InTurn:
        """Make lists of sample ids without end: see ``InTurn``."""
        return InTurn(self.forget_count, self.retain_count, batch_size, seed)

    def hard_first(self, batch_size: int | None, seed: int) -> HardFirst:
        """Make such lists that prefer forget samples which are still known: see ``HardFirst``."""
        return HardFirst(self.forget_count, self.retain_count, batch_size, seed)

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
            sample_ids: forget samples first, at least one to keep.
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
        inputs = self.take(sample_ids, everywhere, through).to(self.device)
        return self.evaluate(inputs, everywhere, through)

    def take(
        self,
        sample_ids: Sequence[int],
        everywhere: bool = False,
        through: nn.Module | None = None,
        padded: bool = False,
        counted: Sequence[int] | None = None,
    ) -> Inputs:
        """Gather the ``Inputs`` of samples, forget samples first, on the CPU.

        Args:
            everywhere, through: see ``losses``.
            padded: round their sizes up, so that many steps have the same ones: the width to a multiple of
                ``BUCKET``, up to the positions that the model has, and the numbers of tokens to powers of 2.
            counted: those of the samples, the first of each kind, whose tokens have a weight of 1; None: all.
        """
        split, fill = sum(i < self.forget_count for i in sample_ids), _pad if padded else _join
        kept = self._kept(everywhere, through)
        ids, places = self._lay_out(sample_ids, everywhere, padded)
        rows = [kept.rows(i - self.forget_count) for i in sample_ids[split:]]
        kinds = [fill(places[:split]), fill(places[split:])]
        counts = self.count_tokens(sample_ids if counted is None else counted, everywhere)
        weights = [
            (torch.arange(len(kind)) < count).float() for kind, count in zip(kinds, counts, strict=True)
        ]
        return Inputs(
            ids=ids,
            samples=torch.tensor(sample_ids),
            places=torch.cat(kinds),
            targets=fill([self._sample(i).targets for i in sample_ids[:split]]),
            references=kept.lay_out(fill(rows)),
            weights=torch.cat(weights),
            ceilings=fill([self.ceilings_of(i) for i in sample_ids[:split]], torch.float32),
            split=split,
        )

    def evaluate(
        self, inputs: Inputs, everywhere: bool = False, through: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run ``inputs``, which are on ``device``, under the masks that are in force; waits for nothing.

        Returns:
            The losses of the forget tokens, float32 [N], and the KL of the retain tokens, float32 [M], in
            nats; meaningless where the weight of a token is 0.
        """
        counts = [len(inputs.targets), len(inputs.references)]
        hidden = self._hidden(inputs.ids, inputs.places, through)
        forget, retain = hidden.split(counts)
        reference = self._references[everywhere].read(inputs.references)
        if reference is None and counts[1]:
            first = inputs.split * inputs.ids.shape[1]
            ids, places = inputs.ids[inputs.split :], inputs.places[counts[0] :] - first
            # Padding is at place 0 of all rows.
            reference = self._reference(ids, places.clamp(min=0), through)
        divergences = self.head.kl_divergences(retain, retain if reference is None else reference)
        return self.head.token_losses(forget, inputs.targets), divergences

    def ceilings_of(self, sample_id: int) -> Tensor:
        """The ceilings of a forget sample's counted tokens, float32 [N] on the CPU."""
        places = self._sample(sample_id).positions + 1
        if self._ceilings is None:
            return torch.full([len(places)], -torch.inf)
        return self._ceilings[sample_id, places]

    def runs_of(self, sample_id: int) -> Tensor:
        """What ``losses.find_runs`` gives for a forget sample's counted tokens, int64 [N] on the CPU."""
        return find_runs(self._sample(sample_id).positions, self.ceilings_of(sample_id))

    def sample_losses(self, sample_ids: Sequence[int]) -> Sequence[Tensor]:
        """Compute the losses in nats of each sample's counted tokens, forget or retain: float32 [N] each."""
        ids, places = self._lay_out(sample_ids)
        targets = torch.cat([self._sample(i).targets for i in sample_ids])
        losses = self.head.token_losses(self._hidden(ids, torch.cat(places)), move(targets, self.device))
        by_sample: tuple[Tensor, ...] = losses.split([len(place) for place in places])
        return by_sample

    def count_tokens(self, sample_ids: Sequence[int], everywhere: bool = False) -> tuple[int, int]:
        """Count the losses and the divergences that ``token_losses`` gives for these samples."""
        counts = [0, 0]
        for i in sample_ids:
            counts[i >= self.forget_count] += self._count_places(i, everywhere)
        return counts[0], counts[1]

    def describe(self) -> dict[str, str]:
        """Describe what processes that share this must have in common: {what: a digest}."""
        closed = torch.cat([score.detach().isinf().cpu() for score in self.masked.scores.values()])
        return {
            "forget_batch": _digest(self._batches[0]),
            "retain_batch": _digest(self._batches[1]),
            "ceilings": _digest({} if self._ceilings is None else {"ceilings": self._ceilings}),
            "which neurons may be selected": _digest({"closed": closed}),
        }

    def _sample(self, sample_id: int) -> "_Sample":
        """The sample, taken out of its batch when it is first needed, and out of a file each time."""
        batch, row = self._find(sample_id)
        if isinstance(batch, Windows):
            ids, first = batch[row]
            return _Sample(ids, torch.arange(max(1, first), len(ids)) - 1, ids[max(1, first) :])
        if sample_id not in self._samples:
            ids, mask, labels = (batch[key][row] for key in KEYS)
            positions = predicting(labels[None])[0].nonzero().flatten()
            self._samples[sample_id] = _Sample(ids[: int(mask.sum())], positions, labels[positions + 1])
        return self._samples[sample_id]

    def _refuse_without_gradient(self) -> None:
        """Raise ValueError if what multiplies by quantised weights has no backward pass."""
        masks = {path: torch.ones_like(score).requires_grad_() for path, score in self.masked.scores.items()}
        with torch.enable_grad(), self.masked.applying(masks):
            hidden = self.head.hidden(self._sample(0).ids[None, :PROBE_TOKENS].to(self.device))
        if not hidden.requires_grad:
            raise ValueError(
                "the quantised weights pass no gradient back, so no neuron can be found: their library has "
                "no backward pass here (torchao where it rounds activations, bitsandbytes at 4 bits on a CPU "
                "with AVX-512). Quantise otherwise, or find the neurons on the model that it was made from"
            )

    def _find(self, sample_id: int) -> tuple[Batch | Windows, int]:
        """Where a sample is, and its number there."""
        retained = sample_id >= self.forget_count
        return self._batches[retained], sample_id - retained * self.forget_count

    def _kept(self, everywhere: bool, through: nn.Module | None) -> References:
        """The references of all retain samples, computed when they are first asked for."""
        if everywhere not in self._references:
            retain = range(self.forget_count, self.forget_count + self.retain_count)
            lengths = (self._count_places(i, everywhere) for i in retain)

            # Of all samples at once: all processes have to run the same forward passes.
            def compute(samples: Sequence[int]) -> Tensor:
                ids, places = self._lay_out(samples, everywhere)
                return self._reference(ids, torch.cat(places), through)

            states = self.pieces.run(compute, retain)
            self._references[everywhere] = References(lengths, self.head.state_bytes, states)
        return self._references[everywhere]

    def _reference(self, ids: Tensor, places: Tensor, through: nn.Module | None) -> Tensor:
        """``_hidden`` of the model with masks off."""
        with torch.no_grad(), without_dropout(self.masked.model), self.masked.off():
            return self._hidden(ids, places, through)

    def _hidden(self, ids: Tensor, places: Tensor, through: nn.Module | None = None) -> Tensor:
        """The last hidden states of ``ids``, int64 [B, W], at ``places`` = row·W + position: [N, d]."""
        hidden = self.head.hidden(move(ids, self.device), through)
        return hidden.flatten(0, 1).index_select(0, move(places, self.device))

    def _lay_out(
        self, sample_ids: Sequence[int], everywhere: bool = False, padded: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """The ids of samples, int64 [B, W], and their ``_places`` plus row·W; see ``take``."""
        samples = [self._sample(i).ids for i in sample_ids]
        width = max(map(len, samples))
        if padded:
            # Of some models the positions are a table, which ends there.
            last = getattr(self.masked.model.config, "max_position_embeddings", None) or width + BUCKET
            width = max(width, min(-(-width // BUCKET) * BUCKET, last))
        ids = torch.stack([F.pad(sample, (0, width - len(sample))) for sample in samples])
        return ids, [self._places(i, everywhere) + row * width for row, i in enumerate(sample_ids)]

    def _count_places(self, sample_id: int, everywhere: bool) -> int:
        """Count the ``_places`` of a sample."""
        batch, row = self._find(sample_id)
        if isinstance(batch, Windows):
            retained = sample_id >= self.forget_count
            return batch.size(row) if everywhere and retained else batch.count(row)
        return len(self._places(sample_id, everywhere))

    def _places(self, sample_id: int, everywhere: bool) -> Tensor:
        """Where a sample's counted tokens are predicted; everywhere, all positions of a retain sample."""
        sample = self._sample(sample_id)
        if everywhere and sample_id >= self.forget_count:
            return torch.arange(len(sample.ids), device=sample.ids.device)
        return sample.positions


class _Sample(NamedTuple):
    """One row of a batch: ids [T] without padding, where counted tokens are predicted [N], and these [N]."""

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor


def _join(parts: Sequence[Tensor], dtype: torch.dtype = torch.int64) -> Tensor:
    """The parts one after the other; there may be none."""
    return torch.cat([torch.zeros(0, dtype=dtype), *parts])


def _pad(parts: Sequence[Tensor], dtype: torch.dtype = torch.int64) -> Tensor:
    """The parts one after the other, filled with zeros up to a power of 2."""
    length = sum(map(len, parts))
    size = max(BUCKET, 1 << (length - 1).bit_length())
    return _join([*parts, torch.zeros(size - length, dtype=dtype)], dtype)


def _digest(batch: Mapping[str, Tensor] | Windows) -> str:
    if isinstance(batch, Windows):
        return batch.digest()
    found = hashlib.sha256()
    for tensor in batch.values():
        found.update(f"{tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def _check_ceilings(batch: Batch | Windows, ceilings: Tensor | None) -> Tensor | None:
    if ceilings is None:
        return None
    shape = [len(batch), batch.width] if isinstance(batch, Windows) else list(batch["labels"].shape)
    if list(ceilings.shape) != shape or ceilings.isnan().any():
        raise ValueError(
            f"ceilings must be numbers {shape} like the labels of forget_batch, got {list(ceilings.shape)}"
            f"{' with NaN' if ceilings.isnan().any() else ''}"
        )
    return ceilings.cpu().float()


def _check(name: str, batch: Batch | Windows) -> None:
    if isinstance(batch, Windows):
        if not len(batch):
            raise ValueError(f"{name} holds no window")
        return
    check_rows(name, batch)


def _in_turn(first: int, count: int, start: int, seed: int) -> Iterator[int]:
    """Yield first … first + count − 1 without end, in a new order each time round, from ``start`` on."""
    for turn in itertools.count(start // count):
        order = list(range(first, first + count))
        random.Random(f"{seed} {first} {turn}").shuffle(order)
        yield from order[start % count :]
        start = 0


def check_pair(pair: object, may_keep_only: bool = False, **given: object) -> None:
    """Raise TypeError or ValueError unless ``pair`` is what recipes take.

    In a process group, raise ValueError unless all processes were given the same texts, neurons and other
    arguments, which are ``given``. All of them must call it.

    Args:
        may_keep_only: whether there may be no text to forget.
    """
    check_kind("pair", pair, PairedBatches, "PairedBatches(masked, forget_batch, retain_batch)")
    assert isinstance(pair, PairedBatches)
    if not (pair.forget_count or may_keep_only):
        raise ValueError("pair has no text to forget: only refit_gains can do without")
    check_same(lambda: pair.describe() | given)
