import math

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


def test_log_odds_are_those_of_the_token_and_their_gradient_does_not_vanish():
    logits = torch.randn(5, 7, dtype=torch.float64) * 3
    logits[:, 2] = torch.tensor([-4.0, 0.0, 3.0, 6.0, 30.0])  # from forgotten to known by heart
    logits.requires_grad_()
    token = logits.log_softmax(-1)[:, 2]
    others = logits[:, [0, 1, 3, 4, 5, 6]].logsumexp(-1)
    plain = logits[:, 2] - others
    (expected,) = torch.autograd.grad(plain[:4].sum(), logits)
    losses.log_odds(-token).sum().backward()
    torch.testing.assert_close(losses.log_odds(-token.detach()[:4]), plain[:4].detach())
    torch.testing.assert_close(logits.grad[:4], expected[:4])
    torch.testing.assert_close(logits.grad[:4, 2], torch.ones(4, dtype=torch.float64))
    assert logits.grad[4, 2] > 0
    assert losses.log_odds(torch.zeros(2)).isfinite().all()


PLACES = torch.tensor([3, 4, 5, 6, 9, 10, 40, 0])
CEILINGS = torch.tensor([-6.0, -2.0, torch.inf, -1.0, -1.0, 0.0, -torch.inf, 0.0])


def test_runs_are_neighbouring_tokens_that_identify_a_text():
    assert losses.find_runs(PLACES, CEILINGS).tolist() == [0, 0, 1, 2, 3, 4, 5, 6]
    assert losses.find_runs(PLACES, torch.full([8], -6.0)).tolist() == [0, 0, 0, 0, 1, 1, 2, 3]
    # So are those of which nothing is known, but not both kinds together.
    assert losses.find_runs(PLACES, torch.full([8], -torch.inf)).tolist() == [0, 0, 0, 0, 1, 1, 2, 3]
    mixed = torch.tensor([-6.0, -torch.inf, -torch.inf, 1.0, -torch.inf])
    assert losses.find_runs(torch.arange(5), mixed).tolist() == [0, 1, 1, 2, 3]
    assert not len(losses.find_runs(PLACES[:0], CEILINGS[:0]))
    long = losses.find_runs(torch.arange(3, 24), torch.full([21], -6.0))
    assert long.tolist() == [0] * 8 + [1] * 8 + [2] * 5


def test_sums_go_from_each_token_to_the_end_of_its_run():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    runs = torch.tensor([0, 0, 1, 2, 2])
    assert losses.sum_runs(values, runs).tolist() == [3, 2, 4, 24, 16]
    assert losses.begin_runs(runs).tolist() == [True, False, True, True, False]
    assert losses.sum_runs(torch.ones(8), torch.zeros(8, dtype=torch.int64))[0] == losses.LONGEST_RUN
    assert not len(losses.sum_runs(values[:0], runs[:0]))
    assert not len(losses.begin_runs(runs[:0]))


def test_a_run_is_forgotten_as_a_whole():
    chances = torch.tensor([0.9, 0.5, 0.99, 0.2, 0.7, 0.6, 0.4, 0.9], dtype=torch.float64)
    token_losses = (-chances.log()).requires_grad_()
    ceilings = torch.full([8], -2.0, dtype=torch.float64)
    found = losses.hinge_runs(token_losses, ceilings, losses.find_runs(PLACES, ceilings), margin=1.0)
    for first, last in ((0, 4), (4, 6), (6, 7), (7, 8)):
        size = last - first
        allowed = torch.logit(torch.sigmoid(ceilings[:size]).prod()).clamp(min=losses.LEAST_ODDS)
        left = torch.logit(chances[first:last].prod()) - allowed
        torch.testing.assert_close(found[first].detach(), size * left.relu())
        assert (found[first + 1 : last] == 0).all()
    found[0].backward()
    # The share of each token in the gradient of log-odds with respect to its own logit.
    shares = -token_losses.grad[:4] * (1 - chances[:4])
    torch.testing.assert_close(shares / shares.sum(), (1 - chances[:4]) / (1 - chances[:4]).sum())
    assert (token_losses.grad[4:] == 0).all()


def test_a_run_is_forgotten_as_far_as_its_ceilings_allow():
    known = torch.tensor([0.01, 0.01, 4.0, 0.01, 0.01, 9.0])
    ceilings = torch.tensor([-torch.inf, 1.0, -1.0, torch.inf, -30.0, -30.0])
    runs = torch.arange(6)
    found = losses.hinge_runs(known.requires_grad_(), ceilings, runs, margin=3.0)
    odds = losses.log_odds(known.detach())
    expected = [odds[0] + 3, odds[1] - 1, 0, 0, odds[4] - losses.LEAST_ODDS, 0]
    torch.testing.assert_close(found.detach(), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert known.grad.isfinite().all()
    assert (known.grad[[2, 3, 5]] == 0).all()
    assert not len(losses.hinge_runs(known[:0], ceilings[:0], runs[:0], 1.0))


def test_what_may_stay_has_to_stay_likelier_than_not():
    token_losses = torch.tensor([0.01, 3.0, 3.0, 3.0, 3.0], requires_grad=True)
    ceilings = torch.tensor([2.0, 2.0, torch.inf, 0.0, -torch.inf])
    found = losses.hinge_runs(token_losses, ceilings, torch.arange(5), margin=1.0)
    lost = -losses.log_odds(token_losses.detach())[1]
    assert found[0] > 0
    torch.testing.assert_close(found[1:].detach(), torch.tensor([lost, lost, 0, 0]))
    found[1:].sum().backward()
    assert (token_losses.grad[1:3] > 0).all()
    assert (token_losses.grad[3:] == 0).all()


def test_where_nothing_is_known_a_run_is_forgotten_down_to_the_margin():
    """And its least likely token, which greedy decoding would say otherwise: which lacks more counts."""
    # Of one with a certain token for another, and of one of likely ones.
    chances = torch.tensor([*[0.999] * 7, 0.9, *[0.7] * 8, 0.3, 0.9, 0.1], dtype=torch.float64)
    unknown = torch.full([19], -torch.inf, dtype=torch.float64)
    runs = losses.find_runs(torch.arange(19), unknown)
    found = losses.hinge_runs(-chances.log(), unknown, runs, 3.0)
    product = torch.logit(0.999**7 * chances[7]) + 3
    torch.testing.assert_close(found[0], 8 * product)
    torch.testing.assert_close(found[8], 8 * (torch.logit(chances[8]) + 1))
    # The last one has a product of 0.027 and an unlikely token.
    assert found.count_nonzero() == 2
    # A ceiling can allow that its least token is likelier.
    pair, runs = -torch.tensor([0.45, 0.3], dtype=torch.float64).log(), torch.zeros(2, dtype=torch.int64)
    for ceiling, left in ((-0.5, 0.0), (-torch.inf, 2 * (math.log(0.3 / 0.7) + 1))):
        found = losses.hinge_runs(pair, torch.full_like(pair, ceiling), runs, 1.0)
        assert found.tolist() == pytest.approx([left, 0.0])


def test_the_odds_hinge_is_zero_once_a_token_is_unlikely_enough():
    values = torch.tensor([0.01, 2.0, 9.0])
    expected = (losses.log_odds(values) + 1.0).relu()
    torch.testing.assert_close(losses.odds_hinge(values, 1.0), expected)
    assert (expected > 0).tolist() == [True, False, False]


def test_what_is_left_of_a_run_does_not_depend_on_the_order_of_texts():
    values = torch.rand(60) * 5
    places = torch.arange(60) + 5 * (torch.arange(60) // 6)
    texts = torch.randperm(10)
    order = (texts[:, None] * 6 + torch.arange(6)).flatten()
    ceilings = torch.full([60], -6.0)
    found = losses.hinge_runs(values, ceilings, losses.find_runs(places, ceilings), 1.0)
    moved = losses.find_runs(places[order], ceilings)
    assert torch.equal(found[order], losses.hinge_runs(values[order], ceilings, moved, 1.0))


def test_one_token_that_changed_much_weighs_more_than_many_that_hardly_did():
    """d·(1 + 0.3·d) by hand, and its slope 1 + 0.6·d."""
    one, many = torch.tensor([2.0, 0.0, 0.0, 0.0]), torch.full([4], 0.5).requires_grad_()
    torch.testing.assert_close(losses.weigh_harm(one), torch.tensor([3.2, 0.0, 0.0, 0.0]))
    weighed = losses.weigh_harm(many)
    torch.testing.assert_close(weighed, torch.full([4], 0.575))
    weighed.sum().backward()
    torch.testing.assert_close(many.grad, torch.full([4], 1.3))
