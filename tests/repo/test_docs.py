"""Every code block of the documentation is run, page by page and in order, or says why it is not.

A page begins in an empty folder. With ``<!-- after: PAGE -->`` it begins in a copy of the folder in which
that page ended. Its Python blocks share one namespace; each bash block begins in the folder in which the last
one ended. ``<!-- not run: REASON -->`` in front of a block leaves it out. Python in a comment that begins
with ``<!-- hidden`` is run in its place without being shown: what a page assumes, and checks of its results.
"""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest

from neumuter.cli.app import main
from neumuter.models import families
from neumuter.recipes import schedule

ROOT = Path(__file__).parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [
    *sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))
]}  # fmt: skip
RUN, SHOWN = ("python", "bash"), ("text", "{eval-rst}", "{toctree}")
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n+)?```(?P<language>[^\n`]*)\n(?P<code>.*?)^```$"
    r"|^<!-- hidden\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)
# A line of bash, with those that continue it.
LINE = re.compile(r"(?:[^\n]*\\\n)*[^\n]*\n")
AFTER = re.compile(r"^<!-- after: (\S+) -->$", re.MULTILINE)
# In this process a fit takes half of the default's steps, which no page relies on.
STEPS = schedule.LEAST_STEPS // 2


class Block(NamedTuple):
    """``line``: of the page, where the code begins. ``reason``: why it is not run, None if it is."""

    language: str
    code: str
    line: int
    reason: str | None
    hidden: bool


def blocks(text):
    found = []
    for match in BLOCK.finditer(text):
        hidden = match["hidden"] is not None
        kind, language = ("hidden", "python") if hidden else ("code", match["language"])
        line = text.count("\n", 0, match.start(kind)) + 1
        found.append(Block(language, match[kind], line, match["reason"], hidden))
    return found


def runnable(page):
    found = blocks(PAGES[page].read_text(encoding="utf-8"))
    return [block for block in found if block.language in RUN and block.reason is None]


def run_page(page, folder):
    """Run the blocks of a page from ``folder`` on; returns the folder in which it ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "LEAST_STEPS", STEPS)
        return _run_blocks(page, folder)


def _run_blocks(page, folder):
    names = {"__name__": "__page__"}
    os.chdir(folder)
    for block in runnable(page):
        if block.language == "bash":
            _run_bash(page, block)
            continue
        try:
            # Empty lines in front make tracebacks name the line of the page.
            exec(compile("\n" * (block.line - 1) + block.code, str(PAGES[page]), "exec"), names)
        except Exception:
            pytest.fail(f"{page}, line {block.line}:\n{block.code}\n{traceback.format_exc(limit=-8)}")
    return Path.cwd()


def _is_plain(line):
    """Whether a line is a ``neumuter`` command and nothing else; or empty."""
    return not line.strip() or (line.startswith("neumuter ") and not set("|&;<>$*`#") & set(line))


def _run_bash(page, block):
    """Run plain ``neumuter`` commands at its ends in this process, which has imported all; others by bash."""
    lines = LINE.findall(block.code)
    before = list(itertools.takewhile(_is_plain, lines))
    others = lines[len(before) :]
    after = list(itertools.takewhile(_is_plain, reversed(others)))[::-1]
    _run_commands(page, block, before)
    if others := others[: len(others) - len(after)]:
        _run_lines(page, block, "".join(others))
    _run_commands(page, block, after)


def _run_commands(page, block, lines):
    for line in lines:
        if arguments := shlex.split(line.replace("\\\n", " "))[1:]:
            with pytest.raises(SystemExit) as stop:
                main(arguments)
            assert not stop.value.code, f"{page}, line {block.line}: {line}"


def _run_lines(page, block, code):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
    read, write = os.pipe()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{code}\npwd >&{write}"],
        capture_output=True, text=True, env=environment, pass_fds=[write],
    )  # fmt: skip
    os.close(write)
    with os.fdopen(read) as pipe:
        last = pipe.read().strip()
    if done.returncode:
        pytest.fail(f"{page}, line {block.line}:\n{code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    os.chdir(last)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Function: the folder in which a page ended, which is run the first time."""
    folders = {}

    def folder_of(page):
        if page not in folders:
            start = tmp_path_factory.mktemp(Path(page).stem)
            if after := AFTER.search(PAGES[page].read_text(encoding="utf-8")):
                shutil.copytree(folder_of(f"docs/{after[1]}"), start, dirs_exist_ok=True)
            folders[page] = run_page(page, start)
        return folders[page]

    return folder_of


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)])
def test_the_blocks_of_a_page_run(page, ended, monkeypatch):
    monkeypatch.chdir(ROOT)  # back there at the end
    monkeypatch.setattr(families, "REGISTERED", [])
    ended(page)


def test_every_block_is_run_or_says_why_not(capsys):
    left_out, unknown = [], []
    for page, path in PAGES.items():
        text = path.read_text(encoding="utf-8")
        found = blocks(text)
        fences = 2 * sum(not block.hidden for block in found)
        assert text.count("```") == fences, f"{page} has a code block that is indented or does not end"
        left_out += [f"{page}:{block.line}: {block.reason}" for block in found if block.reason]
        unknown += [f"{page}:{b.line}: {b.language!r}" for b in found if b.language not in RUN + SHOWN]
    with capsys.disabled():
        print(f"\n{len(left_out)} blocks are not run:", *left_out, sep="\n  ")
    assert not unknown, f"blocks of other languages than {', '.join(RUN + SHOWN)}: {unknown}"
