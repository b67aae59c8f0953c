"""What ``neumuter plan`` says a device needs, beside a trace of the step that ``unlearn`` takes there.

The step of the default recipe runs on tensors without values (``neumuter.training.tracing``), under the FSDP2
and the tensor parallelism that transformers applies, in a process group that communicates with nobody.
Machines have 8 devices. All storages that are alive are counted. The configs have the published sizes;
nothing is downloaded.
"""

import datetime
import functools
import time

import torch
from transformers import AutoConfig

from bench import machine
from neumuter.recipes.fitted import GainsConfig, _Fit
from neumuter.training.neurons import Neurons
from neumuter.training.plan import MACHINE, plan, plan_tensor_parallel
from neumuter.training.tracing import _imagined as imagined
from neumuter.training.tracing import trace

LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 128}
# The model_type, and the sizes.
MODELS = {
    "Llama 3 8B": ("llama", LLAMA | dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    )),
    "Llama 3 70B": ("llama", LLAMA | dict(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    )),
    "Llama 3 405B": ("llama", LLAMA | dict(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
    )),
    "Llama 3.2 3B": ("llama", LLAMA | dict(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        tie_word_embeddings=True,
    )),
    "Gemma 2 9B": ("gemma2", dict(
        hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256, vocab_size=256000,
    )),
    "GPT-J 6B": ("gptj", {}),
    "OLMoE 7B": ("olmoe", dict(
        hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, vocab_size=50304,
    )),
    "Mixtral 8x7B": ("mixtral", dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2, vocab_size=32000,
    )),
    "Qwen3 30B-A3B": ("qwen3_moe", dict(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        vocab_size=151936,
    )),
    "DeepSeek-V3 671B": ("deepseek_v3", dict(
        hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
        num_attention_heads=128, num_key_value_heads=128, n_routed_experts=256, n_shared_experts=1,
        num_experts_per_tok=8, first_k_dense_replace=3, vocab_size=129280,
    )),
}  # fmt: skip
# Layouts without tensor parallelism, as a plan calls them.
NAMES = {"ddp": "one device", "fsdp": "FSDP2, ZeRO-3"}
SAMPLES, TOKENS = 8, 256
# Models, layouts, devices, whether activations are recomputed.
CASES = [
    ("Llama 3 8B", "ddp", 1, (False, True)), ("Llama 3 8B", "fsdp", 8, (False, True)),
    ("Llama 3 8B", "tp", 8, (False, True)), ("Llama 3.2 3B", "fsdp", 8, (False, True)),
    ("Gemma 2 9B", "fsdp", 8, (False, True)), ("GPT-J 6B", "fsdp", 8, (False, True)),
    ("OLMoE 7B", "ddp", 1, (False, True)),
    ("OLMoE 7B", "fsdp", 8, (False, True)), ("OLMoE 7B", "tp", 8, (False, True)),
    ("Mixtral 8x7B", "fsdp", 8, (False, True)), ("Mixtral 8x7B", "tp", 8, (False, True)),
    ("Mixtral 8x7B", "fsdp+tp", 16, (False, True)), ("Qwen3 30B-A3B", "fsdp", 8, (False, True)),
    ("Qwen3 30B-A3B", "tp", 4, (False, True)), ("Qwen3 30B-A3B", "fsdp+tp", 8, (False, True)),
    ("Llama 3 70B", "fsdp", 8, (False, True)), ("Llama 3 70B", "tp", 8, (False,)),
    ("Llama 3 70B", "fsdp+tp", 16, (False,)), ("Llama 3 405B", "fsdp", 64, (False, True)),
    ("Llama 3 405B", "fsdp+tp", 64, (False,)), ("DeepSeek-V3 671B", "fsdp", 64, (False, True)),
]  # fmt: skip


def cases():
    """Yields (what a row is about, how it is traced)."""
    for model, layout, devices, saving in CASES:
        for recompute in saving:
            about = {
                "model": model, "layout": layout, "devices": devices, "samples": SAMPLES, "tokens": TOKENS,
                "recompute": recompute,
            }  # fmt: skip
            yield about, functools.partial(compare, about)


def compare(about):
    """The peaks of a device in bytes, traced and planned."""
    config, layout, devices, size = _read(about)
    start = time.perf_counter()
    traced = trace(config, fit, layout, devices, **size, local=min(devices, MACHINE))
    seconds = time.perf_counter() - start
    traced.masked.detach()
    return {
        "parameters": sum(p.numel() for p in traced.masked.model.parameters()), "traced": traced.peak,
        "planned": plan_peak(about), "seconds": round(seconds, 1),
    }  # fmt: skip


def plan_peak(about):
    """The peak of a device in bytes, as it is planned."""
    config, layout, devices, size = _read(about)
    if layout in NAMES:
        # Inside a process group a plan has no layouts with tensor parallelism, which take long.
        with imagined(devices):
            parts = plan(config, devices, **size).layouts[NAMES[layout]]
    else:
        parts = plan_tensor_parallel(config, layout, devices, **size)
    return sum(parts.values())


def _read(about):
    """The config, the layout, the devices, and the sizes of the step that a row is about."""
    model_type, sizes = MODELS[about["model"]]
    size = {name: about[name] for name in ("samples", "tokens", "recompute")}
    return AutoConfig.for_model(model_type, **sizes), about["layout"], about["devices"], size


def describe():
    """What the traces depend on."""
    versions = {name: machine.version(name) for name in ("torch", "transformers")}
    found = {"versions": versions, "commit": machine.commit(), "code": machine.digest(*machine.LIBRARY)}
    return found | {"date": datetime.date.today().isoformat()}


def fit(pair):
    """The step of the default recipe, for a hundredth of the neurons."""
    neurons = Neurons(pair.masked)
    candidates = int(GainsConfig().candidates * neurons.count / 100)
    gains = torch.ones(candidates).requires_grad_()
    return _Fit(neurons, pair, GainsConfig(), 0, candidates, None).make_step(
        torch.arange(candidates), gains, 80
    )
