"""A mute set folded into the weights of a loaded model."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from neumuter.models.families import find_ffns
from neumuter.models.ffn import FFN, by_neuron
from neumuter.models.sharing import Sharing
from neumuter.mutes.matching import matching_ffns
from neumuter.mutes.mute_set import MutedLayer, MuteSet, MuteSource, load_mutes

FOLDABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def fold(model: nn.Module, mutes: MuteSource) -> None:
    """Multiply the gains of a mute set, or of a mute file, into the weights, in place.

    Neuron f's column of the down projection is multiplied by its gain, in float32, and rounded to the
    weight's dtype. The result is an ordinary model; gains of 0 cannot be taken back. Nothing is changed on
    an error.

    FFNs that share the weights of their down projection are folded once, if they have the same muted neurons.

    Raises:
        ValueError: weights that are quantised, hidden in an adapter, sharded, offloaded, or shared with what
            is not muted alike; what ``neumuter.mute`` raises.
    """
    fold_all(find_columns(model, load_mutes(mutes)))


class Columns:
    """The muted columns of one down projection in memory, and what they were when this was made.

    Attributes:
        path: of the FFN.
        parameter: the weight of its down projection.
        originals: [d, n], of n muted neurons.
    """

    def __init__(self, ffn: FFN, layer: MutedLayer) -> None:
        self.path, self.parameter = ffn.path, ffn.down_parameter
        self._order, self._layer = ffn.down_order, layer
        self.originals = self.values

    @property
    def weight(self) -> Tensor:
        """A view of the weight, [d, E, F]."""
        return by_neuron(self.parameter.detach(), self._order)

    @property
    def values(self) -> Tensor:
        """A copy of the columns as they are, [d, n]."""
        weight = self.weight
        return weight[_find_places(weight, self._layer)]

    @property
    def column(self) -> Tensor:
        """A view of the first muted neuron's column, [d, E]: of all experts."""
        weight = self.weight
        return weight[:, :, int(self._layer.indices[0]) % weight.shape[2]]

    @property
    def folded(self) -> Tensor:
        """The originals times the gains, rounded, [d, n]."""
        return _multiply(self.originals, self._layer)

    def write(self, columns: Tensor) -> None:
        """Overwrite the columns with [d, n], rounded to the weight's dtype."""
        weight = self.weight
        weight[_find_places(weight, self._layer)] = columns.to(weight)


def find_columns(model: nn.Module, mutes: MuteSet) -> list[Columns]:
    """Find what to multiply to fold ``mutes``, each weight once.

    Raises:
        ValueError: it cannot be folded in place, see ``fold``.
    """
    ffns = matching_ffns(model, mutes)
    # FSDP may have gathered the weights for a while.
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    for path in mutes.layers:
        weight = ffns[path].down_weight
        if sharded or weight is None or weight.dtype not in FOLDABLE or not _is_view(weight, ffns[path]):
            raise ValueError(
                f"cannot fold into the down projection of {path}: it is quantised, adapted, sharded or "
                "offloaded; dequantise the model or merge its adapters first, gather it on one device, or "
                "use neumuter.mute on the live model"
            )
    return [Columns(ffns[path], mutes.layers[path]) for path in folded_once(model, mutes)]


def fold_all(columns: Sequence[Columns]) -> None:
    """Fold all or, on an error, none."""
    try:
        for one in columns:
            one.write(one.folded)
    except BaseException:
        for one in columns:
            one.write(one.originals)
        raise


def folded_once(model: nn.Module, mutes: MuteSet) -> list[str]:
    """List the FFNs to fold: of those that share the weights of their down projection, the first.

    Raises:
        ValueError: such weights belong to another FFN that is not muted alike, or to something else.
    """
    sharing = Sharing(model)
    ffns = {ffn.path: ffn for ffn in find_ffns(model)}
    owners = {name: path for path, ffn in ffns.items() for name in sharing.names(ffn.module, ffn.down_name)}
    found: list[str] = []
    for path, layer in mutes.layers.items():
        names = sharing.others(ffns[path].module, ffns[path].down_name)
        others = {name: owners.get(name) for name in names}
        for name, other in others.items():
            same = mutes.layers.get(other or "")
            if same is None or not all(map(torch.equal, same, layer)):
                raise ValueError(
                    f"cannot fold into the down projection of {path}: it shares its weights with {name}, "
                    "which the mute set does not mute alike; use neumuter.mute on the live model"
                )
        if not set(others.values()) & set(found):
            found.append(path)
    return found


def fold_columns(weight: Tensor, layer: MutedLayer) -> None:
    """Multiply the columns of a ``MutedLayer`` in ``weight``, a view [d, E, F], by their gains, in place."""
    places = _find_places(weight, layer)
    weight[places] = _multiply(weight[places], layer)


def _find_places(weight: Tensor, layer: MutedLayer) -> tuple[slice, Tensor, Tensor]:
    """Index the columns of a ``MutedLayer`` in ``weight``, a view [d, E, F]."""
    neurons = layer.indices.long().to(weight.device)
    return slice(None), neurons // weight.shape[2], neurons % weight.shape[2]


def _multiply(columns: Tensor, layer: MutedLayer) -> Tensor:
    """Multiply the columns [d, n] of a ``MutedLayer`` by its gains, rounded once."""
    wide = torch.promote_types(columns.dtype, torch.float32)
    return (columns.to(wide) * layer.gains.to(columns.device)).to(columns.dtype)


def _is_view(weight: Tensor, ffn: FFN) -> bool:
    if ffn.adapted:
        return False
    parameter = ffn.down_parameter
    return type(parameter) is torch.nn.Parameter and weight.data_ptr() == parameter.data_ptr()
