"""Commands in several processes: one prints and writes, and an error is one message."""

import json
import re

import pytest

import neumuter
from neumuter.cli import processes
from tests.models import tokenizer
from tests.neumuter import jobs
from tests.neumuter.launching import end


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


def test_one_process_prints_and_writes(folder):
    ended = end(jobs.command, 2, folder, *unlearn(folder, "two"))
    report = json.loads((folder / "two" / "report.json").read_text())
    # A launcher ends all as soon as one ends with another code than 0.
    assert [code for code, _ in ended] == [3 if report["leaks"] else 0, 0]
    assert ended[0][1].count(report["verdict_sentence"]) == 1
    assert "Finding neurons" in ended[0][1]
    assert not ended[1][1]
    mutes = neumuter.MuteSet.load(folder / "two" / "mutes.safetensors")
    assert mutes.count == 30
    assert len(list((folder / "two").iterdir())) == 4


@pytest.mark.parametrize("forget", ["absent.jsonl", "forget.jsonl{rank}"])
def test_an_error_of_all_or_of_one_is_one_message(folder, forget):
    (folder / "forget.jsonl0").write_bytes((folder / "forget.jsonl").read_bytes())
    ended = end(jobs.command, 2, folder, *unlearn(folder, "failed", forget))
    assert {code for code, _ in ended} == {1}
    told = "".join(log for _, log in ended)
    assert told.count("error:") == 1
    assert "No such file" in told
    assert "Traceback" not in told
    assert not (folder / "failed").exists()


def test_other_commands_run_in_one_process(folder):
    ended = end(jobs.command, 2, folder, "inspect", str(folder / "absent"))
    assert [code for code, _ in ended] == [2, 0]
    assert "neumuter inspect runs in one process" in re.sub(r"\s+", " ", ended[0][1])
    assert not ended[1][1]


def test_places_that_several_processes_cannot_share(monkeypatch):
    monkeypatch.setattr(processes, "count_processes", lambda: 2)
    for options, message in (({"device_map": "auto"}, "device-map"), ({"device": "cuda:1"}, "must be cpu")):
        with pytest.raises(processes.typer.BadParameter, match=message):
            processes.check_place(**{"device": None, "device_map": None} | options)


def test_processes_end_after_the_one_that_writes(folder):
    ended = end(jobs.write_slowly, 2, folder, folder)
    assert [code for code, _ in ended] == [3, 0]
    assert float((folder / "1").read_text()) > float((folder / "0").read_text())
