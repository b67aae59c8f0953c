"""One FFN of a model: its layout, its sizes, and where its neurons are."""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import activations
from transformers.models.bloom.modeling_bloom import BloomGelu
from transformers.pytorch_utils import Conv1D

# Keys are exact types, because a subclass may compute something else.
ACTIVATION_NAMES = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.AccurateGELUActivation: "gelu_tanh",
    BloomGelu: "gelu_tanh",
    nn.ReLU: "relu",
    activations.ReLUSquaredActivation: "relu2",
}


def activation_name(module: object) -> str | None:
    """Name an activation module as the kernels do: silu, gelu, gelu_tanh, relu or relu2; None for others."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return ACTIVATION_NAMES.get(type(module))


@dataclass(frozen=True)
class Layout:
    """Names of the children that make a module an FFN.

    down: the down projection. up: the up projection, and gate the gate projection of a gated FFN; or gate_up:
    one projection that makes both, the gate in the first half of its output. activation: the module of the
    activation function, if there is one.
    """

    down: str
    up: str | None = None
    gate: str | None = None
    gate_up: str | None = None
    activation: str | None = None

    @property
    def names(self) -> list[str]:
        return [n for n in (self.gate, self.up, self.gate_up, self.down, self.activation) if n]


@dataclass(frozen=True)
class Experts:
    """How the module of a mixture keeps its experts and runs them.

    down: the path of the down projections' weight, [E, d, F], or [E, F, d] if it is transposed. transposed:
    None asks the module, as transformers' experts interface has it. seam: see ``neumuter.models.experts``.
    """

    down: str = "down_proj"
    transposed: bool | None = None
    seam: str = "experts"


@dataclass(frozen=True)
class FFN:
    """One FFN of a model.

    path: of the module in the model. layer: its position among all FFNs of the model, from 0. layout: of a
    dense FFN; the neurons of experts are counted expert after expert. activation: the kernels' name of it,
    None if they do not have it. dtype: of the hidden states. adapted: PEFT adds to the experts' weights.
    """

    path: str
    layer: int
    module: nn.Module
    layout: Layout | Experts
    activation: str | None
    dtype: torch.dtype
    adapted: bool = False

    @property
    def experts(self) -> int:
        """The number of experts; 1 for a dense FFN."""
        return 1 if self.is_dense else self.down_parameter.shape[0]

    @property
    def is_dense(self) -> bool:
        return isinstance(self.layout, Layout)

    @property
    def can_be_split(self) -> bool:
        """Whether masks follow its neurons where tensor parallelism splits them."""
        return self.is_dense or cast(Experts, self.layout).seam == "experts"

    @property
    def down_name(self) -> str:
        """The path in the module of the down projection's weight."""
        return f"{self.layout.down}.weight" if self.is_dense else self.layout.down

    @property
    def down_parameter(self) -> Tensor:
        """The weight of the down projection; a dense one that is quantised may have none."""
        weight: Tensor = attrgetter(self.down_name)(self.module)
        return weight

    @property
    def _is_transposed(self) -> bool:
        """Whether the weight of the down projection has its neurons before its outputs."""
        if isinstance(self.layout, Layout):
            return isinstance(self.down, Conv1D)
        if self.layout.transposed is not None:
            return self.layout.transposed
        return bool(cast(Any, self.module).is_transposed)

    @property
    def down_order(self) -> tuple[int, ...]:
        """The dimensions of the down projection's weight: outputs, experts if it has them, neurons."""
        first = (1, 0) if self._is_transposed else (0, 1)
        return first if self.is_dense else (first[0] + 1, 0, first[1] + 1)

    @property
    def down(self) -> nn.Module:
        """The down projection of a dense FFN, a module."""
        assert self.is_dense
        down: nn.Module = getattr(self.module, self.layout.down)
        return down

    @property
    def width(self) -> int:
        """The number of neurons: F, or E·F for E experts. Read from the projection, not from the config."""
        if self.is_dense:
            return cast(tuple[int, int], features(self.down))[0]
        return self.down_parameter.shape[1 if self._is_transposed else 2] * self.experts

    @property
    def mesh(self) -> DeviceMesh | None:
        """The device mesh over which tensor parallelism splits the neurons, or None."""
        weight: Any = getattr(self.down, "weight", None) if self.is_dense else self.down_parameter
        if "ep" in (getattr(getattr(weight, "device_mesh", None), "mesh_dim_names", None) or ()):
            raise ValueError(
                f"expert parallelism has given processes whole experts of {self.path}, and sends them tokens "
                "without the samples that these belong to: masks cannot follow; use FSDP2 or tensor "
                "parallelism"
            )
        placements = getattr(weight, "placements", ())
        # FSDP splits along dimension 0, and gathers before a forward.
        splits = {number: p.dim for number, p in enumerate(placements) if p.is_shard() and p.dim != 0}
        if not splits:
            return None
        mesh: DeviceMesh = weight.device_mesh
        names, dimensions = mesh.mesh_dim_names or ("",) * mesh.ndim, [*splits.values()]
        over = [names[number] for number in splits]
        known = mesh.ndim == 1 or over == ["tp"]
        if not self.can_be_split or dimensions != [self.down_order[-1]] or not known:
            raise ValueError(
                f"the neurons of {self.path} are split along dimensions {dimensions} over {over}, which "
                "masks cannot follow"
            )
        return mesh if mesh.ndim == 1 else mesh["tp"]

    def own_neurons(self, computed: int) -> slice:
        """Find which neurons this process computes, of which there are ``computed``: tensor parallelism."""
        if self.mesh is None or computed == self.width:
            return slice(0, self.width)
        every = DTensor.from_local(torch.arange(self.width, device=self.device), self.mesh, [Replicate()])
        own = every.redistribute(placements=[Shard(0)]).to_local()
        return slice(int(own[0]), int(own[-1]) + 1)

    @property
    def device(self) -> torch.device:
        """Where the neurons are computed."""
        places = self.down.parameters() if self.is_dense else [self.down_parameter]
        tensors = [*places, *(self.down.buffers() if self.is_dense else [])]
        found = next((t.device for t in tensors if t.device.type != "meta"), None)
        # Accelerate's hook knows where offloaded weights are loaded to.
        hook = getattr(self.down if self.is_dense else self.module, "_hf_hook", None)
        return found or torch.device(getattr(hook, "execution_device", None) or "cpu")

    @property
    def down_weight(self) -> Tensor | None:
        """A view of the down projection's weight as [d, E, F], or None if it is not one plain matrix.

        d is the hidden size, E the number of experts (1 if dense), F the intermediate size. Quantised
        weights, adapters around a projection, and weights that are offloaded have no such view.
        """
        if self.is_dense and (
            not isinstance(self.down, nn.Linear | Conv1D) or hasattr(self.down, "base_layer")
        ):
            return None
        weight = _plain(self.down_parameter)
        return None if weight is None else by_neuron(weight, self.down_order)


def by_neuron(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    """View the weight of a down projection as [d, E, F], given its ``FFN.down_order``."""
    view = weight.permute(order)
    return view if view.dim() == 3 else view[:, None]


def is_plain(weight: Any) -> bool:
    """Whether a weight is a floating-point tensor in memory, of which this process may have a part."""
    usual = type(weight) in (torch.Tensor, nn.Parameter)
    whole: bool = usual and weight.is_floating_point() and not weight.is_meta
    return whole or _is_split(weight)


def _is_split(weight: Any) -> bool:
    # DeepSpeed's ZeRO-3 marks its parameters by the second.
    return hasattr(weight, "full_tensor") or hasattr(weight, "ds_id")


def _plain(weight: Any) -> Tensor | None:
    """A plain weight, detached; gathered if it is sharded; None for anything else."""
    plain: Tensor
    if hasattr(weight, "full_tensor"):
        plain = weight.detach().full_tensor()
        return plain
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            plain = weight.detach().clone()
            return plain
    return weight.detach() if is_plain(weight) else None


def features(module: nn.Module) -> tuple[int, int] | None:
    """Find (inputs, outputs) of a linear projection of any kind, plain, quantised or adapted; else None."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (inputs, outputs) if type(inputs) is int and type(outputs) is int else None
