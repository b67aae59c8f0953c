"""A mute set folded into the weights of a live model for a while."""

from collections.abc import Sequence

import torch
from torch import nn

from neumuter.models.families import input_device
from neumuter.models.installed import FOLDED
from neumuter.models.seams import can_run, run_eagerly
from neumuter.mutes.mute_set import MuteSet
from neumuter.serving.fold import Columns, find_columns, fold_all


class Folded:
    """The muted columns of a model's down projections, multiplied by their gains until ``remove``.

    What they were is kept. Nothing is added to the model, so that compiled code and captured graphs see it.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, mutes: MuteSet) -> None:
        self.model, self._on = model, False
        self.columns = find_columns(model, mutes)
        _prove(model, self.columns)
        self.turn(True)
        for one in self.columns:
            FOLDED[one.parameter] = one.path

    @torch.no_grad()
    def turn(self, on: bool) -> None:
        """Fold, or put the originals back; on an error, nothing is changed.

        Raises:
            RuntimeError: the originals cannot be put back, since the weights were changed or replaced.
        """
        if on and not self._on:
            for one in self.columns:
                one.originals = one.values
            fold_all(self.columns)
        elif self._on and not on:
            present = {id(parameter) for parameter in self.model.parameters()}
            for one in self.columns:
                _refuse_changed(one, id(one.parameter) in present)
            for one in self.columns:
                one.write(one.originals)
        self._on = on

    def remove(self) -> None:
        """Put the originals back, for good. Harmless when called again."""
        self.turn(False)
        for one in self.columns:
            FOLDED.pop(one.parameter, None)
        self.columns = []


def _prove(model: nn.Module, columns: Sequence[Columns]) -> None:
    """Run the model once per weight, with NaN in a muted column: only a weight that is read shows it."""
    if not can_run(model):
        return
    ids = torch.zeros(1, 1, dtype=torch.int64, device=input_device(model))
    for one in columns:
        # A token reaches few experts, so the column is changed in all of them.
        column = one.column
        before = column.clone()
        try:
            column.fill_(torch.nan)
            reached = bool(run_eagerly(model, ids).isnan().any())
        finally:
            column.copy_(before)
        if not reached:
            raise ValueError(
                f"folding into the down projection of {one.path} has no effect: its weight does not reach "
                "the output of the model, which computes with a copy of it or takes another way; use "
                "how='live'"
            )


def _refuse_changed(one: Columns, is_present: bool) -> None:
    """Raise RuntimeError unless the columns are as folding left them, or have their original values again."""
    if not is_present or one.parameter.is_meta:
        raise RuntimeError(
            f"the mutes cannot be taken off: the weight of the down projection of {one.path} was replaced or "
            "taken out of memory after they were folded into it. Load the weights anew"
        )
    now = one.values
    if not any(torch.equal(now, was.to(now)) for was in (one.folded, one.originals)):
        raise RuntimeError(
            f"the mutes cannot be taken off: muted columns of the down projection of {one.path} were changed "
            "after they were folded, by training or by merging an adapter, and nothing says what they would "
            "be without mutes. Load the weights anew"
        )
