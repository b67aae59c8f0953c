"""Gates on the FFNs of one model instance, and the way back."""

from collections.abc import Sequence
from typing import Generic, TypeVar

from torch import nn

from neumuter.models.hooks import CHILD, Gates

Kind = TypeVar("Kind", bound=Gates)


class Installed(Generic[Kind]):
    """Gates on the FFNs of one model instance, until ``remove``."""

    def __init__(self, gates: Sequence[Kind], modules: Sequence[nn.Module]) -> None:
        self.gates, self._modules = gates, modules
        try:
            for one, module in zip(gates, modules, strict=True):
                one.install(module)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Put everything back as it was. Harmless when called again."""
        for gates, module in zip(self.gates, self._modules, strict=True):
            if getattr(module, CHILD, None) is gates:
                gates.remove(module)


def refuse_wrapped(model: nn.Module) -> None:
    """Raise RuntimeError if some FFN of ``model`` is already attached or muted."""
    for module in model.modules():
        if isinstance(module, Gates):
            raise RuntimeError(
                f"{module.path} already has {type(module).__name__}: this model is attached or muted; "
                "call detach() or undo() on its handle first"
            )
