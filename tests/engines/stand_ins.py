"""Stand-ins for what the plug-in sees of vLLM: its configuration, parameters, linear layers and runners."""

from types import SimpleNamespace

import numpy as np
import torch

import neumuter
from neumuter.integrations.vllm.stamp import STAMP
from neumuter.recipes import mute_random
from tests import models

CPU = torch.device("cpu")
LAYERS, WIDTH = models.LAYERS, models.WIDTH


def sets_of(model, count=3, share=0.2):
    with neumuter.attach(model, start_layer=0) as masked:
        return [mute_random(masked, share, seed) for seed in range(count)]


def bytes_of(mutes, path):
    mutes.save(path)
    return path.read_bytes()


def config_of(model, tokens=32):
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, prefill_context_parallel_size=1, decode_context_parallel_size=1,
            enable_dbo=False, num_ubatches=0,
        ),
        model_config=SimpleNamespace(
            hf_config=model.config, dtype=torch.float32, quantization=None, is_encoder_decoder=False,
            is_multimodal_model=False, runner_type="generate",
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=tokens),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        speculative_config=None,
        kv_transfer_config=None,
    )  # fmt: skip


class Params:
    def __init__(self, extra_args=None):
        self.extra_args = extra_args

    def clone(self):
        return Params(None if self.extra_args is None else dict(self.extra_args))


class Method:
    def apply(self, linear, hidden, bias=None):
        return hidden @ linear.weight.T


class Linear:
    def __init__(self, ffn, rank, size):
        weight = ffn.down.weight.detach()
        part = weight.shape[1] // size
        self.weight = weight[:, rank * part : (rank + 1) * part]
        self.tp_rank, self.tp_size, self.input_size, self.input_size_per_partition = rank, size, WIDTH, part
        self.quant_method = Method()


class RunnerV1:
    """Runs each layer on the given activations of a step's tokens, [T, F] of all workers."""

    device = CPU

    def __init__(self, linears):
        self.linears, self.input_batch = linears, SimpleNamespace(req_ids=[])

    def get_model(self):
        return self.linears

    def execute_model(self, output):
        # The order of the batch is not that of the scheduler.
        self.input_batch.req_ids = [*sorted(output.num_scheduled_tokens, reverse=True), "left over"]
        counts = np.array([output.num_scheduled_tokens[i] for i in self.input_batch.req_ids[:-1]])
        if len(counts):
            assert self._prepare_inputs(output, counts) == "prepared"
        return self.run(output.hidden)

    def _prepare_inputs(self, output, counts):
        return "prepared"

    def run(self, hidden):
        found = []
        for linear in self.linears.values():
            start = linear.tp_rank * linear.input_size_per_partition
            own = hidden[:, start : start + linear.input_size_per_partition].clone()
            found.append(linear.quant_method.apply(linear, own, None))
        return found


class RunnerV2(RunnerV1):
    def execute_model(self, output, dummy_run=False):
        batch = self.prepare_inputs(output, None)
        return self.run(output.hidden) if batch.req_ids else None

    def prepare_inputs(self, output, state):
        names = sorted(output.num_scheduled_tokens, reverse=True)
        counts = np.array([output.num_scheduled_tokens[name] for name in names])
        return SimpleNamespace(req_ids=names, num_scheduled_tokens=counts)


def step(hidden, counts, new=(), finished=()):
    added = [
        SimpleNamespace(req_id=name, sampling_params=Params(None if data is None else {STAMP: data}))
        for name, data in dict(new).items()
    ]
    return SimpleNamespace(
        scheduled_new_reqs=added, finished_req_ids=set(finished), num_scheduled_tokens=counts, hidden=hidden
    )
