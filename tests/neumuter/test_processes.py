"""One job in several processes, which share the samples of each step: the result is that of one process."""

import copy
import functools
import json
import tempfile

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import neumuter
from neumuter.models.content import describe_model, digest_weights
from neumuter.models.families import find_ffns
from neumuter.mutes.fingerprint import distance
from neumuter.training.processes import find_processes
from neumuter.training.tracing import _imagined as imagined
from tests.models import build
from tests.neumuter import jobs
from tests.neumuter.launching import run

# The families, the layouts, the numbers of processes, and the jobs that run whole.
SHARED = [
    ("llama", "ddp", 2, ("modulate", "mute", "paper", "auto", "refit", "ranking", "differing", "spare")),
    ("llama", "ddp", 4, ("modulate",)),
    ("mixtral", "ddp", 2, ("modulate",)), ("qwen3_moe", "ddp", 4, ("mute",)),
    ("gpt_neo", "ddp", 2, ("modulate",)), ("phi3", "ddp", 2, ()),
    ("llama", "fsdp", 2, ("modulate", "elsewhere", "ranking")), ("llama", "fully_shard", 2, ("mute",)),
    ("mixtral", "fsdp", 2, ("modulate",)), ("qwen3_moe", "fsdp", 2, ()),
    ("llama", "fsdp", 4, ("modulate",)), ("gpt_oss", "fsdp", 2, ("modulate",)),
    ("gpt_neo", "fsdp", 2, ()), ("opt", "fsdp", 2, ()), ("gemma2", "fully_shard", 2, ()),
    ("mixtral", "tp", 2, ("modulate", "double")), ("qwen3_moe", "tp", 2, ()), ("gpt_oss", "tp", 2, ()),
    ("deepseek_v3", "tp", 2, ("modulate",)), ("deepseek_v3", "fsdp", 2, ()),
    ("llama", "4bit", 2, ("modulate",)), ("llama", "8bit", 2, ()), ("phi3", "int8", 2, ("modulate",)),
    ("llama", "int4", 2, ()),
    ("llama", "fsdp+tp", 4, ("modulate", "double")), ("mixtral", "fsdp+tp", 4, ("modulate",)),
    ("llama", "tp", 2, ("modulate", "mute", "double", "ranking", "differing")), ("phi3", "tp", 2, ()),
    ("gemma2", "tp", 2, ()), ("gpt_neox", "tp", 4, ("modulate",)),
]  # fmt: skip


trained = functools.cache(jobs.trained)


def whole(name, layout):
    """The model that one process has."""
    if layout not in jobs.QUANTISED:
        return copy.deepcopy(trained(name))
    with tempfile.TemporaryDirectory() as folder:
        trained(name).save_pretrained(folder)
        return jobs.quantised(folder, layout)


def kind(layout):
    """The layout where it changes what one process computes."""
    return layout if layout in jobs.QUANTISED else "ddp"


@functools.cache
def alone(name, layout):
    return jobs.gradients(whole(name, layout))


@functools.cache
def alone_job(name, layout, job):
    return jobs.unlearn(whole(name, layout), job)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Function: the folder of a case, whose processes run once."""

    @functools.cache
    def run_case(case):
        name, layout, processes, jobs_ = case
        jobs.need_library(layout)
        folder = tmp_path_factory.mktemp(f"{name}{processes}")
        trained(name).save_pretrained(folder / "model")
        if "elsewhere" in jobs_:
            jobs.kill_in_the_middle(whole(name, layout), folder / "alone")
        run(jobs.shared, processes, folder, folder / "model", layout, jobs_, folder)
        return folder

    return run_case


def having(*some):
    """Lists the cases in which one of these jobs runs, with that job."""
    found = [(case, job) for case in SHARED for job in some if job in case[3]]
    ids = ["-".join(map(str, (*case[:3], job))) for case, job in found]
    return pytest.mark.parametrize(("case", "job"), found, ids=ids)


def error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", SHARED, ids=lambda case: "-".join(map(str, case[:3])))
def test_gradients_are_those_of_one_process(case, shared):
    (name, layout, processes, _), folder = case, shared(case)
    expected = alone(name, kind(layout))
    found = [torch.load(folder / f"gradients-{rank}") for rank in range(processes)]
    for what, value in expected.items():
        finite = value.isfinite()
        assert finite.any()
        for one in found:
            assert torch.equal(one[what].isfinite(), finite), what
            # Ratios of squared gradients have several times the error of gradients, and tensor parallelism
            # rounds in other places.
            limit = 5e-5 if what == "fisher" else 3e-5 if "tp" in layout else 1e-5
            assert error(one[what][finite], value[finite]) < limit, what
            assert torch.equal(one[what][finite], found[0][what][finite]), what


@pytest.mark.parametrize("case", SHARED, ids=lambda case: "-".join(map(str, case[:3])))
def test_a_model_is_described_alike_in_every_layout(case, shared):
    """So a run goes on in another one, and processes can tell whether they hold the same model."""
    (name, layout, processes, _), folder = case, shared(case)
    model = whole(name, layout)
    for rank in range(processes):
        assert torch.load(folder / f"content-{rank}") == (describe_model(model), digest_weights(model))


@having("double")
def test_gradients_in_float64_are_those_of_one_process(case, job, shared):
    """Tensor parallelism changes rounding alone. Gains and their gradients are float32 here, too."""
    (name, layout, processes, _), folder = case, shared(case)
    expected = jobs.gradients(jobs.one_by_one(whole(name, layout)).double())
    for rank in range(processes):
        found = torch.load(folder / f"{job}-{rank}")
        for what, value in expected.items():
            finite = value.isfinite()
            assert error(found[what][finite], value[finite]) < 2e-7, what


def split_by_hand(model, mesh):
    """Tensor parallelism of the down projections."""
    for layer in model.model.layers:
        down = layer.mlp.down_proj
        down.weight = torch.nn.Parameter(distribute_tensor(down.weight, mesh, [Shard(1)]), False)


@pytest.mark.parametrize(
    ("names", "split", "sharded", "expected"),
    [
        (("fsdp", "tp"), True, True, 2), (("replicate", "shard"), False, True, 4),
        (("fsdp", "tp"), True, False, r"over a mesh of \(2,\) processes, but the process group has 4"),
    ],
)  # fmt: skip
def test_samples_are_shared_where_layers_are_not_split(names, split, sharded, expected):
    """Without FSDP2, nobody knows what those beyond tensor parallelism do."""
    model = build("llama").requires_grad_(False)
    with imagined(4):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        if split:
            split_by_hand(model, mesh["tp"])
        if sharded:
            fully_shard(model, mesh=mesh["fsdp"] if split else mesh)
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected):
                find_processes(model)
        else:
            assert find_processes(model).count == expected
        assert [ffn.mesh is not None for ffn in find_ffns(model)] == [split] * 3


def test_a_dimension_of_another_name_is_refused():
    model = build("llama").requires_grad_(False)
    with imagined(4):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        split_by_hand(model, mesh["model"])
        fully_shard(model, mesh=mesh["data"])
        with pytest.raises(ValueError, match=r"along dimensions \[1\] over \['model'\], which masks"):
            neumuter.attach(model)


@having(*jobs.JOBS)
def test_a_whole_job_ends_with_the_same(case, job, shared):
    (name, layout, processes, _), folder = case, shared(case)
    expected = alone_job(name, kind(layout), job)
    files = {(folder / f"{job}-{rank}" / "mutes.safetensors").read_bytes() for rank in range(processes)}
    assert len(files) == 1
    mutes = neumuter.MuteSet.load(folder / f"{job}-0" / "mutes.safetensors")
    assert mutes.architecture == expected.mutes.architecture
    for path, sketch in expected.mutes.fingerprint.items():
        assert distance(sketch, mutes.fingerprint[path]) < 1e-5
    jobs.check_same_but_for_rounding(mutes, expected.mutes)
    report = json.loads((folder / f"{job}-0" / "report.json").read_text())
    for state in ("before", "after"):
        for metric, value in getattr(expected, state).items():
            assert abs(report[state][metric] - value) < 1e-4, (state, metric)
    assert (folder / f"{job}-folder" / "mutes.safetensors").is_file()
    if job == "modulate" and layout in jobs.COPIES:
        resumed = {
            (folder / f"resumed-{rank}" / "mutes.safetensors").read_bytes() for rank in range(processes)
        }
        assert resumed == files


@having("elsewhere")
def test_a_job_that_one_process_began_ends_with_the_same(case, job, shared):
    (name, layout, processes, _), folder = case, shared(case)
    told = f"goes on after 3 steps. It ran in 1 process and goes on in {processes} processes ({layout}): sums"
    assert (folder / "0.log").read_text().count(told) == 1
    for rank in range(processes):
        found = neumuter.MuteSet.load(folder / f"{job}-{rank}" / "mutes.safetensors")
        jobs.check_same_but_for_rounding(found, alone_job(name, kind(layout), "modulate").mutes)


def test_the_first_process_says_what_another_lacks_memory_for(shared):
    told = "Process 1 took its samples 1 at a time, because more do not fit"
    said = [(shared(SHARED[0]) / f"{rank}.log").read_text() for rank in range(2)]
    assert [text.count(told) for text in said] == [1, 0]


def test_a_job_that_several_processes_began_ends_with_the_same(shared, caplog):
    name, layout, processes, _ = case = SHARED[0]
    resumed = jobs.resume(whole(name, layout), shared(case) / "begun")
    told = f"goes on after 3 steps. It ran in {processes} processes ({layout}) and goes on in 1 process: sums"
    assert caplog.text.count(told) == 1
    jobs.check_same_but_for_rounding(resumed.mutes, alone_job(name, kind(layout), "modulate").mutes)


@having("modulate")
def test_mutes_and_banks_serve_the_same(case, job, shared):
    (name, layout, processes, _), folder = case, shared(case)
    expected, _ = jobs.logits(whole(name, layout), alone_job(name, kind(layout), job).mutes)
    untouched = whole(name, layout)(jobs.texts("retain")["input_ids"][:2]).logits
    assert (expected[0] - untouched[0]).abs().max() > 0.01
    for rank in range(processes):
        for found in torch.load(folder / f"logits-{rank}"):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@having("ranking")
def test_a_ranking_goes_on_where_it_was(case, job, shared):
    (_, _, processes, _), folder = case, shared(case)
    files = {
        (folder / f"{name}-{rank}.safetensors").read_bytes()
        for name in ("whole", "ranked")
        for rank in range(processes)
    }
    assert len(files) == 1


@having("refit")
def test_a_refit_ends_with_the_same(case, job, shared):
    (name, _, processes, _), folder = case, shared(case)
    files = {(folder / f"{job}-{rank}.safetensors").read_bytes() for rank in range(processes)}
    assert len(files) == 1
    found = neumuter.MuteSet.load(folder / f"{job}-0.safetensors")
    expected = jobs.refit(copy.deepcopy(trained(name)))
    jobs.check_same_but_for_rounding(found, expected)
