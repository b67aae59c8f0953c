"""The plug-in's own logic, with stand-ins for vLLM: this needs no engine."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import neumuter
from neumuter.integrations import vllm as plugin
from neumuter.integrations.vllm import check, folder, worker
from neumuter.integrations.vllm.folder import MuteFolder, ServedSet
from neumuter.integrations.vllm.rows import UNMUTED, Rows
from neumuter.integrations.vllm.settings import read_settings
from neumuter.integrations.vllm.stamp import NO_SET, STAMP, data_of, salted, stamped
from neumuter.integrations.vllm.support import refuse_features, refuse_version
from neumuter.integrations.vllm.worker import WorkerMutes, admit, attach
from neumuter.mutes.container import MuteFileError
from neumuter.mutes.mute_set import MutedLayer
from neumuter.recipes import mute_random
from tests import models

CPU = torch.device("cpu")
LAYERS, WIDTH = models.LAYERS, models.WIDTH


def sets_of(model, count=3, share=0.2):
    with neumuter.attach(model, start_layer=0) as masked:
        return [mute_random(masked, share, seed) for seed in range(count)]


def bytes_of(mutes, path):
    mutes.save(path)
    return path.read_bytes()


# What the operator asks for.


def test_settings(tmp_path):
    given = {"NEUMUTER_VLLM_SETS": str(tmp_path), "OTHER": "x"}
    assert read_settings(given) == plugin.settings.Settings(tmp_path, True, 0.02)
    changed = read_settings(given | {"NEUMUTER_VLLM_REQUIRE": "0", "NEUMUTER_VLLM_SHARE": "0.5"})
    assert (changed.required, changed.share) == (False, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"NEUMUTER_VLLM_SETS": "nowhere"}, "must be a folder of mute files, got 'nowhere'"),
        ({"NEUMUTER_VLLM_SETS": ""}, "must be a folder of mute files"),
        ({"NEUMUTER_VLLM_REQUIRE": "no"}, "must be 0 or 1, got 'no'"),
        ({"NEUMUTER_VLLM_SHARE": "2"}, "must be a number above 0, up to 1, got '2'"),
        ({"NEUMUTER_VLLM_SHARE": "all"}, "must be a number above 0"),
        ({"NEUMUTER_VLLM_FOLDER": "x"}, "NEUMUTER_VLLM_FOLDER is not a setting"),
    ],
)
def test_other_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_settings({"NEUMUTER_VLLM_SETS": str(tmp_path)} | changes)


def test_it_touches_nothing_unless_asked_and_then_fails_loudly(tmp_path):
    code = "import sys, neumuter.integrations.vllm as plugin; plugin.register(); print('vllm' in sys.modules)"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("NEUMUTER_VLLM")}

    def run(**environment):
        return subprocess.run(
            [sys.executable, "-c", code], env=plain | environment, capture_output=True, text=True
        )

    assert run().stdout == "False\n"
    # vLLM catches nothing that register raises: here vLLM is not installed, or the setting is wrong.
    assert run(NEUMUTER_VLLM_REQUIRE="1").returncode != 0


@pytest.mark.parametrize("version", ["0.32.0", "0.32.7+cpu", "0.32.1rc1"])
def test_tested_versions_are_served(version):
    refuse_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0", "dev"])
def test_other_versions_are_refused(version):
    with pytest.raises(RuntimeError, match=r"served by vLLM 0.32 up to, not including, 0.33, and this is"):
        refuse_version(version)


def config_of(model, tokens=32):
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, prefill_context_parallel_size=1, decode_context_parallel_size=1,
            enable_dbo=False, num_ubatches=0,
        ),
        model_config=SimpleNamespace(
            hf_config=model.config, dtype=torch.float32, quantization=None, is_encoder_decoder=False,
            is_multimodal_model=False, runner_type="generate",
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=tokens),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        speculative_config=None,
        kv_transfer_config=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("parallel_config.pipeline_parallel_size", 2, "pipeline parallelism"),
        ("parallel_config.prefill_context_parallel_size", 2, "prefill context parallelism"),
        ("parallel_config.decode_context_parallel_size", 2, "decode context parallelism"),
        ("parallel_config.enable_dbo", True, "dual batch overlap"),
        ("parallel_config.num_ubatches", 2, "dual batch overlap"),
        ("speculative_config", object(), "speculative decoding"),
        ("cache_config.kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill"),
        ("kv_transfer_config", object(), "a KV connector"),
        ("model_config.is_encoder_decoder", True, "an encoder"),
        ("model_config.is_multimodal_model", True, "multimodal models"),
        ("model_config.runner_type", "pooling", "pooling models"),
    ],
)
def test_features_that_it_was_not_written_for_are_refused(path, value, message):
    config = config_of(models.build("llama"))
    refuse_features(config)
    *place, name = path.split(".")
    setattr(getattr(config, place[0]) if place else config, name, value)
    with pytest.raises(ValueError, match=f"cannot be served with {message}"):
        refuse_features(config)


# The folder, and how a set travels.


def test_a_set_is_read_when_asked_for_and_again_when_its_file_changes(tmp_path, monkeypatch):
    first, second = sets_of(models.build("llama"), 2)
    found = MuteFolder(tmp_path)
    with pytest.raises(KeyError):
        found.find("alice")
    data = bytes_of(first, tmp_path / "alice.safetensors")
    assert found.find("alice").data == data
    reads = []
    monkeypatch.setattr(folder.MuteSet, "from_bytes", lambda data: reads.append(data))
    assert found.find("alice") is found.find("alice")
    assert reads == []
    other = bytes_of(second, tmp_path / "alice.safetensors")
    assert found.find("alice") == ServedSet("alice", other, folder.digest_of(other))
    assert reads == [other]
    (tmp_path / "alice.safetensors").unlink()
    with pytest.raises(KeyError):
        found.find("alice")


def test_only_the_last_files_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "MOST_KEPT", 2)
    (mutes,) = sets_of(models.build("llama"), 1)
    found = MuteFolder(tmp_path)
    for name in ("a", "b", "c"):
        mutes.save(tmp_path / f"{name}.safetensors")
        found.find(name)
        found.find("a")
    assert list(found._kept) == ["c", "a"]


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".a", "a\0", "a" * 200, 3, ["a"], b"a", "a\n"])
def test_what_cannot_be_a_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="must be a name of letters"):
        MuteFolder(tmp_path).find(name)


def test_bad_files_are_refused(tmp_path):
    (tmp_path / "half.safetensors").write_bytes(b"\x00" * 40)
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name, message in (("half", "half.safetensors is bad"), ("pipe", "is not a regular file")):
        with pytest.raises(MuteFileError, match=message):
            MuteFolder(tmp_path).find(name)


class Params:
    def __init__(self, extra_args=None):
        self.extra_args = extra_args

    def clone(self):
        return Params(None if self.extra_args is None else dict(self.extra_args))


def test_a_request_carries_the_bytes_of_its_set_whatever_it_sends_itself():
    mutes = ServedSet("alice", b"file", "digest")
    params = Params({"mute_set": "alice", STAMP: b"forged"})
    assert data_of(stamped(params, mutes)) == b"file"
    assert data_of(stamped(params, None)) == NO_SET
    assert params.extra_args[STAMP] == b"forged"
    for unadmitted in (Params(), Params({"mute_set": "alice"}), Params({STAMP: "text"}), None):
        with pytest.raises(RuntimeError, match="without a word about its mute set"):
            data_of(unadmitted)


def test_salts_of_other_sets_differ():
    sets = [None, ServedSet("a", b"1", "d1"), ServedSet("a", b"2", "d2")]
    salts = [salted(mutes, salt) for mutes in sets for salt in (None, "x", "d1:", ":d1", "d1:x")]
    assert len(set(salts)) == len(salts)


# The rows of a step.


def layers_of(seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(LAYERS):
        indices = torch.randperm(WIDTH, generator=generator)[:count].sort().values.int()
        found.append(MutedLayer(indices, torch.randn(count, generator=generator)))
    return found


def muted_by_hand(hidden, sets, counts, number):
    expected, start = hidden.clone(), 0
    for one, count in zip(sets, counts, strict=True):
        if one is not None and one[1][number] is not None:
            layer = one[1][number]
            expected[start : start + count, layer.indices.long()] *= layer.gains
        start += count
    return expected


def test_rows_mute_each_token_by_its_set_at_the_same_addresses():
    rows = Rows(LAYERS, 3, 3 * LAYERS, 16, CPU)
    kept = {name: value.data_ptr() for name, value in vars(rows).items() if isinstance(value, torch.Tensor)}
    sets = [(str(i), layers_of(i)) for i in range(7)]
    sets[1] = ("1", [None, *layers_of(1)[1:]])
    for step in range(30):
        chosen = [sets[(step * 5 + i * 3) % 7] if i != step % 3 else None for i in range(3)]
        counts = [1 + step % 4, 2, 1 + step % 3]
        rows.choose(chosen, counts)
        hidden = torch.randn(sum(counts) + 2, WIDTH)
        for number in range(LAYERS):
            found = hidden.clone()
            rows.mute(found, number)
            # Padding behind the tokens of a step is not muted.
            assert torch.equal(found, muted_by_hand(hidden, [*chosen, None], [*counts, 2], number))
    assert kept == {
        name: value.data_ptr() for name, value in vars(rows).items() if isinstance(value, torch.Tensor)
    }
    rows.choose([], [])
    assert (rows.ids == UNMUTED).all()


def test_a_set_that_is_used_stays_and_the_one_unused_for_longest_goes(monkeypatch):
    rows = Rows(LAYERS, 2, 3 * LAYERS, 8, CPU)
    a, b, c = ((name, layers_of(i)) for i, name in enumerate("abc"))
    written, write = [], rows._write
    monkeypatch.setattr(rows, "_write", lambda digest, *rest: written.append(digest) or write(digest, *rest))
    for step in ([a], [b], [a], [c], [a, c], [c, a, c], [b, c]):
        rows.choose(step, [1] * len(step))
    assert written == ["a", "b", "c", "b"]


def test_what_does_not_fit_is_refused():
    rows = Rows(LAYERS, 2, 3 * LAYERS, 8, CPU)
    with pytest.raises(ValueError, match="does not fit a slot"):
        rows.choose([("a", layers_of(0, 4))], [1])
    assert not rows._slots
    with pytest.raises(ValueError, match="lower vLLM's --max-num-seqs or NEUMUTER_VLLM_SHARE"):
        Rows(LAYERS, 2**16, 2**16, 8, CPU)


# A worker, with stand-ins for vLLM's linear layers and runners.


class Method:
    def apply(self, linear, hidden, bias=None):
        return hidden @ linear.weight.T


class Linear:
    def __init__(self, ffn, rank, size):
        weight = ffn.down.weight.detach()
        part = weight.shape[1] // size
        self.weight = weight[:, rank * part : (rank + 1) * part]
        self.tp_rank, self.tp_size, self.input_size, self.input_size_per_partition = rank, size, WIDTH, part
        self.quant_method = Method()


class RunnerV1:
    """Runs each layer on the given activations of a step's tokens, [T, F] of all workers."""

    device = CPU

    def __init__(self, linears):
        self.linears, self.input_batch = linears, SimpleNamespace(req_ids=[])

    def get_model(self):
        return self.linears

    def execute_model(self, output):
        # The order of the batch is not that of the scheduler.
        self.input_batch.req_ids = [*sorted(output.num_scheduled_tokens, reverse=True), "left over"]
        counts = np.array([output.num_scheduled_tokens[i] for i in self.input_batch.req_ids[:-1]])
        if len(counts):
            assert self._prepare_inputs(output, counts) == "prepared"
        return self.run(output.hidden)

    def _prepare_inputs(self, output, counts):
        return "prepared"

    def run(self, hidden):
        found = []
        for linear in self.linears.values():
            start = linear.tp_rank * linear.input_size_per_partition
            own = hidden[:, start : start + linear.input_size_per_partition].clone()
            found.append(linear.quant_method.apply(linear, own, None))
        return found


class RunnerV2(RunnerV1):
    def execute_model(self, output, dummy_run=False):
        batch = self.prepare_inputs(output, None)
        return self.run(output.hidden) if batch.req_ids else None

    def prepare_inputs(self, output, state):
        names = sorted(output.num_scheduled_tokens, reverse=True)
        counts = np.array([output.num_scheduled_tokens[name] for name in names])
        return SimpleNamespace(req_ids=names, num_scheduled_tokens=counts)


def step(hidden, counts, new=(), finished=()):
    added = [
        SimpleNamespace(req_id=name, sampling_params=Params(None if data is None else {STAMP: data}))
        for name, data in dict(new).items()
    ]
    return SimpleNamespace(
        scheduled_new_reqs=added, finished_req_ids=set(finished), num_scheduled_tokens=counts, hidden=hidden
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
