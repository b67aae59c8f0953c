"""Slopes of forgotten tokens: measured at the end of a request, and held down in later ones."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from neumuter.models.modes import without_dropout
from neumuter.mutes.mute_set import MuteSet
from neumuter.mutes.slopes import Slopes
from neumuter.training.batches import PairedBatches, check_pair
from neumuter.training.losses import log_odds
from neumuter.training.neurons import Neurons

# What the slopes of one text take in a file, on the average over the texts of a request.
BYTES_PER_TEXT = 50_000
# Of one neuron in it: its index and its gain.
BYTES_PER_NEURON = 8
LEVELS = 127


def measure_slopes(pair: PairedBatches, mutes: MuteSet, existing: MuteSet | None = None) -> Slopes:
    """Measure the slopes of the forget tokens of ``pair`` under ``mutes`` and an ``existing`` set.

    Those neurons enter whose squared slopes have the largest sum over the tokens, so many that a text takes
    ``BYTES_PER_TEXT``. Slopes are rounded to 127 steps of each sign.

    Raises:
        ValueError: ``mutes`` have neurons that are not masked.
    """
    check_pair(pair)
    neurons = Neurons(pair.masked, existing)
    gates = torch.cat(list(neurons.masks(mutes).values()))
    total = torch.zeros_like(gates)

    def passes() -> Iterator[tuple[Tensor, Tensor]]:
        for sample in range(pair.forget_count):
            yield from find_slopes(pair, neurons, gates, sample)

    for _, slopes in passes():
        total += slopes.square().sum(0)
    tokens = pair.count_tokens(range(pair.forget_count))[0]
    most = BYTES_PER_TEXT * pair.forget_count // (tokens + BYTES_PER_NEURON)
    ids = total.topk(max(1, min(most, neurons.count))).indices.sort().values
    odds, found = zip(*((odds, slopes[:, ids]) for odds, slopes in passes()), strict=True)
    slopes = torch.cat(found)
    # A token of which no slope is seen has steps of 0.
    scales = (slopes.abs().amax(1) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    gains = gates[ids]
    gain_range = (min(0.0, float(gains.min())), max(1.0, float(gains.max())))
    return Slopes(
        at=neurons.mute_set(ids, gains, "modulate", gain_range, {}, 0),
        log_odds=torch.cat(odds).cpu(),
        scales=scales.cpu(),
        steps=(slopes / scales[:, None]).round().to(torch.int8).cpu(),
    )


def find_slopes(
    pair: PairedBatches, neurons: Neurons, gates: Tensor, sample: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields log-odds [n] and slopes [n, neurons] at ``gates`` [neurons], of a few tokens of a sample.

    The sample is repeated with a mask row for each token, so one backward pass gives the slopes of all.
    """

    def find(tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        mask = gates.repeat(len(tokens), 1).requires_grad_()
        by_layer = mask.split(list(neurons.widths.values()), 1)
        with (
            without_dropout(pair.masked.model),
            pair.masked.applying(dict(zip(neurons.widths, by_layer, strict=True))),
        ):
            rows = pair.sample_losses([sample] * len(tokens))
            odds = log_odds(torch.stack([row[token] for row, token in zip(rows, tokens, strict=True)]))
            (slopes,) = torch.autograd.grad(odds.sum(), mask)
        return odds.detach(), slopes

    yield from pair.pieces.run(find, range(sum(pair.count_tokens([sample]))))


class Held:
    """A loss that holds earlier requests' tokens down: the mean hinge on log-odds, summed over requests.

    Args:
        former: of each earlier request. neurons: with the mute set in force.
        support: the neurons that are trained, int64 [k]. start: their gains at first, float32 [k].
        margin: see ``GainsConfig``. sign: 1, or -1 to hold the tokens up instead.
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
        self.start, self.margin, self.sign = start.detach().clone(), margin, sign
        mask = neurons.start.index_put((support,), self.start)
        place = torch.full([neurons.count], -1, device=neurons.device).index_put(
            (support,), torch.arange(len(support), device=neurons.device)
        )
        odds, slopes, weights = [], [], []
        for known in former:
            ids = neurons.places(known.at)
            gains = torch.cat([layer.gains for layer in known.at.layers.values()]).to(mask)
            values = known.values.to(mask)
            odds.append(known.log_odds.to(mask) + values @ (mask[ids] - gains))
            trained = place[ids] >= 0
            matrix = torch.zeros(len(values), len(support), device=neurons.device)
            slopes.append(matrix.index_copy(1, place[ids][trained], values[:, trained]))
            weights.append(torch.full_like(odds[-1], 1 / len(odds[-1])))
        self.odds, self.slopes, self.weights = torch.cat(odds), torch.cat(slopes), torch.cat(weights)

    def __call__(self, gains: Tensor) -> Tensor:
        """The loss at ``gains``, float32 [k], of ``support``: a scalar in nats."""
        odds = self.odds + self.slopes @ (gains - self.start)
        return (self.weights * F.relu(self.margin + self.sign * odds)).sum()
