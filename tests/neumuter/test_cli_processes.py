"""Commands in several processes: one prints and writes, and an error is one message."""

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_module
from transformers import AutoModelForCausalLM

import neumuter
from neumuter.cli import processes
from neumuter.cli.app import main
from neumuter.cli.arguments import check_size
from neumuter.models.layouts import check_layout, divide, make_distributed_config
from neumuter.outcome import MUTE_FILE
from neumuter.training.journal import UNFINISHED
from neumuter.training.processes import find_processes
from neumuter.training.tracing import _imagined as imagined
from tests.models import build, config, tokenizer
from tests.neumuter import jobs
from tests.neumuter.launching import end, end_twice, kill, run

KILLS, SEED = 4, 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("job")
    jobs.trained("llama").save_pretrained(made / "model")
    tokenizer().save_pretrained(made / "model")
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in jobs.PAIRS]
    (made / "forget.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (made / "retain.txt").write_text("\n\n".join(jobs.KEPT))
    return made


def unlearn(folder, out, forget="forget.jsonl", **more):
    options = {"--budget": 30, "--steps": 6, "--start-layer": 0, "--max-length": 32} | more
    files = {"--forget": folder / forget, "--retain": folder / "retain.txt", "--out": folder / out}
    return ["unlearn", str(folder / "model"), *(str(x) for pair in (files | options).items() for x in pair)]


@pytest.fixture(scope="module")
def two(folder):
    """What two processes ended with and printed, and the seconds that they took."""
    run(os.getcwd, 2, folder)  # by then the process has imported all of which they are forks
    start = time.perf_counter()
    ended = end(jobs.command, 2, folder, *unlearn(folder, "two"))
    return ended, time.perf_counter() - start


def test_one_process_prints_and_writes(folder, two):
    ended, _ = two
    report = json.loads((folder / "two" / "report.json").read_text())
    # A launcher ends all as soon as one ends with another code than 0.
    assert [code for code, _ in ended] == [3 if report["leaks"] else 0, 0]
    assert ended[0][1].count(report["verdict_sentence"]) == 1
    assert "Finding neurons" in ended[0][1]
    assert not ended[1][1]
    mutes = neumuter.MuteSet.load(folder / "two" / "mutes.safetensors")
    assert mutes.count == 30
    assert len(list((folder / "two").iterdir())) == 4


def test_accelerate_launch_starts_two_processes(folder):
    """By the line of the documentation; Accelerate keeps what each process prints."""
    page = (Path(__file__).parents[2] / "docs/many-gpus.md").read_text()
    start = shlex.split(re.search("^accelerate launch (.*) unlearn small-model", page, re.MULTILINE)[1])
    logs = ["--tee", "3", "--log_dir", str(folder / "logs"), "--main_process_port", "0"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *logs, *start]
    options = unlearn(folder, "accelerated", **{"--steps": 1, "--device": "cpu"})
    ended = subprocess.run([*launcher, *options], capture_output=True, text=True)
    report = json.loads((folder / "accelerated" / "report.json").read_text())
    assert ended.returncode == int(report["leaks"]), ended.stderr
    printed = {int(file.parent.name): file.read_text() for file in (folder / "logs").rglob("stdout.log")}
    assert printed.keys() == {0, 1}
    assert printed[0].count(report["verdict_sentence"]) == 1
    assert not printed[1]
    assert len(list((folder / "accelerated").iterdir())) == 4


def test_processes_that_are_killed_at_random_moments_go_on(folder, two):
    """Both are killed; a run that has ended before begins anew."""
    whole, seconds = (folder / "two" / MUTE_FILE).read_bytes(), two[1]
    out, draw, interrupted = folder / "killed", random.Random(SEED), 0
    job = (jobs.saving_command, 2, folder, *unlearn(folder, "killed"), "--resume")
    while interrupted < KILLS:
        kill(seconds * draw.random(), *job)
        if (out / UNFINISHED).exists():
            interrupted += 1
        elif (out / MUTE_FILE).exists():
            assert (out / MUTE_FILE).read_bytes() == whole
            shutil.rmtree(out)
        else:  # nothing was found by then
            seconds *= 1.1
    ended = end(*job)
    assert ended[0][0] in (0, 3), ended[0][1]
    assert (out / MUTE_FILE).read_bytes() == whole


@pytest.mark.parametrize("forget", ["absent.jsonl", "forget{rank}.jsonl"])
def test_an_error_of_all_or_of_one_is_one_message(folder, forget):
    (folder / "forget0.jsonl").write_bytes((folder / "forget.jsonl").read_bytes())
    ended = end(jobs.command, 2, folder, *unlearn(folder, "failed", forget))
    assert {code for code, _ in ended} == {1}
    told = "".join(log for _, log in ended)
    assert told.count("error:") == 1
    assert "No such file" in told
    assert "Traceback" not in told
    assert not (folder / "failed").exists()


def test_processes_that_are_started_again_tell_their_error_too(folder):
    for ended in end_twice(jobs.command, 2, folder, *unlearn(folder, "failed", "absent.jsonl")):
        told = "".join(log for _, log in ended)
        assert {code for code, _ in ended} == {1}
        assert told.count("error:") == 1
        assert "No such file" in told


def test_other_commands_run_in_one_process(folder):
    ended = end(jobs.command, 2, folder, "inspect", str(folder / "absent"))
    assert [code for code, _ in ended] == [2, 0]
    assert "neumuter inspect runs in one process" in re.sub(r"\s+", " ", ended[0][1])
    assert not ended[1][1]


@pytest.mark.usefixtures("two")
def test_a_layout_splits_the_model(folder):
    ended = end(jobs.command, 2, folder, *unlearn(folder, "split", **{"--layout": "fsdp"}), "--recompute")
    assert ended[1] == (0, "")
    assert ended[0][0] in (0, 3), ended[0][1]
    whole, split = (
        neumuter.MuteSet.load(folder / out / "mutes.safetensors").layers for out in ("two", "split")
    )
    assert whole.keys() == split.keys()
    for path, layer in whole.items():
        assert torch.equal(layer.indices, split[path].indices)
        torch.testing.assert_close(layer.gains, split[path].gains, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(("layout", "processes"), [("tp", 2), ("fsdp", 2), ("fsdp+tp", 4)])
def test_a_split_model_is_evaluated(layout, processes, folder):
    files = {"--mute": folder / "two" / MUTE_FILE, "--forget": folder / "forget.jsonl"}
    files |= {"--retain": folder / "retain.txt", "--heldout": folder / "retain.txt"}
    given = ["evaluate", str(folder / "model"), *(str(x) for pair in files.items() for x in pair)]
    whole, split = folder / "whole.json", folder / f"{layout}.json"
    if not whole.exists():
        assert end(jobs.command, 1, folder, *given, "--max-length", "32", "--out", str(whole))[0][0] == 0
    options = ("--max-length", "32", "--layout", layout, "--out", str(split))
    ended = end(jobs.command, processes, folder, *given, *options)
    assert ended[1:] == [(0, "")] * (processes - 1)
    assert ended[0][0] == 0, ended[0][1]
    expected, found = (json.loads(file.read_text()) for file in (whole, split))
    assert ended[0][1].count(found["verdict_sentence"]) == 1
    for state in ("before", "metrics"):
        assert found[state] == pytest.approx(expected[state], rel=1e-4, abs=1e-4)
        assert found[state].keys() >= {"heldout_perplexity", "min_k_auc", "loss_auc"}
    assert found["metrics"]["heldout_kl"] > 0
    assert found["verdict"] == expected["verdict"]


def test_copies_of_a_model_are_not_evaluated(folder):
    ended = end(
        jobs.command, 2, folder, "evaluate", str(folder / "model"), "--forget", str(folder / "absent")
    )
    assert [code for code, _ in ended] == [2, 0]
    told = re.sub(r"[\s│]+", " ", ended[0][1])
    assert "of 2 processes would do the same work: split it with --layout fsdp, tp, fsdp+tp" in told


def test_places_that_several_processes_cannot_share(monkeypatch):
    monkeypatch.setattr(processes, "count_processes", lambda: 2)
    for options, message in (({"device_map": "auto"}, "device-map"), ({"device": "cuda:1"}, "must be cpu")):
        with pytest.raises(processes.typer.BadParameter, match=message):
            processes.check_place(**{"device": None, "device_map": None} | options)
    with pytest.raises(processes.typer.BadParameter, match="fsdp cannot be combined with --robust, --tasks"):
        processes.check_split(processes.Split.fsdp, None, None, robust=True, tasks="arc_easy", quantize=None)
    with pytest.raises(processes.typer.BadParameter, match="tp cannot be combined with --quantize"):
        processes.check_place(None, layout=processes.Layout.tp, **{"quantize": "4bit", "gguf-file": None})
    monkeypatch.setattr(processes, "count_processes", lambda: 1)
    with pytest.raises(processes.typer.BadParameter, match="fsdp splits the model over processes"):
        processes.check_place(None, layout=processes.Layout.fsdp)


@pytest.mark.parametrize(
    ("name", "layout", "count", "message"),
    [
        ("llama4", "tp", 2, r"would split the experts of model.layers.1.feed_forward.experts"),
        ("gpt_neo", "tp", 2, r"no plan for the layout 'tp' of GPTNeo"),
        ("llama", "tp", 4, r"2 key-value heads cannot be divided by 4 processes"),
        ("llama4", "fsdp+tp", 4, r"'fsdp\+tp' would split the experts"),
    ("gpt_neo", "fsdp+tp", 4, r"no plan for the layout 'tp' of GPTNeo"),
    ("llama", "fsdp+tp", 8, r"2 key-value heads cannot be divided by 4 processes"),
    ("llama", "fsdp+tp", 2, r"takes 4 processes or more"), ("llama", "fsdp+tp", 4, None),
    ("llama", "tp", 2, None), ("mixtral", "tp", 2, None), ("mixtral", "fsdp", 3, None),
        ("jetmoe", "ddp", 3, None),
        ("gemma3n", "tp", 2, r"which of them are active depends on all \(activation_sparsity_pattern\)"),
        ("gemma3n", "fsdp", 2, None),
    ],
)  # fmt: skip
def test_layouts_are_refused_before_a_model_is_loaded(name, layout, count, message):
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config(name))
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        check_layout(layout, network, count)


@pytest.mark.parametrize(
    ("name", "plan"),
    [("gpt2", "transformer.h.*"), ("gpt_neo", "transformer.h.*"), ("opt", None), ("llama", None)],
)
def test_layers_that_transformers_plan_does_not_name_are_added(name, plan):
    """Otherwise each process would gather the whole model."""
    found = make_distributed_config("fsdp", 2, build(name)).fsdp_plan
    assert found == ({plan: "free_full_weight"} if plan else None)


def test_tensor_parallelism_stays_in_a_machine(monkeypatch):
    assert divide("fsdp+tp", 6) == {"fsdp": 2, "tp": 3}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert divide("fsdp+tp", 6) == {"fsdp": 3, "tp": 2}
    assert divide("fsdp", 6) == {"fsdp": 6}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="got 6, of which a machine has 4"):
        divide("fsdp+tp", 6)


EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
TORCHAO = {
    "quant_method": "torchao",
    "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}},
}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
QUANTISED = [
    ("fsdp", EIGHT, "by bitsandbytes, and are not split"), ("tp", TORCHAO, "by torchao, and are not split"),
    ("ddp", EIGHT, "the result would depend on the number of processes"),
    ("ddp", EIGHT | {"llm_int8_threshold": 0.0}, None), ("ddp", TORCHAO, None),
    ("ddp", {"quant_method": "mxfp4"}, None),
    ("fsdp", {"quant_method": "mxfp4"}, "by mxfp4, and are not split"),
    ("ddp", FP8, None), ("fsdp", FP8, "by fp8, and are not split"), ("tp", FP8, "by fp8, and are not split"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "quantisation", "message"), QUANTISED)
def test_quantised_weights_are_refused_before_they_are_loaded(layout, quantisation, message, tmp_path):
    """A checkpoint that was saved quantised is refused by its config."""
    config("llama", quantization_config=quantisation).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        check_size(str(tmp_path), 0, 30, layout, 2)
    check_size(str(tmp_path), 0, 30)


@pytest.mark.parametrize(("layout", "quantisation", "message"), QUANTISED)
def test_quantised_weights_are_refused_in_a_process_group(layout, quantisation, message):
    model = build("llama")
    model.config.quantization_config = quantisation
    with imagined(2):
        if layout == "fsdp":
            fully_shard(model)
        elif layout == "tp":
            distribute_module(model, init_device_mesh("cpu", (2,)))
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            assert find_processes(model).count == 2
    assert find_processes(model) is None


@pytest.mark.parametrize(("quantize", "message"), [("8bit", "the result would depend"), ("4bit", None)])
def test_what_is_quantised_while_it_loads_is_refused_before(quantize, message, folder):
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        check_size(str(folder / "model"), 0, 30, "ddp", 2, quantize)


def test_an_older_transformers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.distributed.configuration_utils", None)
    with pytest.raises(ImportError, match=r"needs transformers.distributed.DistributedConfig\(fsdp_size"):
        make_distributed_config("fsdp", 2, build("llama"))


def test_what_a_launcher_did_not_set_is_named(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in processes.LAUNCHED[1:]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "absent"])
    assert stop.value.code == 1
    expected = "WORLD_SIZE is 2, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"
    assert expected in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_processes_end_after_the_one_that_writes(folder):
    ended = end(jobs.write_slowly, 2, folder, folder)
    assert [code for code, _ in ended] == [3, 0]
    assert float((folder / "1").read_text()) > float((folder / "0").read_text())


def test_a_signal_to_the_first_process_ends_all_without_a_crash(folder):
    ended = end(jobs.stop_the_first, 2, folder)
    assert ended == [(128 + signal.SIGTERM, ""), (1, "")]
