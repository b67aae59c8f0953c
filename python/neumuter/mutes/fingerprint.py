"""A small sketch of the weights that a mute set acts on, to tell a rounded copy from another model.

For the down projection W [d, F] of one FFN and j < 32: sketch_j = Σ_{i,f} a_j[i] · W[i,f] · b_j[f] with
random signs a, b. The sketch is linear in W and E[sketch_j²] = ‖W‖² (Frobenius), so
‖sketch(W) − sketch(W')‖ / ‖sketch(W)‖ estimates the relative distance ‖W − W'‖ / ‖W‖: a Johnson–Lindenstrauss
embedding with rank-one sign matrices. Rounding weights to bfloat16 or float16 moves them by about 0.2 % or
less, to int8 by about 1 %; weights that were trained apart are about 140 % away. A light fine-tune can stay
within the tolerance: its neurons are still the same neurons.

The muted columns alone have a sketch of their own, since folding them moves the whole matrix too little to
be seen.

An adapter may leave the down projections alone, or move them by less than the tolerance. So some of the
projections that it changes are sketched twice, without it and with it: nearer to the first is the bare base.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from neumuter.models.devices import is_offloaded, is_sharded, load_offloaded
from neumuter.models.families import ADDED_TO_PATHS, unwrapped
from neumuter.models.ffn import FFN, Layout, by_neuron, features, is_plain
from neumuter.models.modes import without_dropout
from neumuter.mutes.mute_set import SKETCHES, MutedLayer
from neumuter_kernels.reference import philox_4x32

TOLERANCE = 0.02
# What the sketches of an FFN are of; the second is there if it has muted neurons.
SKETCHED = ("the down projection's weights", "the muted columns of the down projection")
# "neumuter" in ASCII.
_KEY = (0x6E65756D, 0x75746572)
# The number of projections of an adapter that are sketched.
ADAPTED = 8
# What an adapter changes less than this, relatively, is lost in rounding.
FAINTEST = 1e-4
# Rows of W that are converted to float32 at a time.
_ROWS = 1024


@functools.lru_cache(maxsize=16)
def _signs(size: int, side: int) -> Tensor:
    """±1 float32 [SKETCHES, size], drawn from Philox at the counter (element div 4, j, side, 0)."""
    block = torch.arange((size + 3) // 4)[None]
    words = philox_4x32((block, torch.arange(SKETCHES)[:, None], side, 0), _KEY)
    bits = torch.stack(words, dim=-1).reshape(SKETCHES, -1)[:, :size] & 1
    return 1.0 - 2.0 * bits.float()


def sketch(weight: Tensor, columns: Tensor | None = None) -> list[float]:
    """Sketch ``weight``: 32 floats of 6 significant digits.

    Neuron f of expert e has the sign number e·F + f.

    Args:
        weight: [d, E, F], any floating dtype, any device.
        columns: integers [n]; sketch these neurons alone.
    """
    return sketch_rows(weight.split(_ROWS), weight.shape, columns)[0]


def sketch_rows(
    pieces: Iterable[Tensor], shape: Sequence[int], *selections: Tensor | None
) -> list[list[float]]:
    """Do as ``sketch`` for a weight [d, E, F] that comes in pieces of its rows, in their order.

    Args:
        pieces: [rows, E, F] each.
        shape: (d, E, F).
        selections: ``columns`` for each sketch, or None for all neurons.
    """
    d, experts, width = shape
    left, right = _signs(d, 0), _signs(experts * width, 1)
    chosen = [None if columns is None else columns.long() for columns in selections]
    signs = [right if columns is None else right[:, columns] for columns in chosen]
    products = [torch.zeros(signs_of.shape, dtype=torch.float32) for signs_of in signs]
    start = 0
    for piece in pieces:
        rows = left[:, start : start + len(piece)].to(piece.device)
        start += len(piece)
        for number, columns in enumerate(chosen):
            part = piece
            if columns is not None:
                places = columns.to(piece.device)
                part = piece[:, places // width, places % width]
            products[number] = products[number].to(piece.device) + rows @ part.flatten(1).float()
    return [
        _rounded((product.double() * signs_of.to(product.device)).sum(1))
        for product, signs_of in zip(products, signs, strict=True)
    ]


@torch.no_grad()
def sketch_by(
    project: Callable[[Tensor], Tensor],
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    columns: Tensor | None = None,
) -> list[float]:
    """Sketch a down projection that has no plain weight: W·b_j is what it makes of b_j.

    Exact up to the rounding of ``dtype``, whatever the weight is stored as.

    Args:
        project: the down projection, of inputs [n, width].
        device, dtype: of its inputs.
        columns: integers [n]; sketch these neurons alone.
    """
    right = _signs(width, 1)
    if columns is not None:
        right = right * torch.zeros(width).index_fill(0, columns.long(), 1.0)
    outputs = project(torch.cat([right, torch.zeros(1, width)]).to(device, dtype)).float()
    # The last row is the bias.
    products = outputs[:-1] - outputs[-1]
    left = _signs(products.shape[1], 0).to(products.device)
    return _rounded((left.double() * products).sum(1))


def sketch_through(ffn: FFN, columns: Tensor | None = None) -> list[float]:
    """Sketch the down projection of a dense FFN by running its module."""
    # Adapters may have dropout.
    with without_dropout(ffn.down):
        return sketch_by(ffn.down, ffn.width, ffn.device, ffn.dtype, columns)


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def sketches(ffn: FFN, layer: MutedLayer | None = None) -> dict[str, list[float]]:
    """Sketch an FFN's down projection and, if there is a ``MutedLayer``, its muted columns.

    Returns:
        {what: sketch}.

    Raises:
        ValueError: quantised experts.
    """
    refuse_unsketchable(ffn)
    parts = [sketch_any(ffn)] if layer is None else [sketch_any(ffn), sketch_any(ffn, layer.indices)]
    return dict(zip(SKETCHED, parts, strict=False))


def refuse_unsketchable(ffn: FFN) -> None:
    """Raise ValueError if an FFN's weights cannot be sketched; looks at none of them."""
    if ffn.is_dense:
        return
    weight = ffn.down_parameter
    if not is_plain(weight) and not (is_offloaded(ffn.module) and weight.is_floating_point()):
        raise ValueError(
            f"{ffn.path} has quantised experts, which mute sets cannot be bound to; dequantise it"
        )


def sketch_any(ffn: FFN, columns: Tensor | None = None) -> list[float]:
    """Sketch a down projection by its weight if it has a plain one, else through what it computes."""
    weight = ffn.down_weight
    if weight is None and not ffn.is_dense:
        weight = by_neuron(load_offloaded(ffn.module, ffn.down_name), ffn.down_order)
    return sketch_through(ffn, columns) if weight is None else sketch(weight, columns)


def find_projection(model: nn.Module, path: str) -> FFN | None:
    """Find a projection of a model by its path, as if it were that of an FFN; None if there is none."""
    network = unwrapped(model)
    found = [p for p, _ in network.named_modules() if ADDED_TO_PATHS.sub("", p) == path]
    # The first one has what is put around it.
    if not found or not features(network.get_submodule(found[0])):
        return None
    parent, _, name = found[0].rpartition(".")
    dtype = getattr(network, "dtype", torch.float32)
    return FFN(parent, 0, network.get_submodule(parent), Layout(down=name), None, dtype)


def adapter_fingerprint(model: nn.Module) -> dict[str, list[float]]:
    """Sketch up to ``ADAPTED`` projections that PEFT's adapters change; sharded ones are left out.

    Returns:
        {path: its sketch without the adapters, then with them}; empty if they change none.
    """
    adapted = [
        (ADDED_TO_PATHS.sub("", path), module)
        for path, module in unwrapped(model).named_modules()
        if hasattr(module, "get_base_layer") and features(module.get_base_layer()) and not is_sharded(module)
    ]
    found = {}
    for path, module in adapted[:: -(-len(adapted) // ADAPTED) or 1]:
        whole = find_projection(model, path)
        if whole is not None and whole.down is module:
            alone = FFN(path, 0, module, Layout(down="base_layer"), None, whole.dtype)
            pair = sketch_through(alone), sketch_through(whole)
            if distance(*pair) > FAINTEST:
                found[path] = [*pair[0], *pair[1]]
    return found


def fingerprint(ffns: Iterable[FFN], layers: Mapping[str, MutedLayer]) -> dict[str, list[float]]:
    """Compute {path: the sketches, one after the other} of each ``FFN``, with the muted columns of layers."""
    return {
        ffn.path: [x for part in sketches(ffn, layers.get(ffn.path)).values() for x in part] for ffn in ffns
    }


def distance(expected: Sequence[float], actual: Sequence[float]) -> float:
    """Estimate the relative distance of the weights behind two sketches; 0 means equal."""
    return math.dist(expected, actual) / (math.hypot(*expected) or 1.0)
