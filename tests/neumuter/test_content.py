"""The digests of a model's tensors: equal for equal bytes, however a model is loaded, and else different."""

import copy

import accelerate
import pytest
import torch

from neumuter.models.content import PIECE, _digest, describe_model, describe_tensors, digest_weights
from tests.models import build
from tests.neumuter import jobs


def test_every_number_of_every_tensor_counts():
    model = build("mixtral")
    expected = digest_weights(model)
    assert expected.keys() == {
        name for kind in (model.named_parameters, model.named_buffers) for name, _ in kind()
    }
    assert digest_weights(copy.deepcopy(model)) == expected
    for name, tensor in (dict(model.named_parameters()) | dict(model.named_buffers())).items():
        for place in {0, tensor.numel() // 2, tensor.numel() - 1}:
            value = tensor.data.view(-1)[place].clone()
            tensor.data.view(-1)[place] = torch.nextafter(value, torch.tensor(torch.inf))
            found = digest_weights(model)
            tensor.data.view(-1)[place] = value
            assert {other for other in expected if found[other] != expected[other]} == {name}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.bool]
)
def test_order_signs_sizes_and_views_are_told_apart(dtype):
    # No multiple of 4 bytes, and more than a piece.
    numbers = torch.randint(0, 2, (PIECE // torch.zeros(0, dtype=dtype).element_size() + 3,)).to(dtype)
    numbers[0], numbers[1], numbers[-1] = 1, 0, 1
    assert _digest(numbers) == _digest(numbers.clone()) == _digest(torch.cat([numbers[:1], numbers])[1:])
    swapped, moved = numbers.clone(), torch.cat([numbers[1:], numbers[:1]])
    swapped[0], swapped[1] = numbers[1], numbers[0]
    others = [swapped, moved, numbers[:-1], numbers[None], numbers.view(torch.uint8)]
    if dtype.is_floating_point and dtype.itemsize > 1:
        negative = numbers.clone()
        negative[::2] *= -1
        others += [negative, -numbers]
    found = [_digest(other) for other in (numbers, *others)]
    assert len(set(found)) == len(found)
    assert _digest(numbers[:0]) != _digest(numbers[:0].view(0, 5))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_offloaded_and_compiled_models_have_the_same(name, tmp_path):
    model = build(name)
    expected, shape = digest_weights(model), describe_tensors(model)
    offloaded, compiled = copy.deepcopy(model), copy.deepcopy(model)
    accelerate.disk_offload(offloaded, tmp_path, execution_device="cpu")
    compiled.model.layers[1].compile()
    compiled.model.layers[0] = torch.compile(compiled.model.layers[0])
    for other in (offloaded, compiled, torch.compile(model)):
        assert (digest_weights(other), describe_tensors(other)) == (expected, shape)
        assert describe_model(other) == describe_model(model)


@pytest.mark.parametrize("kind", ["4bit", "8bit", "int8", "int4"])
def test_quantised_weights_and_their_scales_count(kind, tmp_path):
    jobs.need_library(kind)
    build("llama").save_pretrained(tmp_path / "one")
    other = build("llama")
    # All numbers of a quantised matrix stay, and its scales change.
    other.model.layers[0].self_attn.q_proj.weight.data *= 2
    other.save_pretrained(tmp_path / "other")
    first, again, changed = (
        digest_weights(jobs.quantised(tmp_path / folder, kind)) for folder in ("one", "one", "other")
    )
    assert first == again
    names = {name for name in first if first[name] != changed[name]}
    assert names
    assert all(
        name.startswith("model.layers.0.self_attn.q_proj.weight") or "q_proj.SCB" in name for name in names
    )
    quantised = describe_model(jobs.quantised(tmp_path / "one", kind))
    assert quantised["the model's quantisation"] != describe_model(other)["the model's quantisation"]


def test_adapters_count_and_what_they_are_scaled_by():
    peft = pytest.importorskip("peft")
    bare = describe_model(build("llama"))
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"], lora_alpha=8))
    found = [bare, describe_model(model)]
    with model.disable_adapter():
        found.append(describe_model(model))
    model.base_model.model.model.layers[0].self_attn.q_proj.set_scale("default", 3)
    found.append(describe_model(model))
    assert len({facts["the model's adapters"] for facts in found}) == len(found)
