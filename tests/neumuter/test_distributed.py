"""Real processes on the CPU: the same gates and the same mute set for any number of them."""

import importlib.util

import pytest
import torch

import neumuter
from neumuter.training.gates import INITIAL_SCORE
from tests.neumuter import distributed
from tests.neumuter.launching import run


def launch(how, processes, folder, name="llama"):
    """Runs tests/neumuter/distributed.py; returns the mute set and the scores."""
    run(distributed.main, processes, folder, how, name, folder)
    made = folder / f"{how}-{processes}"
    return neumuter.MuteSet.load(made.with_suffix(".mute")), torch.load(made.with_suffix(".pt"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return launch("ddp", 1, tmp_path_factory.mktemp("alone"))


WAYS = [("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("tp", 2), ("deepspeed", 2)]


@pytest.mark.parametrize(("how", "processes"), WAYS)
def test_one_result_for_any_number_of_processes(how, processes, alone, tmp_path):
    if not importlib.util.find_spec("deepspeed" if how == "deepspeed" else "torch"):
        pytest.skip(f"{how} is not installed")
    mutes, scores = launch(how, processes, tmp_path)
    expected, wanted = alone
    assert (mutes.architecture, mutes.widths) == (expected.architecture, expected.widths)
    assert mutes.fingerprint == expected.fingerprint
    assert mutes.layers.keys() == expected.layers.keys()
    for path, layer in mutes.layers.items():
        assert torch.equal(layer.indices, expected.layers[path].indices)
        # Gradients are summed in another order.
        torch.testing.assert_close(layer.gains, expected.layers[path].gains, rtol=1e-5, atol=1e-5)
    for path, score in scores.items():
        assert (score - wanted[path]).abs().max() < 1e-5
        assert (score - INITIAL_SCORE).abs().max() > 0.1


def test_tensor_parallel_packed_ffns(tmp_path):
    """Phi-3 gathers gate and up before they are split again."""
    expected, wanted = launch("ddp", 1, tmp_path, "phi3")
    mutes, scores = launch("tp", 2, tmp_path, "phi3")
    for path, layer in mutes.layers.items():
        assert torch.equal(layer.indices, expected.layers[path].indices)
        assert (scores[path] - wanted[path]).abs().max() < 1e-5


@pytest.fixture(scope="module")
def trained_alone(tmp_path_factory):
    return launch("trainer", 1, tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("processes", [2, 4])
def test_the_trainer_finds_the_same_neurons_of_the_demo_task(processes, trained_alone, tmp_path):
    """The demo's records on a small model, a step of four and one of three in each epoch."""
    expected, wanted = trained_alone
    mutes, scores = launch("trainer", processes, tmp_path)
    for path, layer in expected.layers.items():
        assert torch.equal(layer.indices, mutes.layers[path].indices)
        torch.testing.assert_close(layer.gains, mutes.layers[path].gains, rtol=1e-3, atol=1e-3)
    for path, score in wanted.items():
        torch.testing.assert_close(scores[path], score, rtol=1e-3, atol=1e-3)
        assert (score - INITIAL_SCORE).abs().max() > 0.1
