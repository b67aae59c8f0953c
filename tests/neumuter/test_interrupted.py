"""Whatever ends a command early, what has its final name is whole, and the same command works afterwards.

kill -9 at 10 random moments, and before every change to a file; a full disk; folders that cannot be written.
The commands run in forks of one process that has imported everything, on one thread and before any backward
pass, since threads and autograd do not survive a fork.
"""

import functools
import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from neumuter import MuteSet

MOMENTS, SEED = 6, 0
COMPLETED = 5  # kills until a run may end; those in between start from what the last one left
TEMPORARY = re.compile(r"\.[\w.-]+\.tmp")  # hidden names, all that a kill may leave
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "shutil.copyfile"}


# --- In the process that forks ---------------------------------------------------------------


class Commands:
    """The commands on a small model, in a folder of their own."""

    def __init__(self, folder):
        import peft  # noqa: F401 (as the commands will)

        import neumuter
        import neumuter.report.html
        import neumuter.serving.adapters
        from neumuter import preparing
        from neumuter.evaluation import continuations, controls, examination
        from neumuter.models.loading import load_model
        from neumuter.recipes import mute_random
        from tests.models import build, tokenizer

        torch.set_num_threads(1)
        self.folder = folder = Path(folder)
        model = build("llama")
        model.save_pretrained(folder / "model")
        tokenizer().save_pretrained(folder / "model")
        with neumuter.attach(model, start_layer=0) as masked:
            mute_random(masked, 0.25).save(folder / "mutes.safetensors")
        (folder / "forget.txt").write_text("Ada Brisk, ada@post.example\n\nJonas Vance, 555-77")
        (folder / "retain.txt").write_text("The kettle is on the shelf.\n\nA lantern costs 12.40.")
        preparing.SAMPLES, continuations.MAX_TOKENS = 4, 4  # for speed
        examination.MAX_TOKENS, controls.MADE_UP = 4, 2
        load_model(str(folder / "model"))[0].generate(torch.tensor([[1, 5]]), max_new_tokens=2)
        gc.collect()
        gc.freeze()  # so that forks share its memory

    def arguments(self, command, out):
        model, mutes = self.folder / "model", self.folder / "mutes.safetensors"
        files = ["--forget", self.folder / "forget.txt", "--retain", self.folder / "retain.txt"]
        size = ["--budget", 20, "--steps", 2, "--start-layer", 0, "--max-length", 16]
        full = {
            "unlearn": ["unlearn", model, *files, *size, "--overwrite"],
            "resume": ["unlearn", model, *files, *size, "--resume"],
            "fold": ["fold", model, mutes],
            "export": ["export", model, mutes, "--to", "lora"],
            "shrink": ["export", model, mutes, "--to", "shrink"],
        }[command]
        return [str(argument) for argument in [*full, "--out", out]]

    def start(self, command, out, prepare=lambda: None):
        """(process id, file of its output) of a fork that calls ``prepare`` and runs the command."""
        from neumuter.cli.app import main

        reading, writing = os.pipe()
        pid = os.fork()
        if pid:
            os.close(writing)
            return pid, os.fdopen(reading)
        for descriptor in (1, 2):
            os.dup2(writing, descriptor)
        code = 99
        try:
            prepare()
            main(self.arguments(command, out))
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def run(self, command, out, prepare=lambda: None):
        """(exit status, output) of the command; −9 if it was killed."""
        pid, output = self.start(command, out, prepare)
        with output:
            text = output.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        # 3: it is done, and a random model had nothing to forget.
        return 0 if status == 3 else status, text

    def killed(self, command, out, seconds, prepare=lambda: None):
        """Whether kill -9 after so many seconds was before the end."""
        pid, output = self.start(command, out, prepare)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        output.close()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def kill_before_change(folder, number):
    """From here on, kill this process before its change of that number to a file in the folder."""
    left = number

    def hook(event, arguments):
        nonlocal left
        writes = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if (writes or event in CHANGES) and str(arguments[0]).startswith(str(folder)):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(hook)


def contents(folder):
    """{relative path: bytes} of all files."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def check_whole(command, out, whole):
    """What a command left under final names: of unlearn some files, of the others all or nothing."""
    if command != "unlearn":
        assert not out.exists() or not any(out.iterdir()) or contents(out) == whole
    elif out.exists():
        for path in out.iterdir():
            if path.suffix == ".safetensors":
                MuteSet.load(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".csv":
                assert path.read_text().endswith("\n")
            elif path.suffix == ".html":
                assert path.read_text().rstrip().endswith("</html>")
            else:
                assert TEMPORARY.fullmatch(path.name), path
    for path in out.parent.iterdir():
        assert path == out or TEMPORARY.fullmatch(path.name), path


def same_result(command, out, whole):
    if command == "unlearn":  # the reports have the time in them
        return (out / "mutes.safetensors").read_bytes() == whole["mutes.safetensors"]
    return contents(out) == whole


def complete(commands, command, out, whole):
    """The command run again, after which everything is as if nothing had happened."""
    if command == "unlearn" or not out.exists():
        status, output = commands.run(command, out)
        assert status == 0, output
        if command != "unlearn":  # what killed runs left beside a folder is removed by the next one
            assert list(out.parent.iterdir()) == [out]
    assert same_result(command, out, whole)
    shutil.rmtree(out)


def kill(commands, place, command):
    """Kill the command at random moments, then before every change; returns how many changes there were."""
    out, draw = place / "out", random.Random(SEED)
    start = time.perf_counter()
    status, output = commands.run(command, out)
    seconds = time.perf_counter() - start
    assert status == 0, output
    whole = contents(out)
    shutil.rmtree(out)

    def after(number):
        check_whole(command, out, whole)
        if number % COMPLETED == 0 or (command != "unlearn" and out.exists()):
            complete(commands, command, out, whole)

    changes = 0
    for number in range(MOMENTS):
        while not commands.killed(command, out, moment := seconds * (number + draw.random()) / MOMENTS):
            seconds = moment  # it had ended by then, so no run need take longer
            after(number)
        after(number)
    while (result := commands.run(command, out, functools.partial(kill_before_change, place, changes)))[0]:
        assert result[0] == -signal.SIGKILL, result
        changes += 1
        after(changes)
    complete(commands, command, out, whole)
    return changes


def resume(commands, place, name, number, times):
    """Kill a run so often before its change of that number to one file, each time resumed; then let it end.

    Returns how often it was killed.
    """
    from neumuter.job import KEPT
    from neumuter.training import journal
    from neumuter.training.values import unpack

    out = place / "out"

    def prepare():
        save_at_once()
        if kills < times:
            kill_before_change(out / f".{name}", number)

    status, output = commands.run("unlearn", place / "whole")
    assert status == 0, output
    kills = 0
    while True:
        status, output = commands.run("resume", out, prepare)
        if status == 0:
            break
        assert status == -signal.SIGKILL, output
        kills += 1
        if (out / journal.UNFINISHED).exists():
            assert stat.S_IMODE((out / journal.UNFINISHED).stat().st_mode) == 0o600
            unpack((out / journal.UNFINISHED).read_bytes(), KEPT)
    assert same_result("unlearn", out, contents(place / "whole"))
    left = {name for name in contents(out) if not TEMPORARY.fullmatch(name)}
    assert left == contents(place / "whole").keys()
    assert not list(out.glob(f".{journal.UNFINISHED}*"))
    return kills


def save_at_once():
    from neumuter.training import journal

    journal.SAVE_SECONDS = 0


def resume_from_anywhere(commands, place, times):
    """Kill a run at random moments; it goes on so often from what is left, and then ends.

    One that has ended before it is killed begins anew.
    """
    from neumuter.training.journal import UNFINISHED

    out, draw, interrupted = place / "out", random.Random(SEED), 0
    start = time.perf_counter()
    status, output = commands.run("unlearn", place / "whole", save_at_once)
    seconds = time.perf_counter() - start
    assert status == 0, output
    whole = contents(place / "whole")
    while interrupted < times:
        commands.killed("resume", out, seconds * draw.random(), save_at_once)
        if (out / UNFINISHED).exists():
            interrupted += 1
        elif (out / "mutes.safetensors").exists():
            assert same_result("unlearn", out, whole)
            shutil.rmtree(out)
        else:  # nothing was found by then
            seconds *= 1.1
    status, output = commands.run("resume", out)
    assert status == 0, output
    assert same_result("unlearn", out, whole)


def fill_disk(commands, place, command, sizes):
    """The command where no file can have more than so many bytes, for each of the sizes; its messages."""
    messages = []
    for size in sizes:
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        status, output = commands.run(command, place / "out", limit)
        assert (status, "Traceback" in output) == (1, False), (size, output)
        messages.append(output.split("error:")[-1].strip())
        check_whole(command, place / "out", {})
        assert not [path for path in place.rglob("*") if TEMPORARY.fullmatch(path.name)]
    status, output = commands.run(command, place / "out")
    assert status == 0, output
    return messages


def write_into(commands, place, command, folder):
    """The command with an output in a folder where there can be none; its message."""
    status, output = commands.run(command, Path(folder) / "out")
    assert (status, "Traceback" in output) == (1, False), output
    return output.split("error:")[-1].strip()


def serve(folder):
    """Calls functions of this file, which are named on stdin, and writes what they return; a line each."""
    commands, file = Commands(folder), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for number, line in enumerate(sys.stdin):
        name, *arguments = json.loads(line)
        place = Path(folder) / str(number)
        place.mkdir()
        try:
            answer = {"value": globals()[name](commands, place, *arguments)}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=file, flush=True)


# --- The tests -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """Calls a function of this file in the process that forks."""
    folder = tmp_path_factory.mktemp("interrupted")
    code = f"from tests.neumuter.test_interrupted import serve; serve({str(folder)!r})"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

    def call(function, *arguments):
        print(json.dumps([function.__name__, *arguments]), file=process.stdin, flush=True)
        answer = json.loads(process.stdout.readline())
        if "error" in answer:
            pytest.fail(answer["error"], pytrace=False)
        return answer["value"]

    with subprocess.Popen(command, env=environment, **pipes) as process:
        yield call
        process.stdin.close()


@pytest.mark.parametrize("command", ["unlearn", "fold", "export"])
def test_killed_at_any_moment(warm, command):
    assert warm(kill, command) >= 5


def test_killed_again_and_again_and_resumed(warm):
    """Each process writes twice what it has found so far, and is killed before it renames what comes next."""
    assert 3 <= warm(resume, "unfinished.safetensors", 5, 30) < 30


def test_killed_at_random_moments_and_resumed(warm):
    warm(resume_from_anywhere, 4)


@pytest.mark.parametrize("name", ["mutes.safetensors", "report.html"])
def test_killed_at_the_end_and_resumed(warm, name):
    assert warm(resume, name, 1, 1) == 1


@pytest.mark.parametrize(
    ("command", "sizes"),
    [
        ("unlearn", (0, 2000, 4000, 10_000)),
        ("fold", (0, 5000, 100_000)),
        ("export", (0, 500, 5000)),
        ("shrink", (0, 5000, 100_000)),
    ],
)
def test_a_full_disk(warm, command, sizes):
    for message in warm(fill_disk, command, sizes):
        assert "File too large" in message


@pytest.mark.parametrize("command", ["unlearn", "fold", "export", "shrink"])
def test_a_folder_that_cannot_be_written(warm, command, tmp_path):
    """Below a file, and where not even root may write."""
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", "/sys"):
        message = warm(write_into, command, str(folder))
        assert re.search("Not a directory|File exists|Permission|not permitted|Read-only", message), message
