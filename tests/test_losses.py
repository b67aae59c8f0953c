import pytest
import torch
import torch.nn.functional as F
from neumuter import losses


def logits_and_labels(rows=3, tokens=6, vocabulary=11):
    labels = torch.randint(vocabulary, (rows, tokens))
    labels[0, 3:] = losses.IGNORED
    labels[2, :2] = losses.IGNORED
    return torch.randn(rows, tokens, vocabulary), labels


def test_token_losses_are_those_of_the_counted_tokens_row_by_row():
    logits, labels = logits_and_labels()
    expected = [
        -logits[row, column - 1].log_softmax(-1)[labels[row, column]]
        for row in range(3)
        for column in range(1, 6)
        if labels[row, column] != losses.IGNORED
    ]
    torch.testing.assert_close(losses.token_losses(logits, labels), torch.stack(expected))


def test_padding_has_no_loss_and_no_gradient():
    logits, labels = logits_and_labels()
    logits.requires_grad_()
    losses.token_losses(logits, labels).sum().backward()
    where = losses.predicting(labels)
    assert where.sum() == 2 + 5 + 4
    assert (logits.grad[~where] == 0).all()
    assert (logits.grad[where] != 0).any(-1).all()


def test_bfloat16_logits_give_float32_losses():
    logits, labels = logits_and_labels()
    result = losses.token_losses(logits.bfloat16(), labels)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, losses.token_losses(logits, labels), atol=0.05, rtol=0.05)


def test_hinge_is_zero_and_flat_beyond_the_margin():
    values = torch.tensor([0.5, 2.0, 7.0], requires_grad=True)
    loss = losses.hinge(values, 3.0)
    loss.backward()
    assert loss.item() == pytest.approx((2.5 + 1.0) / 3)
    torch.testing.assert_close(values.grad, torch.tensor([-1 / 3, -1 / 3, 0.0]))


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_kl_and_its_gradient_are_those_of_the_formula_for_any_chunk(monkeypatch, chunk):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    reference, logits = torch.randn(2, 10, 7)
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    kl = losses.kl_divergence(reference, ours)
    p, q = reference.log_softmax(-1), plain.log_softmax(-1)
    expected = (p.exp() * (p - q)).sum() / 10
    torch.testing.assert_close(kl, expected)
    (3 * kl).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_kl_of_equal_distributions_is_zero_whatever_the_shift_of_the_logits():
    logits = torch.randn(5, 7)
    assert abs(losses.kl_divergence(logits, logits + 3).item()) < 1e-6


@pytest.mark.parametrize("shapes", [((4, 7), (4, 8)), ((0, 7), (0, 7)), ((2, 3, 7), (2, 3, 7))])
def test_kl_names_the_shapes_it_cannot_compare(shapes):
    with pytest.raises(ValueError, match=r"reference and logits must both be \[N, V\]"):
        losses.kl_divergence(*map(torch.randn, shapes))


def test_kl_agrees_with_torch_in_reduced_precision():
    reference, logits = torch.randn(2, 6, 9).bfloat16()
    expected = F.kl_div(
        logits.float().log_softmax(-1), reference.float().log_softmax(-1), log_target=True, reduction="sum"
    )
    torch.testing.assert_close(losses.kl_divergence(reference, logits), expected / 6)
