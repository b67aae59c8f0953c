import pytest
import torch

from neumuter.training import losses


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
    loss = losses.hinge(values, 3.0).mean()
    loss.backward()
    assert loss.item() == pytest.approx((2.5 + 1.0) / 3)
    torch.testing.assert_close(values.grad, torch.tensor([-1 / 3, -1 / 3, 0.0]))


def test_odds_hinge_is_that_of_the_log_odds_and_its_gradient_does_not_vanish():
    logits = torch.randn(5, 7, dtype=torch.float64) * 3
    logits[:, 2] = torch.tensor([-4.0, 0.0, 3.0, 6.0, 30.0])  # from forgotten to known by heart
    logits.requires_grad_()
    token = logits.log_softmax(-1)[:, 2]
    others = logits[:, [0, 1, 3, 4, 5, 6]].logsumexp(-1)
    plain = (1.5 + logits[:, 2] - others).relu()
    (expected,) = torch.autograd.grad(plain[:4].sum() / 5, logits)
    losses.odds_hinge(-token, 1.5).mean().backward()
    torch.testing.assert_close(losses.odds_hinge(-token.detach()[:4], 1.5), plain[:4].detach())
    torch.testing.assert_close(logits.grad[:4], expected[:4])
    assert (logits.grad[:, 2] > 0).tolist() == [bool(x > 0) for x in plain]
    exact = losses.odds_hinge(torch.zeros(2, requires_grad=True), 1.0)
    assert exact.isfinite().all()


PLACES = torch.tensor([3, 4, 5, 6, 9, 10, 40, 0])
CEILINGS = torch.tensor([-6.0, -2.0, torch.inf, -1.0, -1.0, 0.0, -torch.inf, 0.0])


def test_runs_are_neighbouring_tokens_that_identify_a_text():
    assert losses.find_runs(PLACES, CEILINGS).tolist() == [0, 0, 1, 2, 3, 4, 5, 6]
    assert losses.find_runs(PLACES, torch.full([8], -6.0)).tolist() == [0, 0, 0, 0, 1, 1, 2, 3]
    # Of which nothing is known, each stands for itself.
    assert losses.find_runs(PLACES, torch.full([8], -torch.inf)).tolist() == [*range(8)]
    assert not len(losses.find_runs(PLACES[:0], CEILINGS[:0]))
    long = losses.find_runs(torch.arange(3, 24), torch.full([21], -6.0))
    assert long.tolist() == [0] * 8 + [1] * 8 + [2] * 5


def test_a_run_is_as_near_to_being_forgotten_as_its_nearest_token():
    odds = torch.tensor([2.0, -1.0, 3.0, 4.0])
    assert losses.find_nearest(odds, torch.tensor([0, 0, 0, 1])).tolist() == [-1, -1, -1, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tokens_of_a_run_that_are_nearest_count_most(dtype):
    odds = torch.tensor([7.0, 2.0, -1.0, 3.0, 90.0, -90.0, 5.0, 0.0], dtype=dtype)
    found = losses.weigh_runs(odds, losses.find_runs(PLACES, torch.full([8], -6.0)))
    parts = [torch.softmax(-part, 0) * len(part) for part in odds.double().split([4, 2, 1, 1])]
    torch.testing.assert_close(found, torch.cat(parts).to(dtype), rtol=1e-5, atol=1e-8)
    # Those that do not identify the text are not in any run.
    assert losses.weigh_runs(odds, losses.find_runs(PLACES, CEILINGS))[2:].tolist() == [1.0] * 6
    assert not len(losses.weigh_runs(odds[:0], PLACES[:0]))


def test_weights_do_not_depend_on_the_order_of_texts():
    odds = torch.randn(60) * 5
    places = torch.arange(60) + 5 * (torch.arange(60) // 6)
    texts = torch.randperm(10)
    order = (texts[:, None] * 6 + torch.arange(6)).flatten()
    runs = losses.find_runs(places, torch.full([60], -6.0))
    assert torch.equal(losses.weigh_runs(odds, runs)[order], losses.weigh_runs(odds[order], runs))
