"""Gates on the FFNs of one model instance: put on, proved, watched, and taken off again."""

import threading
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from neumuter.models.families import decoder_of, input_device
from neumuter.models.ffn import FFN, Layout
from neumuter.models.head import GivenStates
from neumuter.models.hooks import CHILD, Gates, seam_module
from neumuter.models.seams import can_run, run_eagerly
from neumuter.types import check_model

Kind = TypeVar("Kind", bound=Gates)

# {weight of a down projection: path of its FFN} of what mutes are folded into for a while. The weights of a
# copy are not in it.
FOLDED = WeakTensorKeyDictionary()
# Where torch.compile, FSDP and activation checkpointing keep the module that they pass everything on to.
TRANSPARENT = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Installed(Generic[Kind]):
    """Gates on the FFNs of one model instance, until ``remove``.

    The constructor runs the model and proves that the mask of each FFN reaches the output. Afterwards every
    forward pass checks that all gates were called, and that no adapter was put around a down projection.
    Compiled code does not count calls; it is checked when it is compiled.

    Args:
        model: what the FFNs are parts of.
        gates: one for each FFN, with the seam where it belongs.
        ffns: the FFNs.

    Raises:
        ValueError: a mask does not reach the output; the message names the FFN.
    """

    def __init__(self, model: nn.Module, gates: Sequence[Kind], ffns: Sequence[FFN]) -> None:
        self.gates = gates
        self._modules = [seam_module(ffn, one.seam) for one, ffn in zip(gates, ffns, strict=True)]
        self._ffns = [ffn.module for ffn in ffns]
        # Of the forward pass that each thread is in.
        self._calls_before: dict[int, list[int]] = {}
        self._hooks: list[RemovableHandle] = []
        try:
            for one, module in zip(gates, self._modules, strict=True):
                one.install(module)
            self._prove(model)
        except BaseException:
            self.remove()
            raise
        decoder = decoder_of(model)
        self._hooks.append(decoder.register_forward_pre_hook(self._begin))
        # Also after an error, or a pass that failed would count as going on for ever.
        self._hooks.append(decoder.register_forward_hook(self._check, always_call=True))

    def _prove(self, model: nn.Module) -> None:
        """Run one row per FFN, whose mask is NaN there: only a mask that reaches the output makes it NaN."""
        if not can_run(model):
            return
        for row, one in enumerate(self.gates):
            one.probe = row
        try:
            ids = torch.zeros(len(self.gates), 1, dtype=torch.int64, device=input_device(model))
            reached = run_eagerly(model, ids).isnan().flatten(1).any(1).tolist()
        finally:
            for one in self.gates:
                one.probe = None
        for one, arrived in zip(self.gates, reached, strict=True):
            if not arrived:
                raise ValueError(
                    f"{one.path} cannot be masked: a mask at its {one.seam} does not reach the output of the "
                    "model, whose forward pass takes another way, as patched FFNs do that read weights "
                    "instead of calling their projections"
                )

    def _begin(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        # The head runs alone.
        if isinstance(vars(module).get("forward"), GivenStates):
            return
        # Compiled code would be compiled again for every number, so it sees flags alone.
        if torch.compiler.is_compiling():
            for one in self.gates:
                one.called = False
            return
        thread = threading.get_ident()
        if not self._calls_before.keys() - {thread}:
            for one in self.gates:
                one.compiled = False
        self._calls_before[thread] = [one.calls for one in self.gates]

    def _check(self, module: nn.Module, arguments: tuple[Any, ...], output: object) -> None:
        """Raise RuntimeError unless every FFN was computed with its gates."""
        if isinstance(vars(module).get("forward"), GivenStates):
            return
        compiling = torch.compiler.is_compiling()
        before = None if compiling else self._calls_before.pop(threading.get_ident(), None)
        # The pass failed: torch gives no output, and raises the error itself.
        if output is None:
            return
        # A replica of DataParallel has gates of its own.
        if getattr(module, "_is_replica", False):
            return
        for number, one in enumerate(self.gates):
            holds = one.called if before is None else one.compiled or one.calls > before[number]
            # An adapter around a down projection calls it, but sees neurons without their mask.
            if not holds or (one.seam == "down" and not self._is_in_place(number)):
                raise RuntimeError(
                    f"the {one.seam} of {one.path} was replaced, wrapped or passed by since this model was "
                    "attached or muted, so that its mask no longer holds as it did. Take the handle off with "
                    "undo() or detach(), change the model, then attach or mute it again"
                )

    def _is_in_place(self, number: int) -> bool:
        """Whether a masked down projection is where it was, but for what passes everything on to it."""
        layout = self.gates[number].layout
        assert isinstance(layout, Layout)
        found = self._ffns[number]._modules.get(layout.down)
        while found is not None and found is not self._modules[number]:
            found = next((m for inner in TRANSPARENT if (m := found._modules.get(inner)) is not None), None)
        return found is not None

    def remove(self) -> None:
        """Put everything back as it was. Harmless when called again.

        Raises:
            RuntimeError: something was put around a seam since; nothing is changed.
        """
        pairs = zip(self.gates, self._modules, strict=True)
        installed = [(gates, module) for gates, module in pairs if getattr(module, CHILD, None) is gates]
        for gates, module in installed:
            if cover := gates.find_cover(module):
                raise RuntimeError(
                    f"the {gates.seam} of {gates.path} cannot be put back: {cover} was put on it since this "
                    "model was attached or muted. Take that off first (Accelerate's hooks by "
                    "accelerate.hooks.remove_hook_from_module(model, recurse=True)), then call undo() or "
                    "detach() again"
                )
        for hook in self._hooks:
            hook.remove()
        for gates, module in installed:
            gates.remove(module)


def refuse_wrapped(model: nn.Module) -> None:
    """Raise RuntimeError if some FFN of ``model`` is already attached or muted."""
    check_model(model)
    for module in model.modules():
        if isinstance(module, Gates):
            raise RuntimeError(
                f"{module.path} already has {type(module).__name__}: this model is attached or muted; "
                "call detach() or undo() on its handle first"
            )
    for parameter in model.parameters():
        if parameter in FOLDED:
            raise RuntimeError(
                f"mutes are folded into {FOLDED[parameter]} for a while: this model is attached or muted; "
                "call undo() on its handle first"
            )
