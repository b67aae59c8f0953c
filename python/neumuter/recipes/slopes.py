"""Slopes of forgotten tokens: measured at the end of a request, and held down in later ones."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from neumuter.models.devices import move
from neumuter.models.modes import without_dropout
from neumuter.mutes.container import MAX_FILE_BYTES
from neumuter.mutes.mute_set import MuteSet
from neumuter.mutes.slopes import Slopes
from neumuter.training.batches import PairedBatches, check_pair
from neumuter.training.losses import begin_runs, find_ends, log_odds, sum_runs
from neumuter.training.neurons import Neurons

# What the slopes of one text take in a file, on the average over the texts of a request.
BYTES_PER_TEXT = 50_000
# Of one neuron in it: its index and its gain.
BYTES_PER_NEURON = 8
LEVELS = 127

logger = logging.getLogger("neumuter")


class _Item(NamedTuple):
    """A token of a sample that is to be forgotten, or the first one of a run of them.

    place: its number among the sample's counted tokens. length: of the run. ceiling: the log-odds that it may
    keep.
    """

    place: int
    length: int
    ceiling: float


def measure_slopes(
    pair: PairedBatches,
    mutes: MuteSet,
    existing: MuteSet | None = None,
    callback: Callable[[int, int], object] | None = None,
) -> Slopes | None:
    """Measure the slopes of what is to be forgotten of ``pair`` under ``mutes`` and an ``existing`` set.

    That is runs of tokens whose ceilings are below 0, and tokens of which nothing is known; what may stay
    likely, such as wording, is left out. Those neurons enter whose squared slopes have the largest sum, so
    many that a text takes ``BYTES_PER_TEXT`` and the file can be read again. Slopes are rounded to 127 steps
    of each sign.

    Args:
        callback: called as (done, total): each text is gone through twice, with a copy of it for each run.

    Returns:
        The slopes; None if nothing is to be forgotten, which is logged.

    Raises:
        ValueError: ``mutes`` have neurons that are not masked.
    """
    check_pair(pair)
    neurons = Neurons(pair.masked, existing)
    items = [_find_items(pair, sample) for sample in range(pair.forget_count)]
    if not any(items):
        logger.warning("No token is to be forgotten, because all may stay likely: there are no slopes.")
        return None
    gates = torch.cat(list(neurons.masks(mutes).values()))
    total = torch.zeros_like(gates)

    def passes(before: int) -> Iterator[tuple[Tensor, Tensor]]:
        for sample, places in enumerate([item.place for item in of_sample] for of_sample in items):
            yield from find_slopes(pair, neurons, gates, sample, places)
            if callback:
                callback(before + sample + 1, 2 * len(items))

    for _, slopes in passes(0):
        total += slopes.square().sum(0)
    count = sum(map(len, items))
    # Half of what may be read is left to what is known of each run and to the header.
    room = min(BYTES_PER_TEXT * pair.forget_count, MAX_FILE_BYTES // 2)
    most = room // (count + BYTES_PER_NEURON)
    ids = total.topk(max(1, min(most, neurons.count))).indices.sort().values
    odds, found = zip(*((odds, slopes[:, ids]) for odds, slopes in passes(len(items))), strict=True)
    slopes = torch.cat(found)
    # A token of which no slope is seen has steps of 0.
    scales = (slopes.abs().amax(1) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    gains = gates[ids]
    tokens = pair.count_tokens(range(pair.forget_count))[0]
    gain_range = (min(0.0, float(gains.min())), max(1.0, float(gains.max())))
    return Slopes(
        at=neurons.mute_set(ids, gains, "modulate", gain_range, {}, 0),
        log_odds=torch.cat(odds).cpu(),
        ceilings=torch.tensor([item.ceiling for of_sample in items for item in of_sample]),
        weights=torch.tensor([item.length / tokens for of_sample in items for item in of_sample]),
        scales=scales.cpu(),
        steps=(slopes / scales[:, None]).round().to(torch.int8).cpu(),
    )


def _find_items(pair: PairedBatches, sample: int) -> list[_Item]:
    ceilings, runs = pair.ceilings_of(sample), pair.runs_of(sample)
    lengths, ends = sum_runs(torch.ones_like(ceilings), runs), find_ends(ceilings, runs)
    places = (begin_runs(runs) & (ceilings < 0)).nonzero().flatten().tolist()
    return [_Item(place, int(lengths[place]), float(ends[place])) for place in places]


def find_slopes(
    pair: PairedBatches, neurons: Neurons, gates: Tensor, sample: int, places: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields log-odds [n] and slopes [n, neurons] at ``gates`` [neurons], of a few runs of a sample.

    The sample is repeated with a mask row for each run, so one backward pass gives the slopes of all.

    Args:
        places: where the runs begin among the sample's counted tokens.
    """
    runs = move(pair.runs_of(sample), pair.device)

    def find(some: Sequence[int]) -> tuple[Tensor, Tensor]:
        mask = gates.repeat(len(some), 1).requires_grad_()
        by_layer = mask.split(list(neurons.widths.values()), 1)
        with (
            without_dropout(pair.masked.model),
            pair.masked.applying(dict(zip(neurons.widths, by_layer, strict=True))),
        ):
            rows = pair.sample_losses([sample] * len(some))
            losses = [sum_runs(row, runs)[place] for row, place in zip(rows, some, strict=True)]
            odds = log_odds(torch.stack(losses))
            (slopes,) = torch.autograd.grad(odds.sum(), mask)
        return odds.detach(), slopes

    if places:
        yield from pair.pieces.run(find, places)


class Held:
    """A loss that holds down what earlier requests forgot: the mean hinge on log-odds, summed over requests.

    Where the ceiling of a run is known, its hinge ends there; see ``losses.hinge_runs``. The least likely
    token of a run is not held by itself: of it nothing is stored.

    Args:
        former: of each earlier request. neurons: with the mute set in force.
        support: the neurons that are trained, int64 [k]. start: their gains at first, float32 [k].
        margin: see ``GainsConfig``. sign: 1, or -1 to raise the log-odds to the margin instead.
    """

    def __init__(
        self,
        former: Sequence[Slopes],
        neurons: Neurons,
        support: Tensor,
        start: Tensor,
        margin: float,
        sign: int = 1,
    ) -> None:
        self.start, self.sign = start.detach().clone(), sign
        mask = neurons.start.index_put((support,), self.start)
        place = torch.full([neurons.count], -1, device=neurons.device).index_put(
            (support,), torch.arange(len(support), device=neurons.device)
        )
        odds, ends, weights = [], [], []
        # Of each request, the places of its trained neurons in the support, and their slopes. One matrix over
        # the whole support would take a gigabyte where requests are many and the model is large.
        self.slopes: list[tuple[Tensor, Tensor]] = []
        for known in former:
            ids = neurons.places(known.at)
            gains = torch.cat([layer.gains for layer in known.at.layers.values()]).to(mask)
            values = known.values.to(mask)
            odds.append(known.log_odds.to(mask) + values @ (mask[ids] - gains))
            trained = place[ids] >= 0
            self.slopes.append((place[ids][trained], values[:, trained]))
            ends.append(known.ceilings.masked_fill(known.ceilings.isneginf(), -margin).to(mask))
            weights.append(known.weights.to(mask))
        self.odds, self.weights = torch.cat(odds), torch.cat(weights)
        self.ends = torch.cat(ends) if sign > 0 else torch.full_like(self.odds, margin)

    def __call__(self, gains: Tensor) -> Tensor:
        """The loss at ``gains``, float32 [k], of ``support``: a scalar in nats."""
        moved = gains - self.start
        odds = self.odds + torch.cat([slopes @ moved[places] for places, slopes in self.slopes])
        return (self.weights * F.relu(self.sign * (odds - self.ends))).sum()
