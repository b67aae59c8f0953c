"""The plug-in's own logic, with stand-ins for vLLM: this needs no engine."""

import os
import subprocess
import sys

import pytest
import torch

from neumuter.integrations import vllm as plugin
from neumuter.integrations.vllm import folder
from neumuter.integrations.vllm.folder import MuteFolder, ServedSet
from neumuter.integrations.vllm.rows import UNMUTED, Rows
from neumuter.integrations.vllm.settings import read_settings
from neumuter.integrations.vllm.stamp import NO_SET, STAMP, data_of, salted, stamped
from neumuter.integrations.vllm.support import refuse_features, refuse_version
from neumuter.mutes.container import MuteFileError
from neumuter.mutes.mute_set import MutedLayer
from tests import models
from tests.engines.stand_ins import CPU, LAYERS, WIDTH, Params, bytes_of, config_of, sets_of

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
