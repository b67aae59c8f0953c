"""One job in several processes, which share the samples of each step: the result is that of one process."""

import copy
import functools
import json

import pytest
import torch

import neumuter
from tests.neumuter import jobs
from tests.neumuter.launching import run

# The families, the numbers of processes, and the jobs that run whole.
SHARED = [
    ("llama", 2, ("modulate", "mute", "paper", "auto")), ("llama", 4, ("modulate",)),
    ("mixtral", 2, ("modulate",)), ("qwen3_moe", 4, ("mute",)), ("gpt_neo", 2, ("modulate",)),
    ("phi3", 2, ()),
]  # fmt: skip


trained = functools.cache(jobs.trained)


@functools.cache
def alone(name):
    return jobs.gradients(copy.deepcopy(trained(name)))


@functools.cache
def alone_job(name, job):
    return jobs.unlearn(copy.deepcopy(trained(name)), job)


@pytest.fixture(scope="module", params=SHARED, ids=lambda about: f"{about[0]}-{about[1]}")
def about(request, tmp_path_factory):
    name, processes, whole = request.param
    folder = tmp_path_factory.mktemp(f"{name}{processes}")
    torch.save(trained(name), folder / "model")
    run(jobs.shared, processes, folder, folder / "model", whole, folder)
    return name, processes, whole, folder


def error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def test_gradients_are_those_of_one_process(about):
    name, processes, _, folder = about
    expected = alone(name)
    found = [torch.load(folder / f"gradients-{rank}") for rank in range(processes)]
    for what, value in expected.items():
        finite = value.isfinite()
        assert finite.any()
        for one in found:
            assert torch.equal(one[what].isfinite(), finite), what
            assert error(one[what][finite], value[finite]) < 1e-5, what
            assert torch.equal(one[what][finite], found[0][what][finite]), what


def test_whole_jobs_end_with_the_same(about):
    name, processes, whole, folder = about
    for job in whole:
        expected = alone_job(name, job)
        files = {(folder / f"{job}-{rank}" / "mutes.safetensors").read_bytes() for rank in range(processes)}
        assert len(files) == 1
        mutes = neumuter.MuteSet.load(folder / f"{job}-0" / "mutes.safetensors")
        assert mutes.layers.keys() == expected.mutes.layers.keys()
        for path, layer in expected.mutes.layers.items():
            assert torch.equal(mutes.layers[path].indices, layer.indices)
            torch.testing.assert_close(mutes.layers[path].gains, layer.gains, rtol=1e-4, atol=1e-4)
        report = json.loads((folder / f"{job}-0" / "report.json").read_text())
        for state in ("before", "after"):
            for metric, value in getattr(expected, state).items():
                assert abs(report[state][metric] - value) < 1e-4, (job, state, metric)
        assert (folder / f"{job}-folder" / "mutes.safetensors").is_file()
        if job == "modulate":
            resumed = {
                (folder / f"resumed-{rank}" / "mutes.safetensors").read_bytes() for rank in range(processes)
            }
            assert resumed == files
