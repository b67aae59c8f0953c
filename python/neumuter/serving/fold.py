"""A mute set folded into the weights of a loaded model."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from neumuter.models.families import find_ffns
from neumuter.models.ffn import FFN
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
    mutes = load_mutes(mutes)
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
    for path in folded_once(model, mutes):
        fold_columns(cast(Tensor, ffns[path].down_weight), mutes.layers[path])


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
    neurons = layer.indices.long().to(weight.device)
    expert, column = neurons // weight.shape[2], neurons % weight.shape[2]
    wide = torch.promote_types(weight.dtype, torch.float32)
    products = weight[:, expert, column].to(wide) * layer.gains.to(weight.device)
    weight[:, expert, column] = products.to(weight.dtype)


def _is_view(weight: Tensor, ffn: FFN) -> bool:
    if ffn.adapted:
        return False
    parameter = ffn.down_parameter
    return type(parameter) is torch.nn.Parameter and weight.data_ptr() == parameter.data_ptr()
