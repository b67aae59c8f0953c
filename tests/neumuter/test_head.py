"""Chunked losses from hidden states against the same losses from full logits."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM

import neumuter
from neumuter.models import head as module
from neumuter.models.head import Head
from tests import models


def gemma2():
    """A family whose logits are soft-capped after the output embedding."""
    torch.manual_seed(0)
    config = Gemma2Config(**models.LLAMA_LIKE, head_dim=8, final_logit_softcapping=0.5)
    return Gemma2ForCausalLM(config).eval()


BUILD = {name: lambda name=name: models.build(name) for name in ("llama", "gpt2", "gpt_neo")} | {
    "gemma2": gemma2
}


@pytest.fixture(params=BUILD)
def case(request):
    """A frozen model, its head, hidden states [N, d] that need gradients, and others to compare with."""
    model = BUILD[request.param]().requires_grad_(False)
    ids = models.batch(samples=3, tokens=9)
    head = Head(model, ids[:1])
    assert head.is_projection == (request.param != "gemma2")
    hidden = head.hidden(ids).flatten(0, 1).detach()
    torch.testing.assert_close(head.logits(hidden), model(ids).logits.flatten(0, 1))
    return model, head, hidden.requires_grad_(), hidden.detach().roll(1, 0)


@pytest.mark.parametrize("name", BUILD)
def test_the_head_of_a_masked_model_runs_alone(name):
    """The handle, which sees that no FFN runs with it, takes that for what it is."""
    model, ids = BUILD[name](), models.batch(samples=2, tokens=6)
    with neumuter.attach(model, start_layer=0) as masked, torch.no_grad():
        head = Head(model, ids)
        mask = torch.full([masked.ffns[0].width], 0.5)
        with masked.applying({masked.ffns[0].path: mask}):
            found, expected = head.logits(head.hidden(ids).flatten(0, 1)), model(ids).logits.flatten(0, 1)
            torch.testing.assert_close(found, expected)


@pytest.fixture(params=[1, 4 * 97 * 4, 1 << 25], ids=["a token", "four tokens", "all"])
def _chunks(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", request.param)


@pytest.mark.usefixtures("_chunks")
def test_token_losses_and_gradients_are_those_of_full_logits(case):
    _, head, hidden, _ = case
    targets = torch.randint(models.VOCABULARY, (len(hidden),))
    weights = torch.randn(len(hidden))
    ours = head.token_losses(hidden, targets)
    expected = F.cross_entropy(head.logits(hidden), targets, reduction="none")
    torch.testing.assert_close(ours, expected)
    for function in (lambda x: (x * weights).sum(), lambda x: F.relu(3 - x).mean()):
        (a,) = torch.autograd.grad(function(ours), hidden, retain_graph=True)
        (b,) = torch.autograd.grad(function(expected), hidden, retain_graph=True)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("_chunks")
def test_kl_and_its_gradient_are_those_of_the_formula(case):
    _, head, hidden, reference = case
    ours = head.kl_divergences(hidden, reference)
    q, p = (head.logits(x).log_softmax(-1) for x in (hidden, reference))
    expected = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    (a,) = torch.autograd.grad(ours.mean(), hidden)
    (b,) = torch.autograd.grad(expected.mean(), hidden)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert head.kl_divergences(hidden, hidden.detach()).abs().max() < 1e-6


def test_bfloat16_losses_are_float32_and_near():
    model = models.build("llama", torch.bfloat16).requires_grad_(False)
    ids = models.batch()
    head = Head(model, ids[:1])
    hidden = head.hidden(ids).flatten(0, 1)
    targets = torch.randint(models.VOCABULARY, (len(hidden),))
    losses = head.token_losses(hidden, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(
        losses, F.cross_entropy(model(ids).logits.flatten(0, 1).float(), targets, reduction="none")
    )


def test_no_tokens_have_no_losses():
    model = models.build("llama").requires_grad_(False)
    hidden = torch.empty(0, models.HIDDEN, requires_grad=True)
    losses = Head(model, models.batch()[:1]).token_losses(hidden, torch.empty(0, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    assert losses.shape == (0,)
    assert gradient.shape == hidden.shape


def test_nothing_is_left_behind_on_the_model():
    model = gemma2()
    ids = models.batch()
    before = model(ids).logits
    Head(model, ids[:1]).logits(torch.randn(3, models.HIDDEN))
    assert "forward" not in vars(model.model)
    assert torch.equal(model(ids).logits, before)


def test_logits_that_need_more_than_the_hidden_states_are_refused():
    model = models.build("llama")
    plain = model.forward

    def forward(input_ids=None, **options):
        output = plain(input_ids=input_ids, **options)
        output.logits = output.logits + F.one_hot(input_ids, models.VOCABULARY)
        return output

    model.forward = forward
    with pytest.raises(ValueError, match="LlamaForCausalLM are not a function of the last hidden states"):
        Head(model, models.batch()[:1])


def test_a_second_derivative_is_refused(case):
    """A gradient penalty would lack its second-order part."""
    _, head, hidden, reference = case
    targets = torch.zeros(len(hidden), dtype=torch.int64)
    for losses in (head.token_losses(hidden, targets), head.kl_divergences(hidden, reference)):
        (slope,) = torch.autograd.grad(losses.sum(), hidden, create_graph=True)
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            torch.autograd.grad(slope.square().sum() + hidden.sum(), hidden)
