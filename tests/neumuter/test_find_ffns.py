"""What is an FFN of the text model, and what only looks like one: on models without weights."""

import re

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import neumuter
from neumuter.models.families import find_ffns
from neumuter.models.layouts import split
from neumuter.training.tracing import _imagined as imagined
from tests.models import config


def found_in(model_type, **options):
    """The paths and classes of the FFNs that are found, layers aside."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))
    return {(re.sub(r"\d+", "0", ffn.path), type(ffn.module).__name__) for ffn in find_ffns(model)}


def test_towers_are_no_part_of_the_text_model():
    assert found_in("phi4_multimodal") == {("model.layers.0.mlp", "Phi4MultimodalMLP")}
    with pytest.raises(ValueError, match="no FFN found in GitForCausalLM"):
        found_in("git")


def test_mixers_low_rank_blocks_and_block_diagonal_weights_are_no_ffns():
    assert found_in("zamba") == {("model.layers.0.shared_transf.feed_forward", "ZambaMLP")}
    assert found_in("gemma3n_text") == {("model.layers.0.mlp", "Gemma3nTextMLP")}
    assert found_in("recurrent_gemma") == {("model.layers.0.mlp_block", "RecurrentGemmaMlp")}


def test_the_decoder_is_not_the_head():
    assert found_in("modernbert-decoder") == {("model.layers.0.mlp", "ModernBertDecoderMLP")}


@pytest.mark.parametrize("number", [1, 2])
def test_shared_experts_of_one_weight_are_refused(number):
    with pytest.raises(ValueError, match=r"mlp.shared_experts, a InklingSharedExperts, holds the 3-dim"):
        found_in("inkling_text", n_shared_experts=number)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mixtral", {"tp_size": 2, "ep_size": 2}),
        ("qwen3_moe", {"fsdp_size": 2, "ep_size": 2}),
        ("deepseek_v3", {"tp_size": 2, "ep_size": 2}),
        ("gpt_oss", {"fsdp_size": 2, "ep_size": 2}),
    ],
)
def test_expert_parallelism_is_refused(name, sizes):
    wanted = DistributedConfig(**sizes)
    with imagined(wanted.fsdp_size * wanted.tp_size), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(name))
        split(model, wanted)
        message = "expert parallelism has given processes whole experts of .*: masks cannot follow"
        with pytest.raises(ValueError, match=message):
            neumuter.attach(model)


@pytest.mark.parametrize("dimensions", [(1, 1), (0, 1)])
def test_a_split_over_two_unknown_meshes_is_refused(dimensions):
    with imagined(4), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config("llama"))
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
        down = model.model.layers[-1].mlp.down_proj
        weight = DTensor.from_local(down.weight.detach(), mesh, [Shard(d) for d in dimensions])
        down.weight = torch.nn.Parameter(weight, requires_grad=False)
        with pytest.raises(ValueError, match=r"split along dimensions .* which masks cannot follow"):
            neumuter.attach(model)
