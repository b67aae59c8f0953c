"""Trainable gates on the FFN neurons of a frozen model, and the way back."""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from neumuter.families import find_ffns
from neumuter.ffn import FFNSwap, FFNWrapper, refuse_wrapped
from neumuter.fingerprint import fingerprint
from neumuter.mutes import MutedLayer, MuteSet, check_layer
from neumuter.muting import architecture
from neumuter_kernels import hard_concrete, neuron_budget, select_muted

STRETCH = (-0.1, 1.1)
TEMPERATURE = 1 / 3
# The evaluation gate σ(s)·(ζ − γ) + γ is exactly open, 1, at σ(s) = (1 − γ)/(ζ − γ).
OPEN = (1 - STRETCH[0]) / (STRETCH[1] - STRETCH[0])
INITIAL_SCORE = math.log(OPEN / (1 - OPEN))


@dataclass(frozen=True)
class _Sampling:
    seed: int
    step: torch.Tensor  # not an int, for which torch.compile would compile again in every step
    sample_ids: torch.Tensor

    def mask(self, ffn, hidden_states):
        rows = self.sample_ids.shape[0]
        _check_rows(rows, hidden_states, "sample_ids")
        device = ffn.scores.device
        step, ids = self.step.to(device), self.sample_ids.to(device)
        # Made here, not once per step, so that activation checkpointing recomputes them.
        return hard_concrete(
            ffn.scores, rows, self.seed, step, ffn.layer, ids, TEMPERATURE, STRETCH, training=True
        )


@dataclass(frozen=True)
class _Evaluating:
    def mask(self, ffn, hidden_states):
        return hard_concrete(ffn.scores, 1, 0, 0, ffn.layer, None, TEMPERATURE, STRETCH, training=False)


@dataclass(frozen=True)
class _Applying:
    masks: dict

    def mask(self, ffn, hidden_states):
        mask = self.masks.get(ffn.path)
        if mask is None:
            return None
        if mask.shape[0] > 1:
            _check_rows(mask.shape[0], hidden_states, f"the mask of {ffn.path}")
        return mask.to(hidden_states.device)


def _check_rows(rows, hidden_states, name):
    if hidden_states.dim() != 3 or hidden_states.shape[0] != rows:
        raise ValueError(
            f"{name} has {rows} rows, but the hidden states are {tuple(hidden_states.shape)}: there must be "
            "one row per sample of a batch [B, S, d]"
        )


class GatedFFN(FFNWrapper):
    """An FFN with a trainable score per neuron. ``gates`` says which mask it makes of them; None: none."""

    def __init__(self, ffn):
        super().__init__(ffn)
        self.scores = nn.Parameter(torch.full((self.width,), INITIAL_SCORE, device=ffn.device))
        self.gates = None

    def mask(self, hidden_states):
        return None if self.gates is None else self.gates.mask(self, hidden_states)


class Masked:
    """A model with gates on its FFN neurons, made by ``attach``. As a context manager it detaches at the end.

    ``model``: the model itself, changed in place. Outside every context below it is the untouched model,
    bit for bit. The contexts nest, and each restores the state it found. Run the backward pass inside the
    context as well if the model uses activation checkpointing, which runs the forward again.
    """

    def __init__(self, model, start_layer):
        refuse_wrapped(model)
        found = find_ffns(model)
        if type(start_layer) is not int or not 0 <= start_layer < len(found):
            raise ValueError(
                f"start_layer must be an int from 0 to {len(found) - 1} ({type(model).__name__} has "
                f"{len(found)} FFNs), got {start_layer!r}"
            )
        self.model = model
        self._ffns = found[start_layer:]
        wrappers = [GatedFFN(ffn) for ffn in self._ffns]
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        for parameter in self._trainable:
            parameter.requires_grad_(False)
        self._swap = FFNSwap(model, wrappers)
        self._attached = True

    @property
    def scores(self):
        """{FFN module path: float32 Parameter [F]} in model order: the log-odds of each neuron's gate."""
        return {wrapper.path: wrapper.scores for wrapper in self._swap.wrappers}

    def sampling(self, seed, step, sample_ids):
        """Context: training gates, one row of hard-concrete samples per sample of the batch.

        The noise depends on ``seed``, ``step``, the layer, the neuron and the sample's own id alone, not on
        how samples are batched. ``sample_ids``: int64 [B], an id for each sample of the batch. A forward
        with another batch size raises ValueError.
        """
        ids = torch.as_tensor(sample_ids)
        if ids.dim() != 1 or ids.numel() == 0 or ids.dtype != torch.int64:
            raise ValueError(
                f"sample_ids must be int64 [B] with B ≥ 1, got {ids.dtype} of shape {tuple(ids.shape)}"
            )
        device = next(iter(self.scores.values())).device
        return self._using(_Sampling(int(seed), torch.tensor(int(step), device=device), ids.to(device)))

    def evaluating(self):
        """Context: the gates without noise, one row for all samples."""
        return self._using(_Evaluating())

    def applying(self, masks):
        """Context: explicit masks, {path: float32 [F] or [G, F]}, G = 1 or the batch size; differentiable.

        FFNs that are not named run unmasked. Raises ValueError for an unknown path, dtype or shape.
        """
        checked = {}
        widths = {wrapper.path: wrapper.width for wrapper in self._swap.wrappers}
        for path, mask in masks.items():
            if path not in widths:
                raise ValueError(f"masks names {path!r}, which is not an attached FFN: {', '.join(widths)}")
            if mask.dtype != torch.float32 or mask.dim() not in (1, 2) or mask.shape[-1] != widths[path]:
                raise ValueError(
                    f"the mask of {path} must be float32 [{widths[path]}] or [G, {widths[path]}], got "
                    f"{mask.dtype} {tuple(mask.shape)}"
                )
            checked[path] = mask.reshape(-1, widths[path])
        return self._using(_Applying(checked))

    def off(self):
        """Context: the untouched model, bit for bit."""
        return self._using(None)

    @contextmanager
    def _using(self, gates):
        if not self._attached:
            raise RuntimeError("this handle is detached; attach the model again")
        previous = [wrapper.gates for wrapper in self._swap.wrappers]
        for wrapper in self._swap.wrappers:
            wrapper.gates = gates
        try:
            yield self
        finally:
            for wrapper, former in zip(self._swap.wrappers, previous, strict=True):
                wrapper.gates = former

    def select(self, budget=None, threshold=None, method=None, seed=0):
        """The ``MuteSet`` of the neurons with the lowest scores; their gains are the evaluation gates.

        Give one of ``budget``, a share of the masked neurons (float in (0, 1], rounded down, at least one
        neuron) or an exact count (int), or ``threshold``: all neurons with σ(score) below it (float in
        (0, 1); the paper's r is 0.15). ``method`` and ``seed`` are recorded in the mute set.

        Raises ValueError (TypeError for a wrong type) for bad arguments, for NaN scores, if nothing is
        selected, and if every selected gate is fully open, so that muting would change nothing.
        """
        scores = self.scores
        total = sum(len(s) for s in scores.values())
        selection = {"budget": budget} if threshold is None else {"threshold": threshold}
        if (budget is None) == (threshold is None):
            raise ValueError("give either budget or threshold")
        if budget is not None:
            budget = neuron_count(budget, total)
        elif not isinstance(threshold, float) or not 0 < threshold < 1:
            raise ValueError(f"threshold must be a float in (0, 1), got {threshold!r}")
        for path, score in scores.items():
            if score.isnan().any():
                raise ValueError(f"the scores of {path} hold NaN: training diverged, nothing can be selected")
        device = next(iter(scores.values())).device
        flat = [s.detach().to(device) for s in scores.values()]
        indptr, indices, gains = (t.cpu() for t in select_muted(flat, budget=budget, threshold=threshold))
        ends = indptr.tolist()
        lowest = min(score.min().sigmoid().item() for score in flat)
        if ends[-1] == 0:
            raise ValueError(f"no neuron has σ(score) below {threshold}; the lowest is {lowest:.3f}")
        if (gains[: ends[-1]] > 1 - 1e-6).all():
            raise ValueError(
                f"every selected gate is fully open (lowest σ(score) {lowest:.3f}), so muting would "
                "change nothing: train the scores first"
            )
        runs = [slice(start, end) for start, end in pairwise(ends)]
        neurons = {path: (indices[run], gains[run]) for path, run in zip(scores, runs, strict=True)}
        return self.mute_set(neurons, "mute", (0.0, 1.0), (method or {}) | {"selection": selection}, seed)

    def mute_set(self, neurons, mode="mute", gain_range=(0.0, 1.0), method=None, seed=0):
        """A ``MuteSet`` of explicit neurons, {path: (indices [n] integers ascending, gains [n])}.

        ``gain_range``: what the mode allows. ``method``: hyper-parameters, JSON values. Raises ValueError
        if something does not fit the model, or if no neuron is given.
        """
        widths = {ffn.path: ffn.width for ffn in self._ffns}
        gain_range = tuple(float(g) for g in gain_range)
        layers = {}
        for path, (indices, gains) in neurons.items():
            if path not in widths:
                raise ValueError(f"neurons names {path!r}, which is not an attached FFN: {', '.join(widths)}")
            if len(indices):
                layers[path] = MutedLayer(
                    torch.as_tensor(indices).to("cpu", torch.int32, copy=True),
                    torch.as_tensor(gains).detach().to("cpu", torch.float32, copy=True),
                )
                check_layer(path, layers[path], widths[path], gain_range)
        return MuteSet(
            layers=layers,
            widths=widths,
            architecture=architecture(self.model),
            fingerprint=fingerprint(self._ffns, layers),
            mode=mode,
            gain_range=gain_range,
            method=method or {},
            seed=seed,
        )

    def detach(self):
        """Put the very original modules and requires_grad flags back. Harmless when called again."""
        if self._attached:
            self._swap.restore()
            for parameter in self._trainable:
                parameter.requires_grad_(True)
            self._attached = False

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.detach()


def neuron_count(budget, total):
    """``budget`` as a number of neurons out of ``total``: a float in (0, 1] is a share, rounded down but at
    least one; an int is the count. Raises TypeError or ValueError for anything else."""
    count = neuron_budget(budget, total)
    if isinstance(budget, float):
        count = max(1, count)
    if not 1 <= count <= total:
        raise ValueError(f"budget as a count must be from 1 to {total} neurons, got {budget!r}")
    return count


def attach(model, start_layer=1):
    """Put gates on the neurons of ``model``'s FFNs and freeze everything else; returns a ``Masked`` handle.

    ``model``: a transformers model with Llama-type (gate, up, down) or GPT-2/GPT-Neo-type FFNs; it is
    changed in place, this instance only. Forward hooks on an FFN module itself (not on its projections)
    run only while gates are off. ``start_layer``: the first FFN that gets gates, counted from 0
    (the paper leaves the first layer alone). Every score starts where its evaluation gate is exactly 1.

    Raises ValueError for a model without such FFNs or with an unknown activation, and RuntimeError for one
    that is attached or muted already.
    """
    return Masked(model, start_layer)
