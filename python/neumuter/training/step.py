"""One training step of a recipe, taken again and again: eagerly, or as a CUDA graph.

A recipe is a step made of parts: parameters, the masks that they make, loss terms, and an update. Which
samples a step has is chosen outside of it, on the CPU; what it did is read from the device now and then. In
between nothing waits for the device.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from neumuter.models.modes import without_dropout
from neumuter.training.batches import Inputs, PairedBatches
from neumuter.training.graphs import Graphs, find_obstacle
from neumuter.training.losses import (
    begin_runs,
    find_runs,
    largest_in_runs,
    log_odds,
    sum_runs,
    weigh_harm,
)
from neumuter.training.processes import Processes
from neumuter.training.sources import Watching

# Steps after which the processor reads what a device did; elsewhere than here, reading is waiting.
READ_EVERY = {"cpu": 1, "cuda": 16}
# Told of a step, counted from 1: (step, info).
Tell = Callable[[int, dict[str, float]], object]
# The log-odds of a text that nothing is left of.
NOTHING = -100.0
# By which the log-odds of a run's least likely token count less than those of the run, which ends lower.
LIKELY = 2.0
READINGS = ("loss", "forget_loss", "kl", "muted")


class Measured(NamedTuple):
    """What a step's forward pass found.

    losses: of the forget tokens, float32 [N] in nats. weights: of these tokens, float32 [N]; 0 for padding.
    ceilings: the log-odds that these tokens may keep, float32 [N]; 0 for padding. runs: what
    ``losses.find_runs`` gives for these tokens, int64 [N]. kl: the mean of KL(reference ‖ masked) over the
    retain tokens, a scalar in nats. harm: the mean of what ``losses.weigh_harm`` makes of it, a scalar.

    Where several ``processes`` share the step, losses and weights are those of this process's tokens, and
    means are what these add to the mean of all ``tokens`` forget tokens. An update is given the whole kl.
    """

    losses: torch.Tensor
    weights: torch.Tensor
    ceilings: torch.Tensor
    runs: torch.Tensor
    kl: torch.Tensor
    harm: torch.Tensor
    tokens: int | None = None
    processes: Processes | None = None

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values``, float32 [N], over the forget tokens."""
        return _mean(values, self.weights, self.tokens)

    def once(self, value: Tensor) -> Tensor:
        """A term that does not depend on samples, so that it is counted once in the sum over processes."""
        return value / self.processes.count if self.processes else value

    def whole(self, mean: Tensor) -> Tensor:
        """The sum of a mean over the processes, without a gradient."""
        return self.processes.sum([mean])[0] if self.processes else mean.detach()


class Update(Protocol):
    """What a step does with gradients. It works on tensors of the device alone, in place."""

    def apply(self, measured: Measured, counter: Tensor) -> None:
        """Change the parameters by their ``grad``; ``counter``: the number of steps before, int64 []."""

    def state(self) -> dict[str, Any]:
        """What it needs to go on, in addition to the parameters: tensors and numbers."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` returned."""


class Step:
    """A training step.

    On a GPU it becomes a CUDA graph for each size of its inputs, which are padded so that there are few. What
    cannot be captured runs eagerly, and the log says why.

    Where several processes share ``pair``, each computes its share of the samples. One transfer sums the
    gradients and what is told of the step, so that all processes make the same update.

    A step that does not fit into memory is taken in parts from then on, which the log says. The loss is still
    that of the whole step, for which the parts run twice forward; and no graph is captured any more. Where
    one sample alone does not fit, its activations are computed again in the backward pass.

    ``log_odds``, float32 [forget samples] on the device, NaN where no step had the sample: how well each was
    known when a step last had it, under that step's masks. It is known as well as that of its runs of tokens
    (see ``losses.find_runs``) which is most likely to come out: by the product of the probabilities of its
    tokens, or by the least of them, whose log-odds count ``LIKELY`` less. Where nothing of the text is to be
    forgotten, it is ``NOTHING``.

    Args:
        pair: the texts, and the model under its masks.
        parameters: float32 tensors that are trained in place.
        masks: (inputs, counter) → the context of the masks; counter is the number of the step, int64 [].
        terms: functions of ``Measured``; the loss is the sum of their scalars.
        update: changes the parameters.
        muted: measures the share of neurons that are muted, a scalar tensor; None tells 0.
        everywhere: see ``PairedBatches.losses``.
    """

    def __init__(
        self,
        pair: PairedBatches,
        parameters: Sequence[Tensor],
        masks: Callable[[Inputs, Tensor], AbstractContextManager[object]],
        terms: Sequence[Callable[[Measured], Tensor]],
        update: Update,
        muted: Callable[[], Tensor] | None = None,
        everywhere: bool = False,
    ) -> None:
        self.pair, self.parameters, self.masks, self.terms = pair, parameters, masks, terms
        self.update, self.muted, self.everywhere = update, muted, everywhere
        obstacle = find_obstacle(pair.masked, shared=pair.processes is not None)
        self._graphs = Graphs(self._run, pair.device) if obstacle is None else None
        self.read_every = READ_EVERY.get(pair.device.type, 1)
        self.done = 0
        self.log_odds = torch.full([pair.forget_count], torch.nan, device=pair.device)
        self._counter = torch.zeros((), dtype=torch.int64, device=pair.device)
        self._readings = torch.zeros(self.read_every, len(READINGS), dtype=torch.float64, device=pair.device)

    def take(self, source: Iterator[Sequence[int]], steps: int, tell: Tell | None = None) -> None:
        """Take ``steps`` steps.

        Args:
            source: yields the sample ids of each step, forget samples first. If it has a method ``see``, that
                is given ``log_odds`` on the CPU after every step, on a GPU after every 16th.
            tell: called as (step, info) for every step, counted from 1: a few steps later on a GPU. info has
                "loss", "forget_loss" and "kl" in nats, and "muted", the share of neurons.
        """
        last, told = self.done + steps, self.done
        watching = source if isinstance(source, Watching) else None
        with without_dropout(self.pair.masked.model):
            while self.done < last:
                self.once(next(source))
                between = self.done % self.read_every
                if between and self.done < last:
                    continue
                # Even if nobody is told: inputs of later steps would pile up where the processor is faster.
                rows = self._readings.tolist()
                # Not at an end in between, so that where runs end changes nothing.
                if watching and not between:
                    watching.see(self.log_odds.to("cpu", copy=True))
                while told < self.done:
                    info = dict(zip(READINGS, rows[told % self.read_every], strict=True))
                    told += 1
                    if tell:
                        tell(told, info)

    def once(self, sample_ids: Sequence[int]) -> None:
        """Take one step, which nobody is told of, on these samples, forget samples first."""
        ids, counts, whole = sample_ids, [True] * len(sample_ids), None
        if processes := self.pair.processes:
            split = sum(i < self.pair.forget_count for i in sample_ids)
            tokens = self.pair.count_tokens(sample_ids, self.everywhere)
            whole = _Whole(processes, sample_ids[:split], *tokens)
            shares = [processes.share(kind) for kind in (sample_ids[:split], sample_ids[split:])]
            ids = [i for own, _ in shares for i in own]
            counts = [number < count for own, count in shares for number in range(len(own))]
        while not self._fits(ids, counts, whole):
            # A graph is of a whole step.
            self.run_eagerly()
            self.pair.at_once.shrink(min(self.pair.at_once.size, len(ids)))
        self.done += 1

    def _fits(self, ids: Sequence[int], counts: Sequence[bool], whole: "_Whole | None") -> bool:
        """Take a step, of whose samples some count; or leave all as it was, if that takes too much memory."""
        at_once, self._irrevocable = self.pair.at_once, False
        transfers = whole and whole.processes.transfers
        size = at_once.limit(len(ids))
        try:
            parts = []
            for start in range(0, len(ids), size):
                part = slice(start, start + size)
                counted = [i for i, counts_too in zip(ids[part], counts[part], strict=True) if counts_too]
                padded = self._graphs is not None
                parts.append(self.pair.take(ids[part], self.everywhere, padded=padded, counted=counted))
            if self._graphs:
                self._graphs.run(*parts)
            else:
                self._run(*(part.to(self.pair.device) for part in parts), whole=whole)
        except torch.OutOfMemoryError as error:
            # Nor can it begin anew where other processes have taken something of it already.
            if self._irrevocable or (whole and whole.processes.transfers != transfers):
                raise
            at_once.check(size, error)
            return False
        return True

    def run_eagerly(self) -> None:
        """Take all further steps without CUDA graphs."""
        self._graphs = None

    def state(self) -> dict[str, Any]:
        """All that a later run needs to go on after this step with the same bits, but for its source.

        The sources ``InTurn`` and ``HardFirst`` have a state of their own.
        """
        return {
            "done": self.done,
            "parameters": [parameter.detach().clone() for parameter in self.parameters],
            "update": self.update.state(),
            "log_odds": self.log_odds.clone(),
            "at_once": self.pair.at_once.size,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` returned; the source must go on as well."""
        self.done = state["done"]
        self._counter.fill_(self.done)
        self.log_odds.copy_(state["log_odds"])
        self.pair.at_once.size = state["at_once"]
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        self.update.load(state["update"])
        # They read the tensors of the update that was.
        if self._graphs:
            self._graphs = Graphs(self._run, self.pair.device)

    def _run(self, *parts: Inputs, whole: "_Whole | None" = None) -> None:
        """The step itself. It must wait for nothing, and touch no tensor but those that stay in place."""
        for parameter in self.parameters:
            parameter.grad = None
        if len(parts) == 1:
            with self.masks(parts[0], self._counter):
                losses, divergences = self.pair.evaluate(parts[0], self.everywhere)
                measured, loss = self._weigh(parts, losses, divergences, whole)
                loss.backward()
        else:
            losses, divergences = self._look_at(parts)
            measured, loss = self._weigh(parts, losses, divergences, whole)
            loss.backward()
            self._pass_back(parts, losses, divergences)
        with torch.no_grad():
            found: Sequence[Tensor] = [loss, measured.mean(losses), measured.kl]
            seen = self._find_log_odds(parts, measured) if self.pair.forget_count else self.log_odds
            if whole:
                found, seen = self._reduce(whole, found, seen)
            self._irrevocable = True
            self.update.apply(measured._replace(kl=found[2]), self._counter)
            self.log_odds.copy_(torch.where(seen.isneginf(), self.log_odds, seen))
            muted = self.muted() if self.muted else torch.zeros_like(measured.kl)
            row = torch.stack([value.detach().to(self._readings) for value in (*found, muted)])
            self._readings.index_copy_(0, self._counter[None] % self.read_every, row[None])
            self._counter.add_(1)

    def _weigh(
        self, parts: Sequence[Inputs], losses: Tensor, divergences: Tensor, whole: "_Whole | None"
    ) -> tuple[Measured, Tensor]:
        """What was found in all parts of a step, and its loss, a scalar."""
        weights = [part.weights.split([len(part.targets), len(part.references)]) for part in parts]
        forget, retain = (torch.cat(kind) for kind in zip(*weights, strict=True))
        kl, harm = (
            _mean(values, retain, whole and whole.retain_tokens)
            for values in (divergences, weigh_harm(divergences))
        )
        ceilings = torch.cat([part.ceilings for part in parts]).to(losses.device)
        behind = itertools.accumulate((part.ids.numel() for part in parts), initial=0)
        places = torch.cat(
            [part.places[: len(part.targets)] + first for part, first in zip(parts, behind, strict=False)]
        )
        runs = find_runs(places.to(losses.device), ceilings)
        measured = Measured(
            losses, forget, ceilings, runs, kl, harm, whole and whole.forget_tokens, whole and whole.processes
        )
        return measured, functools.reduce(torch.add, [term(measured) for term in self.terms])

    @torch.no_grad()
    def _look_at(self, parts: Sequence[Inputs]) -> tuple[Tensor, Tensor]:
        """The losses and divergences of all parts, as if they were parameters.

        Only from all of them follows the loss, and with what weight each of them enters it.
        """
        found = []
        for part in parts:
            with self.masks(part, self._counter):
                found.append(self.pair.evaluate(part, self.everywhere))
        losses, divergences = (torch.cat(kind).requires_grad_() for kind in zip(*found, strict=True))
        return losses, divergences

    def _pass_back(self, parts: Sequence[Inputs], *found: Tensor) -> None:
        """Add what the gradients of ``_look_at``'s tensors make of the parameters', one part at a time."""
        slopes = [torch.zeros_like(value) if value.grad is None else value.grad for value in found]
        by_part = zip(
            slopes[0].split([len(part.targets) for part in parts]),
            slopes[1].split([len(part.references) for part in parts]),
            strict=True,
        )
        for part, of_part in zip(parts, by_part, strict=True):
            with self.masks(part, self._counter):
                torch.autograd.backward(self.pair.evaluate(part, self.everywhere), of_part)

    def _find_log_odds(self, parts: Sequence[Inputs], measured: Measured) -> Tensor:
        """``log_odds`` of the samples of these parts, and −∞ of others."""
        runs, ceilings, weights = (
            value.to(self.log_odds.device) for value in (measured.runs, measured.ceilings, measured.weights)
        )
        losses = measured.losses.to(self.log_odds)
        # Greedy decoding says a run of likely tokens, whatever their product is.
        least = log_odds(largest_in_runs(losses, runs)) - LIKELY
        odds = torch.maximum(log_odds(sum_runs(losses, runs)), least).clamp(min=NOTHING)
        settled = (ceilings >= 0) | ~begin_runs(runs)
        known = odds.masked_fill(settled, NOTHING).masked_fill(weights == 0, -torch.inf)
        ids = [
            part.samples.index_select(0, part.places[: len(part.targets)] // part.ids.shape[1])
            for part in parts
        ]
        return self._by_sample(torch.cat(ids), known)

    def _by_sample(self, ids: Tensor, odds: Tensor) -> Tensor:
        return torch.full_like(self.log_odds, -torch.inf).scatter_reduce(0, ids, odds, "amax")

    def _reduce(
        self, whole: "_Whole", found: Sequence[Tensor], seen: Tensor
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Make the gradients, what was found and the log-odds those of the whole step."""
        ids = torch.tensor(whole.forget, dtype=torch.int64, device=seen.device)
        others = torch.arange(len(ids), device=seen.device) % whole.processes.count != whole.processes.rank
        gradients = [cast(Tensor, parameter.grad) for parameter in self.parameters]
        *sums, odds = whole.processes.sum([*gradients, *found, seen[ids].masked_fill(others, 0.0)])
        for parameter, gradient in zip(self.parameters, sums, strict=False):
            parameter.grad = gradient
        return sums[len(gradients) :], self._by_sample(ids, odds)


class _Whole(NamedTuple):
    """The step of which a process computes a part: its forget samples, and the tokens that count."""

    processes: Processes
    forget: Sequence[int]
    forget_tokens: int
    retain_tokens: int


def _mean(values: Tensor, weights: Tensor, count: int | None = None) -> Tensor:
    weights = weights.to(values.device)
    # Where there are no values, as of no forget sample, the mean is 0.
    total = weights.sum().clamp(min=1) if count is None else max(1, count)
    return (values * weights).sum() / total
