"""Every script in examples/ runs as its docstring says, and says what is true."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from neumuter import MuteSet
from neumuter.demo.tutorial import write_tutorial

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """What `python -m neumuter.demo small` writes; the model comes from the demo's cache if it is there."""
    folder = tmp_path_factory.mktemp("examples") / "small"
    write_tutorial(folder)
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script in this process, which saves seconds of imports; returns the lines that it prints."""

    def run(script, *arguments):
        monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(FOLDER / script), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def said(line):
    """The two shares that the line of a state has: of what to forget, of what to keep."""
    return [int(share) / 100 for share in re.findall(r"(\d+)%", line)]


@pytest.mark.parametrize("script", ["trainer_user.py", "custom_loop_user.py"])
def test_a_training_user_sees_texts_forgotten_and_the_others_kept(script, small, run):
    lines = [line for line in run(script, small) if "word for word" in line]
    (forget, retain), (forgotten, kept) = map(said, lines)
    assert (forget, retain) == (1.0, 1.0)
    assert forgotten <= 0.34
    assert kept >= 0.7


def test_a_trl_user_sees_texts_forgotten_and_the_others_kept(small, run):
    pytest.importorskip("trl")
    lines = [line for line in run("trl_user.py", small) if "word for word" in line]
    assert [line.split(",")[0].split(":")[0] for line in lines] == [
        "before sft", "after sft", "before dpo", "after dpo"
    ]  # fmt: skip
    for before, after in (lines[:2], lines[2:]):
        assert said(before) == [1.0, 1.0]
        forgotten, kept = said(after)
        assert forgotten <= 0.34
        assert kept >= 0.7
    for name in ("sft", "dpo"):
        # What was found is for the base with its LoRA.
        assert MuteSet.load(small / f"{name}.safetensors").adapter


def test_a_kernel_user_finds_the_neurons_that_matter():
    """In a process of its own."""
    done = subprocess.run(
        [sys.executable, FOLDER / "kernel_user.py"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # more threads would only wait
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    whole, found, chance, difference = (float(line.split()[-1]) for line in done.stdout.splitlines())
    assert whole > 0.99
    assert found > chance + 0.05
    assert difference < 1e-4


def test_a_server_operator_mutes_each_tenants_own_texts(small, run):
    lines = run("server_operator.py", small)
    verdicts = [line.split()[:2] for line in lines[:9]]
    tenants = ["nobody", "north", "south"]
    assert verdicts[:3] == [[who, "forgotten" if who == "north" else "as"] for who in tenants]
    assert verdicts[3:6] == [[who, "forgotten" if who == "south" else "as"] for who in tenants]
    assert verdicts[6:] == [[who, "as"] for who in tenants]
    assert lines[9:] == [
        "removed meanwhile, still muted: True",
        "refused: there is no mute set 'north'; there are: south, east",
        "without the bank it answers as before: True",
    ]


def test_every_example_is_run():
    assert {path.name for path in FOLDER.glob("*.py")} == {
        "trainer_user.py", "custom_loop_user.py", "trl_user.py", "kernel_user.py", "server_operator.py"
    }  # fmt: skip
