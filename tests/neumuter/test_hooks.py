"""The drop-in modules and the masked FFN function."""

import pytest
import torch
from transformers import GPTNeoConfig, LlamaConfig
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from neumuter import MaskedGatedMLP, MaskedMLP
from neumuter.models.ffn import activation_name
from tests.models import HIDDEN, WIDTH

LLAMA = LlamaConfig(hidden_size=HIDDEN, intermediate_size=WIDTH)
GPT_NEO = GPTNeoConfig(hidden_size=HIDDEN)


def pair(kind):
    """A module of transformers and ours with the same weights, the latter loaded from a state_dict."""
    torch.manual_seed(0)
    theirs = LlamaMLP(LLAMA) if kind == "gated" else GPTNeoMLP(WIDTH, GPT_NEO)
    ours = MaskedGatedMLP(LLAMA) if kind == "gated" else MaskedMLP(WIDTH, GPT_NEO)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_drop_in_without_mask_has_the_same_bits(kind):
    theirs, ours = pair(kind)
    x = torch.randn(2, 5, HIDDEN)
    assert torch.equal(theirs(x), ours(x))


@pytest.mark.parametrize("kind", ["gated", "plain"])
@pytest.mark.parametrize("shape", [(4, 3, HIDDEN), (12, HIDDEN)])
def test_drop_in_with_mask(kind, shape):
    theirs, ours = (module.double() for module in pair(kind))
    x, mask = torch.randn(shape, dtype=torch.float64), torch.rand(4, WIDTH)
    ids = torch.tensor([0, 3, -1, 2, 2, 1, 0, -1, 3, 1, 1, 0], dtype=torch.int32)
    down = theirs.down_proj if kind == "gated" else theirs.c_proj
    rows = {
        "one": (mask[0].expand(12, -1), {"mask": mask[0]}),
        "runs": (mask.repeat_interleave(3, 0), {"mask": mask}),
        "ids": (torch.where((ids < 0)[:, None], 1.0, mask[ids]), {"mask": mask, "row_ids": ids}),
    }
    for per_token, arguments in rows.values():
        scale = per_token.double().view(*shape[:-1], WIDTH)
        hook = down.register_forward_pre_hook(lambda module, args, scale=scale: (args[0] * scale,))
        expected = theirs(x)
        hook.remove()
        torch.testing.assert_close(ours(x, **arguments), expected, rtol=1e-6, atol=1e-9)


def test_plain_drop_in_takes_the_width_from_the_config():
    assert MaskedMLP(GPT_NEO).c_fc.out_features == 4 * HIDDEN
    assert MaskedMLP(GPTNeoConfig(hidden_size=HIDDEN, intermediate_size=WIDTH)).c_fc.out_features == WIDTH


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (torch.nn.SiLU(), "silu"),
        (torch.nn.GELU(), "gelu"),
        (torch.nn.GELU(approximate="tanh"), "gelu_tanh"),
        (torch.nn.ReLU(), "relu"),
    ],
)
def test_activation_names(module, name):
    assert activation_name(module) == name


def test_activation_modules_of_transformers_compute_what_their_name_says():
    from transformers.activations import ACT2FN

    from neumuter_kernels.reference import activate

    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    for key in ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_accurate", "relu", "relu2"):
        module = ACT2FN[key]
        torch.testing.assert_close(module(x), activate(x, activation_name(module)))


def test_unknown_activation_is_named():
    assert activation_name(torch.nn.Mish()) is None
    with pytest.raises(ValueError, match="act_fn is the activation MishActivation; the kernels have silu"):
        MaskedGatedMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, hidden_act="mish"))
