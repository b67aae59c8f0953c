"""All neurons under masks as one line of ids: layer after layer, each layer's neurons in order."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from neumuter.mutes.mute_set import MuteSet
from neumuter.training.masked import Masked
from neumuter.training.selection import neuron_count
from neumuter.types import check_kind


class Neurons:
    """Neuron ids 0 … count − 1 of a handle's masked layers, in the order of ``masked.scores``.

    Args:
        existing: a mute set that stays in force while another one is sought, or None.

    ``start`` is the mask of the existing set alone, float32 [count]. ``excluded``, bool [count], marks
    neurons that may not be selected: those of the existing set, and those of experts that no forget token
    reaches.
    """

    def __init__(self, masked: Masked, existing: MuteSet | None = None) -> None:
        check_kind("masked", masked, Masked, "the handle that neumuter.attach(model) returns")
        self.masked = masked
        self.widths = {path: score.numel() for path, score in masked.scores.items()}
        self.count = sum(self.widths.values())
        self.device = next(iter(masked.scores.values())).device
        excluded = [score.detach().to(self.device).isinf() for score in masked.scores.values()]
        self.excluded = torch.cat(excluded)
        self.start = torch.ones(self.count, device=self.device)
        if existing is not None:
            refuse_unmasked(existing, self.widths)
            self.start = torch.cat(list(self.masks(existing).values()))
            self.excluded[self.ids(existing)] = True

    def by_layer(self, values: Tensor) -> dict[str, Tensor]:
        """One value per neuron, [count], as views per layer: {path: [F]}."""
        return dict(zip(self.widths, values.split(list(self.widths.values())), strict=True))

    def ids(self, mutes: MuteSet) -> Tensor:
        """The ids of a MuteSet's neurons, int64 [k], ascending."""
        return self.places(mutes).sort().values

    def places(self, mutes: MuteSet) -> Tensor:
        """The ids of a MuteSet's neurons in the order of its layers, int64 [k]."""
        refuse_unmasked(mutes, self.widths)
        by_layer = self.by_layer(torch.arange(self.count, device=self.device))
        found = [by_layer[path][layer.indices.long().to(self.device)] for path, layer in mutes.layers.items()]
        return torch.cat(found)

    @property
    def free(self) -> int:
        """The number of neurons that may be selected."""
        return int((~self.excluded).sum())

    def count_of(self, budget: int | float) -> int:
        """Count the neurons of ``budget``, a share of all neurons (float) or a number (int).

        Raises:
            ValueError: fewer may be selected.
        """
        return refuse_taken(neuron_count(budget, self.count), self.free)

    def masks(self, mutes: MuteSet) -> dict[str, Tensor]:
        """The gains of a MuteSet and of the existing one as masks for ``masked.applying``, {path: [F]}."""
        masks = self.by_layer(self.start.clone())
        for path, layer in mutes.layers.items():
            masks[path][layer.indices.long().to(self.device)] = layer.gains.to(masks[path])
        return masks

    def mute_set(
        self,
        ids: Tensor,
        gains: Tensor,
        mode: str,
        gain_range: tuple[float, float],
        method: dict[str, Any],
        seed: int,
    ) -> MuteSet:
        """The MuteSet of the neurons ``ids`` (int64 [k], any order, each once) with ``gains`` [k].

        Raises ValueError if there is no neuron in it.
        """
        mask, selected = torch.ones(2, self.count, device=self.device)
        mask[ids], selected[ids] = gains.to(mask), 0.0
        masks, layers = self.by_layer(mask), {}
        for path, chosen in self.by_layer(selected).items():
            indices = (chosen == 0).nonzero().flatten()
            layers[path] = (indices, masks[path][indices])
        return self.masked.mute_set(layers, mode=mode, gain_range=gain_range, method=method, seed=seed)


def refuse_unmasked(mutes: MuteSet, widths: Mapping[str, int]) -> None:
    """Raise ValueError unless all neurons of an earlier request are in masked FFNs, {path: width}."""
    if other := [path for path in mutes.layers if widths.get(path) != mutes.widths[path]]:
        raise ValueError(
            f"an earlier request has neurons in {', '.join(other)}, which is not masked here or has another "
            "width: attach from the same start_layer on, to the same model"
        )


def refuse_taken(count: int, free: int) -> int:
    """Return the number of neurons that a budget asks for, if so many are free.

    Raises:
        ValueError: fewer are.
    """
    if count > free:
        raise ValueError(
            f"budget asks for {count} neurons, but only {free} may be selected: the others belong to the "
            "existing mute set, or to experts that no forget text reaches"
        )
    return count
