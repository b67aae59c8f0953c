"""What the plug-in takes for granted of vLLM's classes: a version that changes names or orders fails here.

It is all there is for what no test can run without a GPU: Model Runner V2 and FULL CUDA graphs.
"""

import dataclasses
import inspect
import types

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm runs this file")

import vllm
from vllm.config import VllmConfig
from vllm.config.cache import CacheConfig
from vllm.config.parallel import ParallelConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.worker import gpu_model_runner as v1
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu import input_batch, warmup
from vllm.v1.worker.gpu import model_runner as v2
from vllm.v1.worker.gpu_worker import Worker

from neumuter.integrations.vllm.rows import UNMUTED
from neumuter.integrations.vllm.stamp import NO_SET, data_of, salted, stamped
from neumuter.integrations.vllm.support import refuse_version
from neumuter.integrations.vllm.worker import WorkerMutes


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_this_version_is_one_that_is_served():
    refuse_version(vllm.__version__)


def test_methods_that_are_wrapped_take_what_is_given_to_them():
    assert parameters(InputProcessor.process_inputs)[:4] == ["self", "request_id", "prompt", "params"]
    for engine in (AsyncLLM, LLMEngine):
        assert parameters(engine.add_request)[:4] == ["self", "request_id", "prompt", "params"]
        assert {"method", "args"} <= set(parameters(engine.collective_rpc))
    assert parameters(EngineCore.preprocess_add_request) == ["self", "request"]
    assert parameters(EngineCore._initialize_kv_caches) == ["self", "vllm_config"]
    assert parameters(EngineCore.collective_rpc)[:4] == ["self", "method", "timeout", "args"]


def test_workers_get_mute_sets_after_loading_and_before_they_compile():
    text = inspect.getsource(EngineCore.__init__)
    assert text.index("executor_class(vllm_config)") < text.index("self._initialize_kv_caches(vllm_config)")
    caches = inspect.getsource(EngineCore._initialize_kv_caches)
    assert "determine_available_memory" in caches
    assert "self._initialize_kv_caches" not in caches


def test_every_request_of_a_client_is_admitted():
    """Both engines make their requests by process_inputs, which nothing else calls."""
    for engine in (AsyncLLM, LLMEngine):
        assert "self.input_processor.process_inputs" in inspect.getsource(engine.add_request)
    text = inspect.getsource(InputProcessor.process_inputs)
    assert "sampling_params = params.clone()" in text
    assert 'cache_salt=decoder_input.get("cache_salt")' in text
    for request in (CompletionRequest, ChatCompletionRequest):
        assert "extra_args: dict[str, Any] = self.vllm_xargs" in inspect.getsource(request.to_sampling_params)


def test_a_stamp_goes_through_vllms_messages():
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    params = stamped(SamplingParams(extra_args={"mute_set": "a"}), None)
    assert data_of(params) == NO_SET
    params.extra_args["neumuter.mute_file"] = bytes(range(256)) * 300
    request = EngineCoreRequest(
        request_id="r", prompt_token_ids=[1], mm_features=None, sampling_params=params, pooling_params=None,
        arrival_time=0.0, lora_request=None, cache_salt=salted(None, None), data_parallel_rank=None,
    )  # fmt: skip
    again = MsgpackDecoder(EngineCoreRequest).decode(MsgpackEncoder().encode(request))
    assert data_of(again.sampling_params) == data_of(params)


def test_what_a_step_says_about_its_requests():
    assert {"scheduled_new_reqs", "finished_req_ids"} <= {f.name for f in dataclasses.fields(SchedulerOutput)}
    assert {"req_id", "sampling_params"} <= {f.name for f in dataclasses.fields(NewRequestData)}
    # A preempted request keeps its id: V1 goes on with it, V2 is told of it anew.
    assert "preempted_req_ids" in {f.name for f in dataclasses.fields(SchedulerOutput)}


@pytest.mark.parametrize("runner", [v1.GPUModelRunner, CPUModelRunner, v2.GPUModelRunner])
def test_workers_run_steps_by_the_method_that_is_wrapped(runner):
    assert parameters(runner.execute_model)[:2] == ["self", "scheduler_output"]
    assert "self.model_runner.execute_model(" in inspect.getsource(Worker.execute_model)
    assert "self.use_v2_model_runner = " in inspect.getsource(Worker.__init__)
    assert "__slots__" not in vars(runner)


def test_v1_prepares_inputs_in_the_order_of_its_batch_before_the_model_runs():
    assert parameters(v1.GPUModelRunner._prepare_inputs) == [
        "self",
        "scheduler_output",
        "num_scheduled_tokens",
    ]
    assert "_prepare_inputs" not in vars(CPUModelRunner)
    text = inspect.getsource(v1.GPUModelRunner.execute_model)
    order = [
        "self._update_states(scheduler_output)",
        "req_ids = self.input_batch.req_ids",
        "self._prepare_inputs(scheduler_output, num_scheduled_tokens_np)",
        "self._model_forward(",
    ]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)


def test_v2_prepares_inputs_in_the_order_of_its_batch_before_the_model_runs():
    text = inspect.getsource(v2.GPUModelRunner.execute_model)
    order = ["self.add_requests(", "self.prepare_inputs(", "run_fullgraph(", "self.model(**model_inputs)"]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    prepared = inspect.getsource(v2.GPUModelRunner.prepare_inputs)
    for field in ("req_ids=req_ids", "num_scheduled_tokens=num_scheduled_tokens"):
        assert field in prepared
    # Tokens lie one request after the other, in that order.
    assert "np.cumsum(num_scheduled_tokens" in prepared


def test_the_rows_of_a_batch_of_v2():
    """With the batch that Model Runner V2 makes, and a stand-in for the worker's model."""
    buffers = input_batch.InputBuffers(4, 16, torch.device("cpu"))
    batch = input_batch.InputBatch.make_dummy(3, 8, buffers)
    chosen = []
    mutes = types.SimpleNamespace(choose=lambda names, counts: chosen.append((names, list(counts))))
    assert WorkerMutes._prepare_v2(mutes, lambda *_: batch, "output", "state", "description", 0) is batch
    assert chosen == [(batch.req_ids, [2, 3, 3])]
    assert batch.query_start_loc.tolist() == [0, 2, 5, 8]


def test_v2_warms_up_with_requests_that_nobody_has_admitted():
    """They run before ``admit``, so a worker takes them for unmuted ones."""
    assert "NewRequestData(" in inspect.getsource(warmup)
    mutes = types.SimpleNamespace(ready=False)
    assert WorkerMutes._requested(mutes, SamplingParams()) is None
    assert WorkerMutes._requested(mutes, None) is None
    mutes.ready = True
    with pytest.raises(RuntimeError, match="without a word about its mute set"):
        WorkerMutes._requested(mutes, SamplingParams())


def test_no_step_has_more_tokens_than_there_are_rows():
    for runner in (v1.GPUModelRunner, v2.GPUModelRunner):
        assert "self.max_num_tokens = " in inspect.getsource(runner.__init__)
    assert "assert num_tokens_padded <= self.max_num_tokens" in inspect.getsource(
        v1.GPUModelRunner._dummy_run
    )
    assert UNMUTED == -1


def test_a_linear_layer_tells_its_name_and_its_shard_and_calls_its_method():
    text = inspect.getsource(RowParallelLinear) + inspect.getsource(RowParallelLinear.__mro__[1])
    for name in ("tp_rank", "tp_size", "input_size_per_partition", "input_size", "prefix", "quant_method"):
        assert f"self.{name} = " in text or f"self.{name}: " in text
    assert "self.quant_method.apply(self, input_parallel, bias_)" in inspect.getsource(
        RowParallelLinear.forward
    )
    shard = inspect.getsource(RowParallelLinear.weight_loader)
    assert "start_idx = self.tp_rank * shard_size" in shard


def test_an_adapter_computes_with_the_method_of_the_layer_inside_first():
    text = inspect.getsource(BaseLinearLayerWithLoRA._apply_sync)
    base = text.index("self._get_quant_method().apply(self.base_layer, x, bias)")
    assert base < text.index("self._apply_lora_to_output(x, output)")
    assert "_enable_aux_cuda_stream" in inspect.getsource(BaseLinearLayerWithLoRA.apply)


def test_the_config_names_what_is_refused():
    names = set(parameters(ParallelConfig.__init__)) | set(dir(ParallelConfig))
    assert {
        "pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size",
        "enable_dbo", "num_ubatches",
    } <= names  # fmt: skip
    assert "kv_sharing_fast_prefill" in {field.name for field in dataclasses.fields(CacheConfig)}
    assert {"speculative_config", "kv_transfer_config"} <= {
        field.name for field in dataclasses.fields(VllmConfig)
    }
