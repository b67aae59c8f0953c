"""In each worker of vLLM: which tokens use which set, and that a set fits the model.

Everything here is put on the objects of one worker, by ``hooks`` through vLLM's collective_rpc: where that
fails, the server does not start.
"""

import copy
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from neumuter.integrations.vllm.check import CHECK, check_layer
from neumuter.integrations.vllm.folder import digest_of
from neumuter.integrations.vllm.rows import Rows
from neumuter.integrations.vllm.settings import SHARE
from neumuter.integrations.vllm.stamp import NO_SET, STAMP, data_of
from neumuter.integrations.vllm.support import refuse_features
from neumuter.models.families import find_ffns
from neumuter.mutes.fingerprint import sketch_by
from neumuter.mutes.matching import sketches_differ, structure_differs
from neumuter.mutes.mute_set import MutedLayer, MuteSet

# What the front end calls on a worker to compare a set, by name: an attribute of the worker.
COMPARE = "compare_mute_set"
# How far 4-bit weights are from those that they were made of: up to 12 %; another model's are 140 % away.
QUANTISED = 0.15
# Sets that a worker keeps parsed; others are read and compared again when a request brings them.
MOST_KEPT = 1024
# The attribute of a worker that holds its ``WorkerMutes``.
MUTES = "neumuter_mutes"


def attach(wrapper: Any, share: float) -> None:
    """Put mute sets into a worker whose model is loaded, and not yet compiled.

    Args:
        wrapper: vLLM's WorkerWrapperBase, or the worker itself.
        share: the largest part of the model's neurons that a set may mute.

    Raises:
        ValueError: vLLM has the model in a form, or runs it with a feature, that cannot be muted.
    """
    worker = getattr(wrapper, "worker", wrapper)
    mutes = WorkerMutes(worker.model_runner, worker.vllm_config, share)
    mutes.hook(worker.model_runner, bool(worker.use_v2_model_runner))
    setattr(worker, MUTES, mutes)
    setattr(worker, COMPARE, mutes.compare)


def check(wrapper: Any) -> None:
    """Prove for each layer that sets mute it; see ``neumuter.integrations.vllm.check``.

    Raises:
        RuntimeError: they do not.
    """
    _mutes_of(wrapper).check()


def admit(wrapper: Any) -> None:
    """Let requests come, from now on none without a word about its set."""
    _mutes_of(wrapper).ready = True


def _mutes_of(wrapper: Any) -> "WorkerMutes":
    mutes: WorkerMutes = getattr(getattr(wrapper, "worker", wrapper), MUTES)
    return mutes


class ShardOfSet(NamedTuple):
    """A set in this worker: the digest of its file, and its neurons among this worker's, for each FFN."""

    digest: str
    layers: tuple[MutedLayer | None, ...]


class Down(NamedTuple):
    """A down projection: vLLM's linear layer, how it computes unmuted, and which neurons it holds."""

    linear: Any
    apply: Callable[..., Tensor]
    start: int
    stop: int


class _Current:
    """The rows that the op reads. A process may have several engines; each sets its own before it runs."""

    rows: Rows | None = None


@torch.library.custom_op("neumuter_vllm::mute", mutates_args={"hidden"})
def mute_hidden(hidden: Tensor, layer: int) -> None:
    """Mute activations of one layer in place, by the rows of the step.

    An op of its own keeps what changes between steps and processes out of vLLM's compiled code, which it
    caches on disk.
    """
    assert _Current.rows is not None
    _Current.rows.mute(hidden, layer)


@mute_hidden.register_fake
def _(hidden: Tensor, layer: int) -> None:
    pass


def _apply(
    number: int, apply: Callable[..., Tensor], linear: Any, hidden: Tensor, *rest: Any, **named: Any
) -> Tensor:
    torch.ops.neumuter_vllm.mute(hidden, number)
    return apply(linear, hidden, *rest, **named)


class WorkerMutes:
    """The mute sets of a worker: those of its requests, in ``rows``.

    Args:
        runner: vLLM's model runner, with its model.
        config: its VllmConfig.
        share: as for ``attach``.
    """

    def __init__(self, runner: Any, config: Any, share: float) -> None:
        refuse_features(config)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(
                config.model_config.hf_config, trust_remote_code=False
            )
        self.ffns = {ffn.path: ffn for ffn in find_ffns(self.model)}
        if experts := [path for path, ffn in self.ffns.items() if not ffn.is_dense]:
            raise ValueError(f"{experts[0]} has experts: mute sets are served for dense FFNs alone")
        self.quantised = None if config.model_config.quantization is None else QUANTISED
        self.dtype, self.device = config.model_config.dtype, runner.device
        linears = _linears(runner.get_model())
        self.downs = [
            self._wrap(number, f"{path}.{ffn.layout.down}", ffn.width, linears)
            for number, (path, ffn) in enumerate(self.ffns.items())
        ]
        self.methods = [down.linear.quant_method for down in self.downs]
        total = sum(ffn.width for ffn in self.ffns.values())
        self.rows = Rows(
            len(self.downs),
            config.scheduler_config.max_num_seqs,
            max(len(self.downs), math.ceil(share * total)),
            config.scheduler_config.max_num_batched_tokens,
            self.device,
        )
        _Current.rows = self.rows
        # Whether requests may come; vLLM's own warm-up is no request.
        self.ready = False
        self._requests: dict[str, ShardOfSet | None] = {}
        # Sets that fit the model, by digest, those that were asked for last.
        self._sets: OrderedDict[str, ShardOfSet] = OrderedDict()
        self._sketches: dict[str, list[float]] = {}

    def _wrap(self, number: int, name: str, width: int, linears: dict[str, Any]) -> Down:
        linear = linears.get(name)
        if linear is None or linear.input_size != width:
            raise ValueError(
                f"vLLM's model has no linear layer {name} of {width} inputs: its FFNs cannot be muted"
            )
        part = linear.input_size_per_partition
        # A quantisation method may serve several layers.
        method = copy.copy(linear.quant_method)
        apply = linear.quant_method.apply
        method.apply = functools.partial(_apply, number, apply)
        linear.quant_method = method
        return Down(linear, apply, linear.tp_rank * part, (linear.tp_rank + 1) * part)

    def hook(self, runner: Any, is_v2: bool) -> None:
        """Take down the requests and, before each forward pass, the order of their tokens."""
        runner.execute_model = functools.partial(self._execute, runner.execute_model)
        if is_v2:
            runner.prepare_inputs = functools.partial(self._prepare_v2, runner.prepare_inputs)
        else:
            runner._prepare_inputs = functools.partial(self._prepare_v1, runner, runner._prepare_inputs)

    def _execute(self, execute: Callable[..., Any], output: Any, *rest: Any, **named: Any) -> Any:
        """Run a step of vLLM's ``SchedulerOutput``."""
        for request in output.finished_req_ids:
            self._requests.pop(request, None)
        for new in output.scheduled_new_reqs:
            self._requests[new.req_id] = self._requested(new.sampling_params)
        return execute(output, *rest, **named)

    def _prepare_v1(self, runner: Any, prepare: Callable[..., Any], output: Any, counts: Any) -> Any:
        prepared = prepare(output, counts)
        self.choose(runner.input_batch.req_ids[: len(counts)], counts)
        return prepared

    def _prepare_v2(self, prepare: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        batch = prepare(*arguments, **named)
        self.choose(batch.req_ids, batch.num_scheduled_tokens)
        return batch

    def choose(self, requests: Sequence[str], counts: Sequence[int]) -> None:
        """Write the rows of a step, of these requests with so many tokens each."""
        if any(
            down.linear.quant_method is not own for down, own in zip(self.downs, self.methods, strict=True)
        ):
            raise RuntimeError(
                "vLLM has replaced the quantisation method of a down projection, which muted it"
            )
        sets = [self._requests[request] for request in requests]
        self.rows.choose(sets, counts)
        _Current.rows = self.rows

    def _requested(self, params: Any) -> ShardOfSet | None:
        """The set of a new request of vLLM's SamplingParams."""
        # vLLM warms up with requests that nobody has admitted.
        if not self.ready and (params is None or STAMP not in (params.extra_args or {})):
            return None
        data = data_of(params)
        if data == NO_SET:
            return None
        if data == CHECK and not self.ready:
            return self._checking()
        digest = digest_of(data)
        # The front end has asked before; nothing may run that was not compared.
        if digest not in self._sets and (differences := self.compare(data)):
            raise RuntimeError(f"a mute set does not fit the model: {'; '.join(differences)}")
        self._sets.move_to_end(digest)
        return self._sets[digest]

    def shard(self, digest: str, mutes: MuteSet) -> ShardOfSet:
        """The part of a set that is this worker's."""
        return ShardOfSet(
            digest,
            tuple(
                _part(mutes.layers.get(path), down) for path, down in zip(self.ffns, self.downs, strict=True)
            ),
        )

    def compare(self, data: bytes) -> list[str]:
        """List how the set of a mute file differs from the model. All workers must do so at once."""
        mutes = MuteSet.from_bytes(data)
        if differences := structure_differs(self.model, self.ffns, mutes):
            return differences
        if mutes.count > self.rows.neurons:
            return [
                f"it mutes {mutes.count} neurons, and this server takes {self.rows.neurons} at most: {SHARE}"
            ]
        downs = dict(zip(self.ffns, self.downs, strict=True))
        differences = [
            text
            for path in mutes.widths
            for text in sketches_differ(path, self._sketch(path, downs[path], mutes), mutes, self.quantised)
        ]
        if not differences:
            digest = digest_of(data)
            self._sets[digest] = self.shard(digest, mutes)
            while len(self._sets) > MOST_KEPT:
                self._sets.popitem(last=False)
        return differences

    def _sketch(self, path: str, down: Down, mutes: MuteSet) -> dict[str, list[float]]:
        """Sketch a down projection and its muted columns, as ``neumuter.mutes.fingerprint.sketches``."""

        def sketch(columns: Tensor | None) -> list[float]:
            return sketch_by(
                functools.partial(_project, down), down.linear.input_size, self.device, self.dtype, columns
            )

        if path not in self._sketches:
            self._sketches[path] = sketch(None)
        parts = {"the down projection's weights": self._sketches[path]}
        if path in mutes.layers:
            parts["the muted columns of the down projection"] = sketch(mutes.layers[path].indices)
        return parts

    def _checking(self) -> ShardOfSet:
        """A set of the largest size, for checks: of its gains every other one is 0 or −1."""
        each = max(1, self.rows.neurons // len(self.downs))
        layers = []
        for down in self.downs:
            width = down.linear.input_size
            indices = torch.arange(0, width, -(-width // each), dtype=torch.int32)
            layers.append(_part(MutedLayer(indices, -(torch.arange(len(indices)) % 2).float()), down))
        return ShardOfSet("", tuple(layers))

    @torch.inference_mode()
    def check(self) -> None:
        """Prove for each layer that a set mutes it."""
        shard = self._checking()
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.25
        with torch.random.fork_rng():
            for path, down, layer in zip(self.ffns, self.downs, shard.layers, strict=True):
                check_layer(path, down, layer, self.rows, shard, (self.device, self.dtype), tolerance)
        self.rows.choose([], [])


def _linears(model: Any) -> dict[str, Any]:
    """Find {name in the checkpoint: linear layer split by its inputs}, inside of LoRA's wrappers as well."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    found = [module for module in model.modules() if isinstance(module, RowParallelLinear)]
    if asynchronous := [m for m in model.modules() if getattr(m, "_enable_aux_cuda_stream", False)]:
        raise ValueError(
            f"{type(asynchronous[0]).__name__} reads activations in a stream of its own, while they are "
            "muted: unset VLLM_LORA_ENABLE_DUAL_STREAM"
        )
    return {module.prefix: module for module in found}


def _part(layer: MutedLayer | None, down: Down) -> MutedLayer | None:
    """The muted neurons that a worker holds, counted from its first."""
    if layer is None:
        return None
    own = (layer.indices >= down.start) & (layer.indices < down.stop)
    return MutedLayer(layer.indices[own] - down.start, layer.gains[own]) if own.any() else None


def _project(down: Down, inputs: Tensor) -> Tensor:
    """What the whole down projection makes of inputs [n, F], unmuted, by all workers together."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    outputs = down.apply(down.linear, inputs[:, down.start : down.stop].contiguous(), None)
    return tensor_model_parallel_all_reduce(outputs) if down.linear.tp_size > 1 else outputs
