"""A worker of the plug-in, with stand-ins for vLLM's linear layers and runners."""

from types import SimpleNamespace

import pytest
import torch

import neumuter
from neumuter.integrations.vllm import check, worker
from neumuter.integrations.vllm.rows import Rows
from neumuter.integrations.vllm.stamp import NO_SET
from neumuter.integrations.vllm.worker import WorkerMutes, admit, attach
from tests import models
from tests.engines.stand_ins import (
    LAYERS,
    WIDTH,
    Linear,
    Method,
    RunnerV1,
    RunnerV2,
    bytes_of,
    config_of,
    sets_of,
    step,
)


@pytest.fixture
def workers_of(monkeypatch):
    """Makes the workers of a model, one for each part of its neurons."""

    def make(model, size=1, runner=RunnerV1, share=0.25):
        ffns = neumuter.models.families.find_ffns(model)
        whole = {f"{ffn.path}.down_proj": Linear(ffn, 0, 1) for ffn in ffns}
        monkeypatch.setattr(worker, "_linears", lambda linears: linears)
        names = {}

        def project(down, inputs):
            return inputs @ whole[names[id(down.linear)]].weight.T

        monkeypatch.setattr(worker, "_project", project)
        found = []
        for rank in range(size):
            linears = {f"{ffn.path}.down_proj": Linear(ffn, rank, size) for ffn in ffns}
            names |= {id(linear): name for name, linear in linears.items()}
            inner = SimpleNamespace(
                model_runner=runner(linears),
                vllm_config=config_of(model),
                use_v2_model_runner=runner is RunnerV2,
            )
            wrapper = SimpleNamespace(worker=inner)
            attach(wrapper, share)
            # The op reads the rows of whichever worker chose last; here all are in one process.
            mutes = inner.neumuter_mutes
            mutes.check()
            admit(wrapper)
            found.append(inner)
        return found

    return make


@pytest.mark.parametrize("runner", [RunnerV1, RunnerV2])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_workers_together_compute_the_folded_layers(workers_of, tmp_path, size, runner):
    model = models.build("llama")
    sets = sets_of(model)
    data = {name: bytes_of(mutes, tmp_path / name) for name, mutes in zip("abc", sets, strict=True)}
    weights = {None: [ffn.down.weight.detach() for ffn in neumuter.models.families.find_ffns(model)]}
    for name, mutes in zip("abc", sets, strict=True):
        folded = models.build("llama")
        neumuter.fold(folded, mutes)
        weights[name] = [ffn.down.weight.detach() for ffn in neumuter.models.families.find_ffns(folded)]
    workers = workers_of(model, size, runner)
    asked = {"r1": "a", "r2": None, "r3": "b", "r4": "a", "r5": "c"}
    steps = [
        ({"r1": 3, "r2": 2}, ["r1", "r2"], []),
        ({"r1": 1, "r3": 4, "r2": 1}, ["r3"], []),
        ({"r3": 1}, [], []),  # the others wait, or were preempted
        ({"r1": 2, "r2": 1, "r4": 1, "r3": 1}, ["r4"], []),
        ({}, [], ["r1", "r2"]),
        ({"r3": 1, "r4": 1, "r5": 2}, ["r5"], []),
    ]
    for counts, new, finished in steps:
        hidden = torch.randn(max(1, sum(counts.values())), WIDTH)
        order = [asked[name] for name in sorted(counts, reverse=True) for _ in range(counts[name])]
        output = step(hidden, counts, {n: data[asked[n]] if asked[n] else NO_SET for n in new}, finished)
        parts = [one.model_runner.execute_model(output) for one in workers]
        if not counts:
            continue
        for number in range(LAYERS):
            expected = torch.stack(
                [row @ weights[name][number].T for row, name in zip(hidden, order, strict=True)]
            )
            torch.testing.assert_close(sum(part[number] for part in parts), expected, rtol=1e-5, atol=1e-5)
    mutes = workers[0].neumuter_mutes
    assert set(mutes._requests) == {"r3", "r4", "r5"}
    workers[0].model_runner.execute_model(step(torch.randn(1, WIDTH), {}, finished=["r3", "r4", "r5"]))
    assert not mutes._requests


def test_a_set_is_compared_once_and_only_the_last_ones_are_kept(workers_of, tmp_path, monkeypatch):
    model = models.build("llama")
    (one,) = workers_of(model)
    data = [bytes_of(mutes, tmp_path / "x") for mutes in sets_of(model, 3)]
    compared, compare = [], WorkerMutes.compare
    monkeypatch.setattr(
        WorkerMutes, "compare", lambda self, data: compared.append(data) or compare(self, data)
    )
    monkeypatch.setattr(worker, "MOST_KEPT", 2)
    for number, which in enumerate((0, 0, 1, 0, 2, 0, 1)):
        new, finished = {f"r{number}": data[which]}, [f"r{number - 1}"]
        one.model_runner.execute_model(step(torch.randn(1, WIDTH), {f"r{number}": 1}, new, finished))
    assert compared == [data[which] for which in (0, 1, 2, 1)]


def test_a_request_that_was_not_admitted_is_refused(workers_of):
    (one,) = workers_of(models.build("llama"))
    with pytest.raises(RuntimeError, match="without a word about its mute set"):
        one.model_runner.execute_model(step(torch.randn(1, WIDTH), {"r": 1}, {"r": None}))
    with pytest.raises(KeyError):
        one.model_runner.execute_model(step(torch.randn(1, WIDTH), {"unknown": 1}))


def test_a_set_of_another_model_never_runs(workers_of, tmp_path):
    model, other = models.build("llama"), models.build("llama", seed=1)
    (one,) = workers_of(model)
    (mutes,) = sets_of(other, 1)
    data = bytes_of(mutes, tmp_path / "x")
    assert "the down projection's weights differ" in one.compare_mute_set(data)[0]
    with pytest.raises(RuntimeError, match="does not fit the model"):
        one.model_runner.execute_model(step(torch.randn(1, WIDTH), {"r": 1}, {"r": data}))
    assert (
        "mute set" in one.compare_mute_set(bytes_of(sets_of(models.build("qwen2"), 1)[0], tmp_path / "y"))[0]
    )
    large = bytes_of(sets_of(model, 1, share=0.3)[0], tmp_path / "z")
    assert "and this server takes" in one.compare_mute_set(large)[0]
    assert one.compare_mute_set(bytes_of(sets_of(model, 1)[0], tmp_path / "w")) == []


def test_a_replaced_quantisation_method_stops_the_worker(workers_of):
    """Reloading weights may put a new one in place."""
    (one,) = workers_of(models.build("llama"))
    next(iter(one.model_runner.linears.values())).quant_method = Method()
    with pytest.raises(RuntimeError, match="replaced the quantisation method"):
        one.model_runner.execute_model(step(torch.randn(1, WIDTH), {"r": 1}, {"r": NO_SET}))


def test_the_check_sees_what_does_not_mute(workers_of, monkeypatch):
    model = models.build("llama")
    mute, checking = Rows.mute, WorkerMutes._checking
    # All layers have the same neurons in the check's set: another layer is told by its gains.
    monkeypatch.setattr(WorkerMutes, "_checking", lambda self: shifted(checking(self)))
    broken = [
        lambda self, hidden, layer: None,
        lambda self, hidden, layer: mute(self, hidden, (layer + 1) % LAYERS),
        lambda self, hidden, layer: (self.ids.fill_(self.ids[0].item()), mute(self, hidden, layer)),
    ]
    for function in broken:
        monkeypatch.setattr(Rows, "mute", function)
        with pytest.raises(RuntimeError, match=r"mute sets do not work in model\.layers\.0\.mlp"):
            workers_of(model)
    monkeypatch.setattr(Rows, "mute", mute)
    workers_of(model)


def shifted(shard):
    first, *rest = shard.layers
    return shard._replace(layers=(first._replace(gains=first.gains + 0.5), *rest))


def test_models_that_cannot_be_muted_are_refused(monkeypatch):
    monkeypatch.setattr(worker, "_linears", lambda linears: linears)
    missing = r"vLLM's model has no linear layer model.layers.0.mlp.down_proj of 72 inputs"
    for name, message in (("mixtral", "has experts"), ("llama", missing)):
        config = config_of(models.build(name))
        inner = SimpleNamespace(model_runner=RunnerV1({}), vllm_config=config, use_v2_model_runner=False)
        with pytest.raises(ValueError, match=message):
            attach(inner, 0.1)


def test_noise_is_told_from_change():
    one = [(3, -1.0), (4, -2.0)]
    assert check._distance(one, [(3, -1.5), (4, -2.25)]) == 0.5
    assert check._distance(one, [(3, -1.0), (5, -2.0)]) == float("inf")
    assert check._distance(one, one[:1]) == float("inf")
