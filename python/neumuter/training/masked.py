"""Trainable gates on the FFN neurons of a frozen model, and the way back."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from neumuter.models.devices import is_fake, move
from neumuter.models.families import find_ffns
from neumuter.models.ffn import FFN
from neumuter.models.installed import TRANSPARENT, Installed, refuse_wrapped
from neumuter.models.recomputation import Recomputation
from neumuter.models.seams import choose_seams
from neumuter.mutes.fingerprint import adapter_fingerprint, fingerprint
from neumuter.mutes.matching import architecture
from neumuter.mutes.mute_set import MutedLayer, MuteSet, check_layer
from neumuter.training.gates import (
    INITIAL_SCORE,
    Applying,
    Evaluating,
    Sampling,
    Source,
    TrainableGates,
    sample_at_once,
)
from neumuter.training.reached import find_reached_experts
from neumuter.training.selection import select_lowest


class Masked:
    """A model with gates on its FFN neurons, made by ``attach``. As a context manager it detaches at the end.

    model: the model itself, changed in place. ffns: its masked FFNs (see ``neumuter.models.families``).

    Outside of the contexts below it is the untouched model, bit for bit. The contexts nest, and each restores
    the state that it found. Run the backward pass inside the context as well if the model uses activation
    checkpointing, which runs the forward pass again.
    """

    def __init__(self, model: nn.Module, start_layer: int) -> None:
        self.model = model
        self._before, self.ffns = split_ffns(model, start_layer)
        # Gates on those before, once ``open_before`` was called.
        self._open: Installed[TrainableGates] | None = None
        # They are known by name, because wrappers such as FSDP put other objects in their place.
        self._trainable = {name for name, p in _name_parameters(model) if p.requires_grad}
        self._installed = _install(model, self.ffns)
        for name, parameter in _name_parameters(model):
            if name in self._trainable:
                parameter.requires_grad_(False)
        self._attached = True
        self.recomputation = Recomputation(model)
        # transformers itself does it in training mode alone.
        if getattr(model, "is_gradient_checkpointing", False):
            self.recomputation.begin()

    def __repr__(self) -> str:
        neurons = sum(ffn.width for ffn in self.ffns)
        state = "attached" if self._attached else "detached"
        return f"Masked({type(self.model).__name__}, {len(self.ffns)} FFNs, {neurons} neurons, {state})"

    @property
    def scores(self) -> dict[str, nn.Parameter]:
        """The log-odds of each neuron's gate, float32 Parameters [F] by FFN module path, in model order.

        Of E experts it is [E·F], expert after expert.
        """
        return {gates.path: cast(nn.Parameter, gates.scores) for gates in self._installed.gates}

    @torch.no_grad()
    def full_scores(self) -> dict[str, Tensor]:
        """Gather ``scores`` from all processes where they are sharded: plain tensors, [F] each.

        Every process must call it.
        """
        return {path: _gathered(score) for path, score in self.scores.items()}

    @property
    def seams(self) -> dict[str, str]:
        """Where the mask comes in, {path: seam}; see ``neumuter.models.hooks``. "down" is not fused."""
        return {gates.path: gates.seam for gates in self._installed.gates}

    def sampling(
        self,
        seed: int,
        step: int | Tensor,
        sample_ids: Tensor | Sequence[int],
        row_ids: Tensor | Sequence[int] | None = None,
        everywhere: bool = False,
        at_once: bool = False,
    ) -> AbstractContextManager["Masked"]:
        """Context: training gates, one row of hard-concrete samples per sample of the batch.

        The noise depends on the seed, the step, the layer, the neuron and the sample's own id alone, not on
        how samples are batched. A forward pass with another batch size raises ValueError; where FFNs see all
        tokens of a batch in a row, as experts do, only if the tokens do not divide evenly.

        Args:
            sample_ids: int64 [B], an id for each sample of the batch.
            row_ids: for sequences packed into one row, integers with one entry per token: the position of its
                sample in ``sample_ids``, or −1 for no mask.
            everywhere: the FFNs before the first masked one draw noise, too; see ``open_before``.
            at_once: sample all gates now, by one op, instead of those of an FFN when it runs. That is fewer
                launches, and more memory with activation checkpointing. The scores must not be sharded.
        """
        ids = torch.as_tensor(sample_ids)
        if ids.dim() != 1 or ids.numel() == 0 or ids.dtype != torch.int64:
            raise ValueError(
                f"sample_ids must be int64 [B] with B ≥ 1, got {ids.dtype} of shape {tuple(ids.shape)}"
            )
        device = next(iter(self.scores.values())).device
        # A tensor of the device may change where it is, in a CUDA graph; others are copied without waiting.
        number = step if isinstance(step, torch.Tensor) else torch.tensor(int(step))
        number, ids, rows = move(number, device), move(ids, device), _checked(row_ids, len(ids))
        if everywhere:
            self.open_before()
        if not at_once:
            return self._using(Sampling(int(seed), number, ids, rows), everywhere)
        gates = [*(self._open.gates if everywhere and self._open else ()), *self._installed.gates]
        return self._using(Applying(sample_at_once(gates, int(seed), number, ids), rows), everywhere)

    def open_before(self) -> None:
        """Put gates on the FFNs before the first masked one, too, which only ``sampling`` everywhere uses.

        They are not trained and not selected from: their scores stay open. ``sampling`` calls this itself;
        call it before something wraps the model that must see all modules.
        """
        if self._before and self._open is None:
            with self.off():
                self._open = _install(self.model, self._before, trained=False)

    def evaluating(self) -> AbstractContextManager["Masked"]:
        """Context: the gates without noise, one row for all samples."""
        return self._using(Evaluating())

    def applying(
        self, masks: Mapping[str, Tensor], row_ids: Tensor | Sequence[int] | None = None
    ) -> AbstractContextManager["Masked"]:
        """Context: explicit masks, differentiable. FFNs that are not named run unmasked.

        Args:
            masks: {path: float32 [F] or [G, F]}, G = 1 or the batch size.
            row_ids: the mask row of each token, as in ``sampling``, with any G that all masks share.

        Raises:
            ValueError: an unknown path, or a wrong dtype or shape.
        """
        checked = {}
        widths = {gates.path: gates.width for gates in self._installed.gates}
        for path, mask in masks.items():
            if path not in widths:
                raise ValueError(f"masks names {path!r}, which is not an attached FFN: {', '.join(widths)}")
            if mask.dtype != torch.float32 or mask.dim() not in (1, 2) or mask.shape[-1] != widths[path]:
                raise ValueError(
                    f"the mask of {path} must be float32 [{widths[path]}] or [G, {widths[path]}], got "
                    f"{mask.dtype} {tuple(mask.shape)}"
                )
            checked[path] = mask.reshape(-1, widths[path])
        rows = {len(mask) for mask in checked.values()}
        if row_ids is not None and not rows:
            raise ValueError("row_ids needs masks")
        if row_ids is not None and len(rows) > 1:
            raise ValueError(f"with row_ids all masks must have the same number of rows, got {sorted(rows)}")
        return self._using(Applying(checked, _checked(row_ids, max(rows, default=0))))

    def off(self) -> AbstractContextManager["Masked"]:
        """Context: the untouched model, bit for bit."""
        return self._using(None)

    @contextmanager
    def _using(self, source: Source | None, everywhere: bool = False) -> Iterator["Masked"]:
        if not self._attached:
            raise RuntimeError("this handle is detached; attach the model again")
        given = [(gates, source) for gates in self._installed.gates]
        given += [
            (gates, source if everywhere else None) for gates in (self._open.gates if self._open else ())
        ]
        previous = [gates.source for gates, _ in given]
        for gates, own in given:
            gates.source = own
        try:
            yield self
        finally:
            for (gates, _), former in zip(given, previous, strict=True):
                gates.source = former

    @torch.no_grad()
    def keep_unreached_open(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Exclude the neurons of experts that no token of the forget texts is routed to.

        The scores of experts that got no token become +∞: their gates stay 1, no gradient moves them, and
        they are never selected. Those that an earlier call excluded and that are reached now begin anew.
        Without experts nothing is run.

        Args:
            batches: the forget texts: "input_ids" and "attention_mask", int64 [B, T], padded on the right.
                Where padding is routed to does not matter.
        """
        # Where there are no values, nobody knows.
        if is_fake(next(self.model.parameters())):
            return
        with self.off():
            reached = find_reached_experts(self.model, self.ffns, self.seams, batches)
        scores = self.scores
        for path, found in reached.items():
            by_expert = scores[path].view(len(found), -1)
            by_expert[by_expert.isinf()] = INITIAL_SCORE
            by_expert[~found] = torch.inf

    def select(
        self,
        budget: int | float | None = None,
        threshold: float | None = None,
        method: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> MuteSet:
        """Select the neurons with the lowest scores; their gains are the evaluation gates.

        Args:
            budget: a share of the masked neurons (float in (0, 1], rounded down, at least one neuron) or a
                number (int).
            threshold: instead of a budget, all neurons with σ(score) below it (float in (0, 1)); the paper's
                r is 0.15.
            method, seed: recorded in the mute set.

        Raises:
            ValueError, TypeError: bad arguments, or NaN scores.
            NothingSelectedError: nothing is selected, or every selected gate is fully open, so that muting
                would change nothing.
        """
        neurons = self.selected(budget, threshold)
        selection = {"budget": budget} if threshold is None else {"threshold": threshold}
        return self.mute_set(neurons, "mute", (0.0, 1.0), (method or {}) | {"selection": selection}, seed)

    def selected(
        self, budget: int | float | None = None, threshold: float | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Find what ``select`` puts into a mute set: {path: (indices int32 [n], gains float32 [n])}.

        Takes and raises what ``select`` does; the tensors are on the CPU.
        """
        return select_lowest(self.full_scores(), budget, threshold)

    def mute_set(
        self,
        neurons: Mapping[str, tuple[Tensor, Tensor]],
        mode: str = "mute",
        gain_range: tuple[float, float] = (0.0, 1.0),
        method: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> MuteSet:
        """Make a ``MuteSet`` of explicit neurons.

        Args:
            neurons: {path: (indices [n], integers ascending, gains [n])}.
            gain_range: the lowest and the highest gain that the mode allows.
            method: hyper-parameters, JSON values.

        Raises:
            ValueError: something does not fit the model, or no neuron is given.
        """
        widths = {ffn.path: ffn.width for ffn in self.ffns}
        gain_range = (float(gain_range[0]), float(gain_range[1]))
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
        with self.off():
            sketches, adapter = fingerprint(self.ffns, layers), adapter_fingerprint(self.model)
        return MuteSet(
            layers=layers,
            widths=widths,
            architecture=architecture(self.model),
            fingerprint=sketches,
            mode=mode,
            gain_range=gain_range,
            method=method or {},
            seed=seed,
            adapter=adapter,
        )

    def detach(self) -> None:
        """Put the very original modules and requires_grad flags back. Harmless when called again.

        Raises:
            RuntimeError: something was put around an FFN since; nothing is changed.
        """
        if self._attached:
            self._installed.remove()
            self.recomputation.end()
            if self._open:
                self._open.remove()
            for name, parameter in _name_parameters(self.model):
                if name in self._trainable:
                    parameter.requires_grad_(True)
            self._attached = False

    def __enter__(self) -> "Masked":
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


def _name_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model by names that wrappers put around its modules do not change."""
    for name, parameter in model.named_parameters():
        yield ".".join(part for part in name.split(".") if part not in TRANSPARENT), parameter


def _install(model: nn.Module, ffns: Sequence[FFN], trained: bool = True) -> Installed[TrainableGates]:
    seams = choose_seams(model, ffns)
    return Installed(model, [TrainableGates(ffn, seams[ffn.path], trained) for ffn in ffns], ffns)


def _gathered(score: Any) -> Tensor:
    whole: Tensor = score.detach()
    # FSDP and tensor parallelism shard so.
    if hasattr(score, "full_tensor"):
        whole = score.detach().full_tensor()
    # DeepSpeed's ZeRO-3 marks its parameters so.
    if hasattr(score, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([score]):
            whole = score.detach().clone()
    return whole


def _checked(row_ids: Tensor | Sequence[int] | None, rows: int) -> Tensor | None:
    if row_ids is None:
        return None
    ids = torch.as_tensor(row_ids)
    integers = ids.dtype in (torch.int32, torch.int64)
    if not integers or (ids.numel() and not -1 <= ids.min() <= ids.max() < rows):
        raise ValueError(
            f"row_ids must be integers from -1 to {rows - 1}, got {ids.dtype} {tuple(ids.shape)}"
        )
    return ids


def split_ffns(model: nn.Module, start_layer: int) -> tuple[list[FFN], list[FFN]]:
    """Split the FFNs of a model into those before ``start_layer`` and those from there on.

    Raises:
        ValueError: there is no such layer.
    """
    refuse_wrapped(model)
    found = find_ffns(model)
    if type(start_layer) is not int or not 0 <= start_layer < len(found):
        raise ValueError(
            f"start_layer must be an int from 0 to {len(found) - 1} ({type(model).__name__} has "
            f"{len(found)} FFNs), got {start_layer!r}"
        )
    return found[:start_layer], found[start_layer:]


def attach(model: nn.Module, start_layer: int = 1) -> Masked:
    """Put gates on the neurons of ``model``'s FFNs and freeze everything else.

    Every score starts where its evaluation gate is exactly 1.

    Args:
        model: a causal language model of transformers, dense or with experts, quantised, adapted by PEFT,
            compiled or offloaded; see docs/models.md. This instance is changed in place, and runs once on two
            tokens to see which kernels fit.
        start_layer: the first FFN that gets gates, counted from 0; the paper leaves the first layer alone.

    Returns:
        A ``Masked`` handle.

    Raises:
        ValueError: a model without FFNs that are understood; ``register_family`` describes others.
        RuntimeError: a model that is attached or muted already.
    """
    return Masked(model, start_layer)
