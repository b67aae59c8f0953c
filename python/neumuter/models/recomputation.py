"""Activations that are computed again in the backward pass, instead of kept from the forward pass to it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def decoder_layers(model: nn.Module) -> Sequence[nn.Module]:
    """Find the layers of a decoder: the largest list of modules; the model itself if it has none."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    largest = max(lists, key=lambda found: sum(p.numel() for p in found.parameters()), default=None)
    return [model] if largest is None else list(largest)


class Recomputation:
    """From ``begin`` to ``end`` the layers of ``model`` keep their inputs alone.

    The gradients are the same, for a third more arithmetic, if the backward pass runs under the masks of the
    forward pass. Layers in training mode are left to transformers, which does the same if it is told to.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # Of each layer, the forward that somebody else, such as Accelerate, has put there.
        self._former: list[tuple[nn.Module, Any]] = []

    @property
    def runs(self) -> bool:
        """Whether it has begun."""
        return bool(self._former)

    def begin(self) -> None:
        """Begin. Harmless when called again."""
        if not self.runs:
            for layer in decoder_layers(self.model):
                self._former.append((layer, vars(layer).get("forward")))
                layer.forward = partial(_run, layer, layer.forward)

    def end(self) -> None:
        """Put everything back as it was. Harmless when called again."""
        for layer, former in self._former:
            if former is None:
                del layer.forward
            else:
                layer.forward = former
        self._former = []


def _run(layer: nn.Module, forward: Any, *arguments: Any, **options: Any) -> Any:
    if layer.training or not torch.is_grad_enabled():
        return forward(*arguments, **options)
    # Nothing is random: the noise of gates follows from their places, and dropout is off.
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **options)
