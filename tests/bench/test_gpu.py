"""The GPU queue, rehearsed without a GPU: every step starts, and a run that is cut keeps its rows."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from bench import ROOT, gpu, machine, rows, unbuilt

STAND_INS = {
    "nvidia-smi": "echo 580.00.01",
    "compute-sanitizer": 'while [ "${1#--}" != "$1" ]; do shift 2; done; exec "$@"',
}


@pytest.fixture
def path_with_stand_ins(tmp_path, monkeypatch):
    """Programs of a GPU machine, as scripts in front of the others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NEUMUTER_COMMIT", "1234abcd")


def command(folder, *arguments):
    return [sys.executable, "-m", "bench.gpu", *arguments, "--rehearse", "--out", str(folder)]


def results(folder):
    return [row for path in folder.glob("*.jsonl") for row in rows.read(path)]


def statuses(folder):
    return {row["step"]: row["status"] for row in results(folder) if row["benchmark"] == "queue"}


def test_steps_run_and_their_rows_never_look_like_a_gpus(tmp_path, path_with_stand_ins):
    folder = tmp_path / "results"
    done = subprocess.run(
        command(folder, "check", "launch", "memcheck"), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert statuses(folder) == {"check": "done", "launch": "done", "memcheck": "done"}
    found = results(folder)
    assert {row["op"] for row in found if row["benchmark"] == "check"} >= {"masked_ffn", "select_muted"}
    assert all(row["machine"]["commit"] == "1234abcd" for row in found)
    if not torch.cuda.is_available():
        assert all(row["machine"]["gpu"] is None and row["machine"]["driver"] is None for row in found)
        assert not list(folder.glob("nvidia*"))


@pytest.fixture
def queue(tmp_path, monkeypatch, path_with_stand_ins):
    """Runs the queue in this process; its steps' commands are recorded and give what ``answers`` says."""
    ran, answers = [], {}

    def run(command, seconds, environment):
        ran.append((command, seconds, environment))
        return answers.get(command[2] if command[1] == "-m" else command[0], "done")

    def start(*arguments):
        ran.clear()
        monkeypatch.setattr("sys.argv", command(tmp_path / "results", *arguments)[2:])
        return gpu.main()

    threads = torch.get_num_threads()
    monkeypatch.setattr(gpu, "_run", run)
    monkeypatch.setattr("sys.path", list(sys.path))
    for name in ("PYTHONPATH", "PYTHONUNBUFFERED"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    start.ran, start.answers, start.folder = ran, answers, tmp_path / "results"
    yield start
    torch.set_num_threads(threads)


def test_every_step_starts_in_the_order_of_its_worth_and_once(queue):
    assert queue() == 0
    names = [step.name for step in gpu.STEPS]
    assert list(statuses(queue.folder)) == names
    worth = ["check", "kernels", "step", "decode", "serve", "launch", "memcheck", "select"]
    assert [name for name in names if name in worth] == worth
    for step, (_, seconds, _) in zip(gpu.STEPS, queue.ran, strict=True):
        assert gpu.limit_of(step, gpu.DEFAULT_SECONDS, False) == step.seconds
        assert gpu.limit_of(step, 7, False) == 7
        # A rehearsal has all the time that is left.
        assert step.seconds < seconds <= gpu.DEFAULT_SECONDS
    assert queue() == 0
    assert queue.ran == []
    assert queue("--fresh") == 0
    assert len(queue.ran) == len(names)
    assert all("--fresh" in command for command, *_ in queue.ran if command[1:3] == ["-m", "bench"])


def test_what_failed_or_was_cut_or_is_missing_runs_again(queue, monkeypatch):
    queue.answers["compute-sanitizer"] = "failed: exit status 1"
    assert queue("check", "memcheck") == 1
    assert statuses(queue.folder) == {"check": "done", "memcheck": "failed: exit status 1"}
    queue.answers.clear()
    assert queue("check", "memcheck") == 0
    assert [command[0] for command, *_ in queue.ran] == ["compute-sanitizer"]
    monkeypatch.setenv("PATH", "")
    assert queue("racecheck") == 0
    assert statuses(queue.folder)["racecheck"] == "not run: compute-sanitizer missing"
    assert queue("--seconds", "0", "select") == 0
    assert statuses(queue.folder)["select"] == "not run: no time left"
    monkeypatch.setattr(unbuilt, "is_built", lambda: False)
    monkeypatch.setattr(unbuilt, "define", lambda: None)
    assert queue("select", "decode") == 0
    assert statuses(queue.folder)["select"] == "not run: the extension missing"
    assert statuses(queue.folder)["decode"] == "done without the extension"


def test_other_code_is_measured_again(queue, monkeypatch):
    assert queue("check") == 0
    monkeypatch.setattr(machine, "digest", lambda *patterns: "changed")
    assert queue("check") == 0
    assert len(queue.ran) == 1
    assert len(results(queue.folder)) == 1


def test_a_step_over_its_time_is_cut():
    """Else the test would not end."""
    assert gpu._run(["sleep", "infinity"], 0.1, os.environ).startswith("cut after")


def test_a_run_that_is_killed_keeps_its_rows_and_the_next_goes_on(tmp_path, path_with_stand_ins):
    folder = tmp_path / "results"
    process = subprocess.Popen(command(folder, "select"), cwd=ROOT, start_new_session=True)
    while not (before := [row for row in results(folder) if row["benchmark"] == "select"]):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # with what it started
    process.wait()
    assert "select" not in statuses(folder)
    assert subprocess.run(command(folder, "select"), cwd=ROOT).returncode == 0
    after = results(folder)
    assert after[: len(before)] == before  # measured once
    assert sum(row["benchmark"] == "select" for row in after) == 2
    assert statuses(folder) == {"select": "done"}


def test_a_case_that_raises_does_not_end_the_benchmark(tmp_path, capsys):
    def cases():
        yield {"op": "bad"}, lambda: 1 / 0
        yield {"op": "good"}, lambda: {"value": 1}

    path = tmp_path / "rows.jsonl"
    assert [row and row["op"] for row in rows.measure(cases(), path, {"gpu": None})] == [None, "good"]
    assert [row["op"] for row in rows.read(path)] == ["good"]
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_a_wrong_row_is_measured_again_and_a_wrong_baseline_is_not(tmp_path):
    path, record, found = tmp_path / "rows.jsonl", {"gpu": None}, {"error": "far off"}
    cases = [({"op": "one"}, lambda: dict(found))]
    ours, theirs = {"name": "ours"}, {"name": "theirs", "failed": "far off"}
    (row,) = rows.measure(cases, path, record)
    assert rows.is_wrong(row)
    found["error"] = None
    (row,) = rows.measure(cases, path, record)
    assert not rows.is_wrong(row)
    assert rows.read(path) == [row]
    assert list(rows.measure(cases, path, record)) == []
    assert rows.is_wrong({"contenders": [ours | {"failed": "far off"}, theirs]})
    assert not rows.is_wrong({"contenders": [ours, theirs]})


def test_the_driver_is_asked_of_nvidia_smi(path_with_stand_ins, monkeypatch):
    assert machine.driver() == "580.00.01"
    monkeypatch.setenv("PATH", "")
    assert machine.driver() is None


# --- Without the extension -------------------------------------------------------------------


def test_schemas_without_the_extension_are_those_of_the_extension():
    names = [schema.split("(")[0] for schema in unbuilt.schemas()]
    assert len(names) == len(set(names))
    for name, schema in zip(names, unbuilt.schemas(), strict=True):
        known = torch._C.parse_schema(f"neumuter::{schema}")
        assert getattr(torch.ops.neumuter, name).default._schema == known
    registered = {
        n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("neumuter::")
    }
    assert set(names) == registered


def test_triton_kernels_run_without_the_extension():
    """In a process of its own, in Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    code = """
from bench import unbuilt
unbuilt.define()
import json, torch
from neumuter_kernels import _C, selftest
from tests.kernels.backends import use
# Of these, interpreted kernels round otherwise; and they would take most of the time.
del selftest.TOLERANCE[torch.bfloat16], selftest.TOLERANCE[torch.float16]
with use("triton") as device:
    found = {r.op: r.error for r in selftest.run(device) if r.op not in unbuilt.LEFT_OUT}
print(json.dumps([_C.cpu_capability(), found]))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    capability, found = json.loads(done.stdout)
    assert capability == "not built"
    assert found == dict.fromkeys(("masked_ffn", "hard_concrete", "cross_entropy_", "kl_divergence_"))
