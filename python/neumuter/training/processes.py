"""The processes of one job: which samples each computes, and what they make of it together.

All run the same program on the same texts. Each computes its share of the samples of a step; sums over the
tokens of all shares are reduced, so that it makes no difference how many processes there are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from neumuter.models.families import unwrapped
from neumuter.models.quantised import refuse_quantised

Value = TypeVar("Value")
# Characters of a differing argument that an error shows.
SHOWN = 60
# An error of one process is raised in the others as the first of these that it is.
RAISED = (FileExistsError, FileNotFoundError, OSError, ImportError, TypeError, ValueError, RuntimeError)


class Processes:
    """The processes that share the samples of a step: ``count`` of them, of which this one is ``rank``.

    mesh: has one dimension, and these processes; None: all of the process group.
    """

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self._group = mesh.get_group() if mesh else None
        self.rank, self.count = dist.get_rank(self._group), dist.get_world_size(self._group)
        # How many sums there were.
        self.transfers = 0

    def share(self, items: Sequence[Value]) -> tuple[list[Value], int]:
        """Deal ``items`` out in turn.

        Returns:
            Those of this process, and how many of them count. The first item fills up where others have one
            more, because all processes have to run equally many forward passes.
        """
        own = list(items[self.rank :: self.count])
        most = -(-len(items) // self.count)
        return own + list(items[:1]) * (most - len(own)), len(own)

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum float tensors over the processes, in one transfer; the results are new tensors."""
        flat = torch.cat([tensor.detach().flatten().to(tensors[0]) for tensor in tensors])
        self.transfers += 1
        dist.all_reduce(flat, group=self._group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(one).to(one) for part, one in zip(parts, tensors, strict=True)]


def find_processes(model: nn.Module) -> Processes | None:
    """Find the processes that share samples for ``model``: those of the process group; None if alone.

    Where tensor parallelism splits the layers, its processes need the same samples. They are shared among
    those that FSDP2 splits over, if there are any.

    Raises:
        ValueError: the layers are split over some of the processes; or the weights are quantised so that
            several processes cannot have them.
    """
    if not are_many():
        return None
    sharded, mesh = _find_split(model)
    refuse_quantised(getattr(unwrapped(model), "config", None), split=sharded or mesh is not None)
    if mesh is None:
        return Processes()
    names = mesh.mesh_dim_names or ()
    if sharded and "tp" not in names:
        return Processes()
    if mesh.size() != dist.get_world_size() or mesh.ndim != 1 + sharded:
        raise ValueError(
            f"tensor parallelism splits the model over a mesh of {tuple(mesh.shape)} processes, but the "
            f"process group has {dist.get_world_size()}: split it over all of them, by tensor parallelism "
            "alone or with FSDP2 in one more dimension"
        )
    return Processes(mesh[next(name for name in names if name != "tp")]) if sharded else None


def describe_layout(model: nn.Module) -> str:
    """Say over how many processes ``model`` is laid out, and how, such as "2 processes (fsdp)"."""
    if not are_many():
        return "1 process"
    sharded, mesh = _find_split(model)
    parallel = mesh is not None and (not sharded or "tp" in (mesh.mesh_dim_names or ()))
    layout = "+".join(["fsdp"] * sharded + ["tp"] * parallel) or "ddp"
    return f"{dist.get_world_size()} processes ({layout})"


def _find_split(model: nn.Module) -> tuple[bool, DeviceMesh | None]:
    """Whether FSDP2 splits ``model``; and the mesh over which it or tensor parallelism splits the weights."""
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    # Of FSDP2 with tensor parallelism, some are split by FSDP2 alone.
    parts = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    split = max(parts, key=lambda parameter: parameter.device_mesh.ndim, default=None)
    return sharded, None if split is None else split.device_mesh


def check_same(given: Callable[[], Mapping[str, object]]) -> None:
    """Raise ValueError, in all processes, if something that is ``given`` is not the same in all of them."""
    if not are_many():
        return
    found = gather({name: repr(value) for name, value in given().items()})
    for rank, other in enumerate(found):
        for name, value in found[0].items():
            if other[name] != value:
                raise ValueError(
                    f"{name} must be the same in all processes, but is {value:.{SHOWN}} in process 0 and "
                    f"{other[name]:.{SHOWN}} in process {rank}"
                )


@contextmanager
def failing_together() -> Iterator[None]:
    """Context: an error of one process is raised in all of them, when all have come to the end.

    Where a process would wait for one that has failed, nobody would learn why. Inside, no process may wait
    for another.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    told = own and (next((kind for kind in RAISED if isinstance(own, kind)), RuntimeError), str(own))
    found = gather(told)
    if own:
        raise own
    for rank, other in enumerate(found):
        if other:
            kind, message = other
            raise kind(f"{message} (in process {rank})")


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return not are_many() or dist.get_rank() == 0


def agree(value: Value) -> Value:
    """Return what the first process gives, in all processes: a tensor, or what can be pickled."""
    if not are_many():
        return value
    if isinstance(value, torch.Tensor):
        # Each process keeps it on its own device.
        tensor = value.detach().clone()
        dist.broadcast(tensor, src=0)
        return cast(Value, tensor)
    held: list[Any] = [value]
    dist.broadcast_object_list(held, src=0)
    return cast(Value, held[0])


def find_most(number: int) -> int:
    """Return the largest of the numbers that the processes give, in all of them."""
    return max(gather(number))


def gather(value: Value) -> list[Value]:
    """Return what each process gives, in their order, in all of them: what can be pickled."""
    if not are_many():
        return [value]
    found = [value] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def are_many() -> bool:
    """Whether several processes make up the process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
