"""A training step as CUDA graphs: launched at once, where its thousands of kernels would be one by one."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from neumuter.models.devices import overwrite
from neumuter.training.batches import Inputs
from neumuter.training.masked import Masked

# Steps of each size that are taken eagerly before one is captured: libraries set themselves up in these.
WARM_UP = 2

logger = logging.getLogger("neumuter")


class Graphs:
    """Runs ``body`` as a CUDA graph for each size of its inputs.

    ``body``: works on tensors of ``device`` that stay where they are, waits for nothing, and returns nothing.
    """

    def __init__(self, body: Callable[[Inputs], None], device: torch.device) -> None:
        self.body, self.device = body, device
        self._sizes: dict[object, _Size] = {}
        self._pool: Any = None
        self._failed = False

    def run(self, inputs: Inputs) -> None:
        """Run ``body`` on inputs of the CPU: by a graph, or eagerly the first times."""
        # Streams and graphs are of the device that is the current one.
        with torch.accelerator.device_index(self.device.index):
            self._run(inputs)

    def _run(self, inputs: Inputs) -> None:
        key = (*(part.shape for part in inputs.tensors), inputs.split)
        if key not in self._sizes:
            self._sizes[key] = _Size(inputs.to(self.device))
        size = self._sizes[key]
        size.fill(inputs)
        if size.graph is None and size.taken >= WARM_UP and not self._failed:
            try:
                size.graph, self._pool = capture(lambda: self.body(size.inputs), self._pool)
            # Whatever a model does that a graph cannot hold: the eager step is right, too.
            except Exception as error:
                self._failed = True
                logger.warning("Training runs eagerly: a step cannot be captured as a CUDA graph: %s", error)
        if size.graph is not None:
            size.graph()
        elif self._failed:
            self.body(size.inputs)
        else:
            run_aside(lambda: self.body(size.inputs))
        size.taken += 1


class _Size:
    """The inputs of one size, which stay in place; the graph that reads them; and how often it was taken."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.taken = inputs, 0
        self.graph: Callable[[], None] | None = None

    def fill(self, inputs: Inputs) -> None:
        for place, part in zip(self.inputs.tensors, inputs.tensors, strict=True):
            overwrite(place, part)


def run_aside(body: Callable[[], None]) -> None:
    """Run ``body`` on a stream of its own, as what is captured later must have run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        body()
    torch.cuda.current_stream().wait_stream(stream)


def capture(body: Callable[[], None], pool: Any) -> tuple[Callable[[], None], Any]:
    """Capture ``body``, which is not run, as a CUDA graph.

    Returns:
        What runs it, and the memory pool, which the next graph shares.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        body()
    return graph.replay, graph.pool()


def find_obstacle(masked: Masked, shared: bool = False) -> str | None:
    """Find why steps of this model run eagerly, which the log says on a GPU; None if they may be captured.

    shared: several processes share the steps.
    """
    reason = "several processes share it" if shared else _obstacle(masked)
    if reason and any(parameter.is_cuda for parameter in masked.model.parameters()):
        logger.info("Training runs eagerly, not as a CUDA graph: %s.", reason)
    return reason


def _obstacle(masked: Masked) -> str | None:
    model = masked.model
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return f"the model is on several devices ({', '.join(sorted(map(str, devices)))})"
    if {device.type for device in devices} != {"cuda"}:
        return "the model is on no GPU"
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            return "Accelerate's hooks move weights and inputs"
        if isinstance(module, FSDPModule | nn.parallel.DistributedDataParallel):
            return f"{type(module).__name__} takes part in each pass"
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "the parameters are split over processes"
    if "routing_experts" in masked.seams.values():
        return "its experts read on the CPU how many tokens each gets"
    return None
