"""Masked MLPs as layers of Hugging Face's ``kernels``, in a local repository, on the CPU."""

import json

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from neumuter import attach
from neumuter.integrations.hub_kernels import annotate, kernel_mapping, write_layer_repository
from tests import models

kernels = pytest.importorskip("kernels")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels") / "layers"
    write_layer_repository(folder)
    return folder


def kernelized(model, repository, mode=None):
    mode = mode or kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    with annotate(model), kernels.use_kernel_mapping(kernel_mapping(repository)):
        return kernels.kernelize(model, mode=mode, device="cpu")


def layer_names(model):
    """The classes that define the forward methods which the model's modules have of their own."""
    bound = [vars(module)["forward"] for module in model.modules() if "forward" in vars(module)]
    return [method.__func__.__qualname__ for method in bound if "Masked" in method.__func__.__qualname__]


@pytest.fixture
def fused(monkeypatch):
    """Which ops of ours the layers ran, in order."""
    from neumuter.integrations import hub_kernels

    ran = []
    for name in ("masked_glu_of", "masked_act_of"):
        real = getattr(hub_kernels, name)
        monkeypatch.setattr(hub_kernels, name, lambda *a, real=real, name=name: ran.append(name) or real(*a))
    return ran


@pytest.mark.parametrize(
    ("name", "layer", "op"),
    [
        ("llama", "MaskedGatedMLP", "masked_glu_of"),
        ("llama_gelu", "MaskedGatedMLP", "masked_glu_of"),
        ("qwen2", "MaskedGatedMLP", "masked_glu_of"),
        ("gpt2", "MaskedMLP", "masked_act_of"),
        ("gpt_neo", "MaskedMLP", "masked_act_of"),
    ],
)
def test_kernelize_runs_our_forward_with_the_same_output_and_gradients(name, layer, op, repository, fused):
    theirs, ours = models.build(name), kernelized(models.build(name), repository)
    assert layer_names(ours) == [f"{layer}.forward"] * models.LAYERS
    ids = models.batch()
    logits = [model(input_ids=ids, labels=ids) for model in (theirs, ours)]
    assert fused == [op] * models.LAYERS
    torch.testing.assert_close(logits[1].logits, logits[0].logits, rtol=1e-5, atol=1e-5)
    for output in logits:
        output.loss.backward()
    for (key, expected), actual in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=key)


def test_a_gated_mlp_has_the_same_bits_in_bfloat16(repository):
    """Where its rounding hides that of the exponential function."""
    ids = models.batch()
    with torch.no_grad():
        expected = models.build("llama", torch.bfloat16)(ids).logits
        actual = kernelized(models.build("llama", torch.bfloat16), repository)(ids).logits
    assert torch.equal(actual, expected)


def test_a_mask_of_the_module_is_applied(repository):
    mlp = kernelized(models.build("llama").double(), repository).model.layers[1].mlp
    x, mask = torch.randn(4, 3, models.HIDDEN).double(), torch.rand(4, models.WIDTH)
    for rows in (mask[0], mask):
        mlp.register_buffer("neuron_mask", rows, persistent=False)
        hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        expected = mlp.down_proj(hidden * rows.view(-1, 1, models.WIDTH))
        torch.testing.assert_close(mlp(x), expected, rtol=1e-6, atol=1e-9)


def test_it_compiles_into_one_graph(repository):
    mlp = kernelized(models.build("llama"), repository).model.layers[1].mlp
    x = torch.randn(2, 3, models.HIDDEN)
    torch.testing.assert_close(torch.compile(mlp.forward, backend="aot_eager", fullgraph=True)(x), mlp(x))


def test_the_annotation_ends_with_the_context_and_is_of_this_model_alone(repository, monkeypatch):
    monkeypatch.setattr(LlamaMLP, "kernel_layer_name", "SomebodyElses", raising=False)
    model, other = models.build("llama"), models.build("llama")

    def interrupted():
        with annotate(model), kernels.use_kernel_mapping(kernel_mapping(repository)):
            assert LlamaMLP.kernel_layer_name == "MaskedGatedMLP"
            kernels.kernelize(other, mode=kernels.Mode.INFERENCE, device="cpu")
            raise OSError("on purpose")

    with pytest.raises(OSError, match="on purpose"):
        interrupted()
    assert not layer_names(other)
    assert LlamaMLP.kernel_layer_name == "SomebodyElses"
    assert "kernel_condition" not in vars(LlamaMLP)


def test_kernelize_without_a_mapping_takes_it_back(repository):
    model, ids = models.build("llama"), models.batch()
    expected = model(ids).logits
    kernelized(model, repository)
    with annotate(model), kernels.use_kernel_mapping({}, inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
    assert not layer_names(model)
    assert torch.equal(model(ids).logits, expected)


def test_gates_go_on_top_but_not_below(repository):
    """The other way round the new forward would pass by the masks."""
    model = kernelized(models.build("llama"), repository)
    with attach(model, start_layer=0) as masked:
        path, score = next(iter(masked.scores.items()))
        with masked.applying({path: torch.zeros_like(score)}):
            muted = model(models.batch()).logits
        assert not torch.allclose(muted, model(models.batch()).logits)
        with pytest.raises(RuntimeError, match="attached or muted"), annotate(model):
            pass
    assert layer_names(model) == ["MaskedGatedMLP.forward"] * models.LAYERS


@pytest.mark.parametrize("name", ["phi3", "mixtral", "llama_mish"])
def test_a_model_without_fitting_mlps_is_refused(name):
    with pytest.raises(ValueError, match="has no MLP that a layer fits"), annotate(models.build(name)):
        pass


def test_the_repository_is_whole_or_not_there(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_layer_repository(tmp_path / "layers")
    assert not list(tmp_path.iterdir())
    write_layer_repository(tmp_path / "layers")
    with pytest.raises(FileExistsError):
        write_layer_repository(tmp_path / "layers")
