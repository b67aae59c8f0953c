"""Mute sets on models: applied to a live model, or folded into its weights."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from neumuter.models.families import FFN, find_ffns, unwrapped
from neumuter.models.hooks import Gates, Installed, Mask, masked_act_of, refuse_wrapped, seam_module
from neumuter.models.seams import choose_seams
from neumuter.mutes.fingerprint import SKETCHES, TOLERANCE, distance, fingerprint, sketches
from neumuter.mutes.mute_set import MutedLayer, MuteSet, MuteSource

FEW = 1 << 18  # activations, for which a product of PyTorch's takes less time than calling a kernel
FOLDABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class MuteMismatchError(ValueError):
    """A mute set that was made for another model; the message lists what differs."""


def architecture(model: nn.Module) -> dict[str, str]:
    """{"class": the model's class name, "model_type": that of its config, "none" without one}."""
    model = unwrapped(model)
    own = next(
        c for c in type(model).__mro__ if not c.__module__.startswith("torch.distributed")
    )  # not FSDP's
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return {"class": own.__name__, "model_type": model_type or "none"}


def matching_ffns(model: nn.Module, mutes: MuteSet) -> dict[str, FFN]:
    """The FFNs of ``model`` that ``mutes`` was made on, {path: FFN}.

    Raises MuteMismatchError if the architecture, a module path, an intermediate size or the weights differ
    (see ``neumuter.mutes.fingerprint``), and RuntimeError if the model is attached or muted.
    """
    refuse_wrapped(model)
    return fitting_ffns(model, mutes)


def fitting_ffns(model: nn.Module, mutes: MuteSet) -> dict[str, FFN]:
    """As ``matching_ffns``, of a model that may have gates, as long as none of them is in force."""
    ffns = {ffn.path: ffn for ffn in find_ffns(model)}
    refuse_other(structure_differs(model, ffns, mutes))
    refuse_other([text for path in mutes.widths for text in weights_differ(ffns[path], mutes)])
    return {path: ffns[path] for path in mutes.widths}


def structure_differs(model: nn.Module, ffns: Mapping[str, FFN], mutes: MuteSet) -> list[str]:
    """What differs, a list of str: the architecture of ``model``, and the paths and widths of ``ffns``."""
    differences = [
        f"{key}: mute set {mutes.architecture[key]}, model {value}"
        for key, value in architecture(model).items()
        if mutes.architecture[key] != value
    ]
    for path, width in mutes.widths.items():
        if path not in ffns:
            differences.append(f"{path}: mute set {width} neurons, model has no FFN there")
        elif ffns[path].width != width:
            differences.append(f"{path}: mute set {width} neurons, model {ffns[path].width}")
    return differences


def weights_differ(ffn: FFN, mutes: MuteSet) -> list[str]:
    """Whether the weights of an FFN are others than ``mutes`` was made for, a list of str."""
    differences = []
    for number, (what, actual) in enumerate(sketches(ffn, mutes.layers.get(ffn.path)).items()):
        expected = mutes.fingerprint[ffn.path][number * SKETCHES : (number + 1) * SKETCHES]
        apart = distance(expected, actual)
        if not apart <= TOLERANCE:
            differences.append(
                f"{ffn.path}: {what} differ by {apart:.1%} (up to {TOLERANCE:.0%} is rounding); another "
                "checkpoint, or mutes folded already?"
            )
    return differences


def refuse_other(differences: list[str]) -> None:
    """Raise MuteMismatchError if there are any."""
    if differences:
        listed = "\n  ".join(differences[:8] + ["..."] * (len(differences) > 8))
        raise MuteMismatchError(f"this mute set was made for another model:\n  {listed}")


class ConstantGates(Gates):
    """Neurons multiplied by constants."""

    gains: Tensor

    def __init__(self, ffn: FFN, seam: str, layer: MutedLayer) -> None:
        super().__init__(ffn, seam)
        gains = torch.ones(self.width)
        gains[layer.indices.long()] = layer.gains
        self.register_buffer("gains", gains.to(ffn.device), persistent=False)
        self.on = True

    def install(self, module: nn.Module) -> None:
        super().install(module)
        if self.seam == "down" and self.mesh is None:
            module.forward = functools.partial(_muted, module, self)

    def mask(self, hidden_states: Tensor) -> Mask | None:
        return Mask(self.gains[None]) if self.on else None


def _muted(down: nn.Module, gates: ConstantGates, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
    """The forward of a muted down projection. Little Python: between layers the caches are cold."""
    if gates.on:
        gains = gates._buffers["gains"]
        assert gains is not None
        plain = not hidden.requires_grad and hidden.get_device() == gains.get_device()
        if plain and hidden.numel() <= FEW and not torch.compiler.is_compiling():
            if hidden.dtype == torch.float32:
                hidden = hidden * gains
            else:
                hidden = torch.mul(hidden, gains, out=torch.empty_like(hidden))  # rounded once
        else:
            hidden = masked_act_of(hidden, "identity", Mask(gains[None]))
    if gates.former is None:
        return type(down).forward(down, hidden, *arguments, **options)
    return gates.former(hidden, *arguments, **options)


class Muted:
    """A mute set on a live model, made by ``mute``. As a context manager it undoes itself at the end."""

    def __init__(self, model: nn.Module, mutes: MuteSet) -> None:
        self.model, self.mutes = model, mutes
        matching = matching_ffns(model, mutes)
        ffns = [matching[path] for path in mutes.layers]
        seams = choose_seams(model, ffns, constant=True)
        self._installed = Installed(
            [ConstantGates(ffn, seams[ffn.path], mutes.layers[ffn.path]) for ffn in ffns],
            [seam_module(ffn, seams[ffn.path]) for ffn in ffns],
        )

    @contextmanager
    def off(self) -> Iterator["Muted"]:
        """Context: the untouched model, bit for bit."""
        for gates in self._installed.gates:
            gates.on = False
        try:
            yield self
        finally:
            for gates in self._installed.gates:
                gates.on = True

    def undo(self) -> None:
        """Put the very original modules back. Harmless when called again."""
        self._installed.remove()

    def __enter__(self) -> "Muted":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def loaded(mutes: MuteSource) -> MuteSet:
    """A ``MuteSet``, given that or the path of a mute file."""
    return mutes if isinstance(mutes, MuteSet) else MuteSet.load(mutes)


def combine(model: nn.Module, sets: Iterable[MuteSource]) -> MuteSet:
    """The union of ``MuteSet``s, or of the mute files at these paths, as a new ``MuteSet`` of ``model``.

    A neuron that several of them mute gets the lowest of their gains. The mode is "modulate" if one of them
    has it. Its ``method`` lists theirs. Raises ValueError if there is none, and the errors of ``mute``.
    """
    found = [loaded(mutes) for mutes in sets]
    if not found:
        raise ValueError("sets must hold at least one mute set")
    gains: dict[str, dict[int, float]] = {}
    for mutes in found:
        matching_ffns(model, mutes)
        for path, layer in mutes.layers.items():
            known = gains.setdefault(path, {})
            for neuron, gain in zip(layer.indices.tolist(), layer.gains.tolist(), strict=True):
                known[neuron] = min(gain, known.get(neuron, gain))
    return _remade(model, found, gains, {"combined": [mutes.method for mutes in found]})


def without(model: nn.Module, mutes: MuteSource, others: MuteSource) -> MuteSet:
    """``mutes`` without the neurons that ``others`` mutes, as a new ``MuteSet`` of ``model``.

    Both are MuteSets or paths of mute files. Raises ValueError if nothing is left, and what ``mute`` raises.
    """
    mutes, others = loaded(mutes), loaded(others)
    for one in (mutes, others):
        matching_ffns(model, one)
    gains = {}
    for path, layer in mutes.layers.items():
        known = dict(zip(layer.indices.tolist(), layer.gains.tolist(), strict=True))
        removed = set(others.layers[path].indices.tolist()) if path in others.layers else set()
        gains[path] = {neuron: gain for neuron, gain in known.items() if neuron not in removed}
    return _remade(model, [mutes], gains, {"without": others.method, "of": mutes.method})


def _remade(
    model: nn.Module,
    sets: Sequence[MuteSet],
    gains: Mapping[str, Mapping[int, float]],
    method: dict[str, Any],
) -> MuteSet:
    """A MuteSet of {path: {neuron: gain}} over all FFNs that ``sets`` masked."""
    ffns = [ffn for ffn in find_ffns(model) if any(ffn.path in mutes.widths for mutes in sets)]
    layers = {}
    for ffn in ffns:
        if known := gains.get(ffn.path):
            neurons = sorted(known)
            layers[ffn.path] = MutedLayer(
                torch.tensor(neurons, dtype=torch.int32), torch.tensor([known[n] for n in neurons])
            )
    low, high = zip(*(mutes.gain_range for mutes in sets), strict=True)
    return MuteSet(
        layers=layers,
        widths={ffn.path: ffn.width for ffn in ffns},
        architecture=architecture(model),
        fingerprint=fingerprint(ffns, layers),
        mode="modulate" if any(mutes.mode == "modulate" for mutes in sets) else "mute",
        gain_range=(min(low), max(high)),
        method=method,
    )


def mute(model: nn.Module, mutes: MuteSource) -> Muted:
    """Apply a ``MuteSet``, or the mute file at that path, to a live model; returns a ``Muted`` handle.

    Only FFNs with muted neurons are touched, in this model instance only, at the input of their down
    projection. The weights and the state_dict stay the same, so ``save_pretrained`` saves the model without
    mutes: use ``fold`` for that.

    Raises MuteMismatchError if it was made for another model, MuteFileError for a bad file, and
    RuntimeError if the model is attached or muted already.
    """
    return Muted(model, loaded(mutes))


@torch.no_grad()
def fold(model: nn.Module, mutes: MuteSource) -> None:
    """Multiply the gains of a ``MuteSet``, or of the mute file at that path, into the weights, in place.

    Neuron f's column of the down projection is multiplied by its gain, in float32, and rounded to the
    weight's dtype. The result is an ordinary model; gains of 0 cannot be taken back. Nothing is changed on
    an error: those of ``mute``, and ValueError for weights that are quantised or hidden in an adapter.
    """
    mutes = loaded(mutes)
    ffns = matching_ffns(model, mutes)
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())  # or whole for a while
    for path in mutes.layers:
        weight = ffns[path].down_weight
        if sharded or weight is None or weight.dtype not in FOLDABLE or not _is_view(weight, ffns[path]):
            raise ValueError(
                f"cannot fold into the down projection of {path}: it is quantised, adapted, sharded or "
                "offloaded; dequantise the model or merge its adapters first, gather it on one device, or "
                "use neumuter.mute on the live model"
            )
    for path, layer in mutes.layers.items():
        fold_columns(cast(Tensor, ffns[path].down_weight), layer)


def fold_columns(weight: Tensor, layer: MutedLayer) -> None:
    """Multiply the columns of a ``MutedLayer`` in ``weight`` [d, E, F], a view, by their gains, in place."""
    neurons = layer.indices.long().to(weight.device)
    expert, column = neurons // weight.shape[2], neurons % weight.shape[2]
    wide = torch.promote_types(weight.dtype, torch.float32)
    products = weight[:, expert, column].to(wide) * layer.gains.to(weight.device)
    weight[:, expert, column] = products.to(weight.dtype)


def _is_view(weight: Tensor, ffn: FFN) -> bool:
    parameters = [ffn.down.weight] if ffn.layout else [ffn.module.down_proj]
    return any(weight.data_ptr() == p.data_ptr() for p in parameters if type(p) is torch.nn.Parameter)
