"""Gates with trainable scores, and what makes masks of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neumuter.models.ffn import FFN
from neumuter.models.hooks import Gates
from neumuter.models.mask import Mask
from neumuter_kernels import hard_concrete

STRETCH = (-0.1, 1.1)
TEMPERATURE = 1 / 3
# The evaluation gate σ(s)·(ζ − γ) + γ is exactly open, 1, at σ(s) = (1 − γ)/(ζ − γ).
OPEN = (1 - STRETCH[0]) / (STRETCH[1] - STRETCH[0])
INITIAL_SCORE = math.log(OPEN / (1 - OPEN))


@dataclass(frozen=True)
class Sampling:
    """Samples of the gates, a row for each of ``sample_ids``, int64 [B]."""

    seed: int
    # A tensor, because torch.compile would compile again for every int.
    step: torch.Tensor
    sample_ids: torch.Tensor
    row_ids: torch.Tensor | None

    def mask(self, gates: "TrainableGates", hidden_states: Tensor) -> Mask:
        _refuse_frozen(gates)
        rows = self.sample_ids.shape[0]
        _check_rows(rows, self.row_ids, hidden_states, "sample_ids", one_for_all=False)
        device = gates.scores.device
        step, ids = self.step.to(device), self.sample_ids.to(device)
        # They are made here, not once per step, so that activation checkpointing recomputes them.
        values = hard_concrete(
            gates.scores, rows, self.seed, step, gates.layer, ids, TEMPERATURE, STRETCH, training=True
        )
        return Mask(values, _moved(self.row_ids, hidden_states.device))


@dataclass(frozen=True)
class Evaluating:
    """The gates without noise, one row."""

    def mask(self, gates: "TrainableGates", hidden_states: Tensor) -> Mask:
        return Mask(
            hard_concrete(gates.scores, 1, 0, 0, gates.layer, None, TEMPERATURE, STRETCH, training=False)
        )


@dataclass(frozen=True)
class Applying:
    """The masks that were given."""

    masks: dict[str, Tensor]
    row_ids: torch.Tensor | None

    def mask(self, gates: "TrainableGates", hidden_states: Tensor) -> Mask | None:
        mask = self.masks.get(gates.path)
        if mask is None:
            return None
        _check_rows(mask.shape[0], self.row_ids, hidden_states, f"the mask of {gates.path}")
        return Mask(mask.to(hidden_states.device), _moved(self.row_ids, hidden_states.device))


def _refuse_frozen(gates: "TrainableGates") -> None:
    if gates.trained and torch.is_grad_enabled() and not gates.scores.requires_grad:
        raise RuntimeError(
            f"the scores of {gates.path} are frozen, so training would change nothing. PEFT freezes all "
            "parameters of a model: detach, wrap the model, then attach it"
        )


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _check_rows(
    rows: int, row_ids: Tensor | None, hidden_states: Tensor, name: str, one_for_all: bool = True
) -> None:
    tokens = hidden_states.shape[:-1].numel()
    if row_ids is not None:
        if row_ids.numel() != tokens:
            raise ValueError(
                f"row_ids has {row_ids.numel()} entries, but the hidden states are "
                f"{tuple(hidden_states.shape)}: there must be one for each of {tokens} tokens"
            )
    elif (rows > 1 or not one_for_all) and (
        hidden_states.shape[0] != rows if hidden_states.dim() == 3 else tokens % rows
    ):
        raise ValueError(
            f"{name} has {rows} rows, but the hidden states are {tuple(hidden_states.shape)}: there must be "
            "one row per sample of a batch [B, S, d]"
        )


def sample_at_once(
    gates: Sequence["TrainableGates"], seed: int, step: Tensor, sample_ids: Tensor
) -> dict[str, Tensor]:
    """Sample the gates of all FFNs by one op for each run of layers of one width: {path: [rows, width]}.

    The bits are those that ``Sampling`` gives each FFN when it runs.
    """
    runs: list[list[TrainableGates]] = []
    for one in gates:
        _refuse_frozen(one)
        last = runs[-1][-1] if runs else None
        follows = last and (last.layer + 1, last.width, last.scores.device) == (
            one.layer, one.width, one.scores.device,
        )  # fmt: skip
        if follows:
            runs[-1].append(one)
        else:
            runs.append([one])
    masks: dict[str, Tensor] = {}
    for run in runs:
        scores, rows = torch.stack([one.scores for one in run]), len(sample_ids)
        place, ids = step.to(scores.device), sample_ids.to(scores.device)
        values = hard_concrete(
            scores, rows, seed, place, run[0].layer, ids, TEMPERATURE, STRETCH, training=True
        )
        masks |= {one.path: mask for one, mask in zip(run, values.unbind(), strict=True)}
    return masks


Source = Sampling | Evaluating | Applying


class TrainableGates(Gates):
    """A score per neuron, a Parameter if it is ``trained``. ``source`` says which mask it makes of them."""

    scores: torch.Tensor

    def __init__(self, ffn: FFN, seam: str, trained: bool = True) -> None:
        super().__init__(ffn, seam)
        self.trained = trained
        scores = torch.full((self.width,), INITIAL_SCORE, device=ffn.device)
        if trained:
            self.scores = nn.Parameter(scores)
        else:
            self.register_buffer("scores", scores, persistent=False)
        self.source: Source | None = None

    def mask(self, hidden_states: Tensor) -> Mask | None:
        return None if self.source is None else self.source.mask(self, hidden_states)
