"""A mask, and the kernels that take it."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from neumuter_kernels import masked_act, masked_glu


class Mask(NamedTuple):
    """values: float32 [G, width]. row_ids: integers, one row per token, −1 = unmasked; None: G equal runs.

    mesh: the device mesh over which tensor parallelism splits the neurons, or None.
    """

    values: torch.Tensor
    row_ids: torch.Tensor | None = None
    mesh: DeviceMesh | None = None

    def fitting(self, activations: Tensor, width: int) -> Tensor:
        """The values as the kernels need them for ``activations`` of ``width`` neurons of this process."""
        values = self.values
        if self.mesh is not None and values.shape[1] != width:
            # The gradients reach all processes.
            whole = DTensor.from_local(values, self.mesh, [Replicate()])
            values = whole.redistribute(placements=[Shard(1)]).to_local()
        wide = torch.float64 if activations.dtype == torch.float64 else torch.float32
        return values.to(activations.device, wide)


def masked_act_of(hidden: Tensor, activation: str, mask: Mask) -> Tensor:
    """φ(hidden)·mask, [..., F], for a ``Mask``; see ``neumuter_kernels.masked_act``."""
    values = mask.fitting(hidden, hidden.shape[-1])
    return masked_act(hidden, values, mask.row_ids, activation)


def masked_glu_of(gate: Tensor, up: Tensor, activation: str, mask: Mask) -> Tensor:
    """φ(gate)·up·mask, [..., F], for a ``Mask``; see ``neumuter_kernels.masked_glu``."""
    values = mask.fitting(gate, gate.shape[-1])
    return masked_glu(gate, up, values, mask.row_ids, activation)


def masked_packed_of(gate_up: Tensor, activation: str, mask: Mask) -> Tensor:
    """As ``masked_glu_of`` for gate and up in the halves of one tensor, [..., 2F]."""
    values = mask.fitting(gate_up, gate_up.shape[-1] // 2)
    return masked_glu(mask=values, row_ids=mask.row_ids, activation=activation, gate_up=gate_up)
