"""The step benchmark: its contenders train the same thing."""

import pytest
import torch

from bench.models import step
from bench.timing import QUICK


def test_ours_and_the_official_algorithm_have_one_loss_and_one_gradient():
    model, *samples = step.build("tiny", torch.float32, "cpu")
    ours = step.Ours(step.sharing_weights(model), *samples)
    official = step.Official(step.sharing_weights(model), *samples)
    noise = [torch.rand_like(score).clamp(0.05, 0.95) for score in ours.parameters]
    (loss, gradient), (other_loss, other_gradient) = (s.gradients(noise) for s in (ours, official))
    assert gradient.norm() > 0
    torch.testing.assert_close(loss, other_loss)
    torch.testing.assert_close(gradient, other_gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


def test_a_wrong_gradient_is_noticed():
    model, *samples = step.build("tiny", torch.float32, "cpu")
    ours = step.Ours(step.sharing_weights(model), *samples)
    other = step.Official(step.sharing_weights(model), samples[1], samples[0])
    assert step.disagreement(ours, other, "cpu", torch.float32) is not None


def test_the_floor_stops_at_the_first_masked_layer():
    model, *samples = step.build("tiny", torch.float32, "cpu")
    floor = step.Floor(model, *samples)
    floor.train()
    assert floor.input.shape == (2, step.TOKENS, 64)
    assert not floor.input.grad_fn
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", step.CONTENDERS["cpu"])
def test_a_step_moves_all_parameters_and_no_weight(name):
    model, *samples = step.build("tiny", torch.float32, "cpu")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    contender = step.CONTENDERS["cpu"][name](step.sharing_weights(model), *samples)
    start = [p.detach().clone() for p in contender.parameters]
    contender.train()
    assert len(start) == 2
    assert all((p != s).any() for p, s in zip(contender.parameters, start, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_row_has_times_and_peaks_of_all(monkeypatch):
    """The floor's peak is measured, in a process of its own; tests/neumuter/test_plan.py has that of ours."""
    measure, asked = step.peak_mib, []

    def peak_mib(shape, dtype, name, device):
        asked.append(name)
        return measure(shape, dtype, name, device) if name == "floor" else len(asked) + 0.5

    monkeypatch.setattr(step, "peak_mib", peak_mib)
    ((_, measured),) = step.cases("cpu", QUICK, small=True)
    row = measured()
    entries = [*row["contenders"], row["limit"]]
    assert asked == [entry["name"] for entry in entries]
    assert [entry["peak_mib"] for entry in row["contenders"]] == [i + 1.5 for i in range(len(entries) - 1)]
    assert [entry["name"] for entry in entries] == [*step.CONTENDERS["cpu"], "floor"]
    for entry in entries:
        assert entry["median_us"] > 0
        assert entry["tokens_per_s"] == pytest.approx(400e6 / entry["median_us"])
    assert -20 < row["limit"]["peak_mib"] < 200
