"""The GPU queue: all that only a GPU can tell, the most important first. ``make gpu`` runs it.

GPU time comes in pieces that may end at any moment, on machines without a network. So every step has a time
limit, every row of results is in its file as soon as it is measured, and a second run goes on with what is
missing. It uses the Python that runs it, as it is, and builds the extension against that Python's torch where
pybind11, CMake and ninja are installed or among the wheels; otherwise it runs what Triton alone can compute.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench import RESULTS, ROOT, unbuilt

SITE = ROOT / "build/gpu-site"  # where wheels go
DEFAULT_SECONDS = 570  # of the whole run, for machines that are lent for ten minutes at a time
LEAST_SECONDS = 10  # a step that has less is not begun
BUILD_TOOLS = ("setuptools", "pybind11", "cmake", "ninja")
MODELS = ("transformers", "tokenizers", "safetensors")


@dataclass(frozen=True)
class Step:
    """A command with a time limit in seconds, and the modules and programs that it cannot run without.

    built: whether it needs the compiled extension.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    built: bool = False
    environment: tuple[tuple[str, str], ...] = ()


def _bench(name, seconds, needs=(), built=False):
    return Step(name, seconds, ("-m", "bench", name), needs, built)


def _tests(*names):
    return tuple(
        str(path.relative_to(ROOT)) for n in names for path in sorted(ROOT.glob(f"tests/**/test_{n}.py"))
    )


OPS = (
    "masked_ffn",
    "launch",
    "hard_concrete",
    "token_losses",
    "select_muted",
    "mute",
    "properties",
    "devices",
    "training_step",
    "bank_graphs",
)
# Every allocation its own, so that an access beyond one, or to what nobody wrote, shows.
WITHOUT_CACHE = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)


def _sanitized(tool):
    """The self-test under a tool of compute-sanitizer, then the tests of the CUDA C++ ops."""
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable, "-m")
    tests = ("pytest", "-q", "-x", *_tests("select_muted", "mute"), "-k", "cuda and not many")
    yield Step(tool, 60, (*command, "bench.kernels.check"), ("compute-sanitizer",), False, WITHOUT_CACHE)
    needs = ("compute-sanitizer", "pytest", "hypothesis")
    yield Step(f"{tool}-tests", 60, (*command, *tests), needs, True, WITHOUT_CACHE)


# In the order of their worth. What a step measures goes into the results by itself, row by row.
STEPS = (
    _bench("check", 90),
    _bench("kernels", 240),
    _bench("losses", 60),
    _bench("step", 120, MODELS),
    _bench("decode", 45),
    _bench("serve", 90, MODELS),
    _bench("launch", 45),
    Step("tests", 240, ("-m", "pytest", "-q", *_tests(*OPS)), ("pytest", "hypothesis"), True),
    *(step for tool in ("memcheck", "racecheck", "initcheck") for step in _sanitized(tool)),
    _bench("select", 60, built=True),
)


def main():
    options = parse()
    prepare(options)
    if not options.rehearse and not _has_gpu():
        sys.exit("torch finds no GPU here")
    end = time.monotonic() + options.seconds
    build()
    queue = Queue(options.out, end, options)
    for step in STEPS:
        if not options.steps or step.name in options.steps:
            queue.run(step)
    return queue.report()


def parse():
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("steps", nargs="*", help=f"of {', '.join(s.name for s in STEPS)}; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--wheels", type=Path, help="folder of wheels, in addition to what is installed")
    parser.add_argument("--seconds", type=int, default=DEFAULT_SECONDS, help="of the whole run, at most")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the results already")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on any machine: does it start?")
    options = parser.parse_args()
    options.out = options.out.resolve()  # the steps run in another folder
    unknown = set(options.steps) - {step.name for step in STEPS}
    if unknown:
        parser.error(f"no such step: {', '.join(sorted(unknown))}")
    if options.rehearse and options.out == RESULTS:
        parser.error("--rehearse needs --out: its rows are no results")
    return options


def prepare(options):
    """Sets the environment that this process and all steps share."""
    paths = [str(ROOT), str(ROOT / "python"), str(SITE)]
    wheels = sorted(map(str, options.wheels.glob("*.whl"))) if options.wheels else []
    if wheels:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        subprocess.run([*command, "--target", str(SITE), *wheels])  # without them the queue runs, too
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    os.environ["PATH"] = os.pathsep.join(
        [str(SITE / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    os.environ["PYTHONUNBUFFERED"] = "1"


def _has_gpu():
    import torch

    return torch.cuda.is_available()


def build():
    """Builds the extension for this Python, if it is not there and can be."""
    if unbuilt.is_built():
        return
    missing = [
        name for name in BUILD_TOOLS if importlib.util.find_spec(name) is None and not shutil.which(name)
    ]
    if missing:
        print(f"The extension is not built: {', '.join(missing)} missing. What needs it is left out.")
        return
    status = _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 150, os.environ)
    print(f"— building the extension: {status} —", flush=True)


class Queue:
    """Runs steps and keeps a row for each in the results, so that another run knows what is done."""

    def __init__(self, folder, end, options):
        if not unbuilt.is_built():
            unbuilt.define()
        import torch

        from bench import machine, rows

        if options.rehearse:
            torch.set_num_threads(1)  # as its steps, so that they write the same file
        self.rows, self.end, self.options, self.found = rows, end, options, {}
        device = "cuda" if _has_gpu() else "cpu"
        self.machine = machine.describe(device, machine.LIBRARY)
        os.environ["NEUMUTER_COMMIT"] = self.machine["commit"]
        self.folder, self.path = folder, folder / f"{machine.slug(self.machine)}.jsonl"
        committed = RESULTS / self.path.name
        if not options.rehearse and not self.path.exists() and committed.exists():
            rows.write(self.path, rows.read(committed))  # so that what is known is not measured again
        print(f"{self.machine['gpu'] or 'no GPU'}, driver {self.machine['driver']}, commit "
              f"{self.machine['commit']}; results: {self.path}", flush=True)  # fmt: skip

    def run(self, step):
        about = {"benchmark": "queue", "step": step.name}
        if not self.options.fresh and self._is_done(about):
            self.found[step.name] = "done before"
            return
        missing = [
            name for name in step.needs if importlib.util.find_spec(name) is None and not shutil.which(name)
        ]
        missing += ["the extension"] * (step.built and not unbuilt.is_built())
        left = self.end - time.monotonic()
        seconds = 0.0
        if missing:
            status = f"not run: {', '.join(missing)} missing"
        elif left < LEAST_SECONDS:
            status = "not run: no time left"
        else:
            limit = limit_of(step, left, self.options.rehearse)
            print(f"— {step.name}, at most {limit:.0f} s —", flush=True)
            start = time.monotonic()
            status = _run(self._command(step), limit, os.environ | dict(step.environment))
            seconds = time.monotonic() - start
            if status == "done" and not unbuilt.is_built():
                status = "done without the extension"
        self.found[step.name] = status
        print(f"— {step.name}: {status}, {seconds:.0f} s —", flush=True)
        found = {"status": status, "seconds": round(seconds, 1)}
        self.rows.put(self.path, about, found, self.machine)

    def _is_done(self, about):
        return any(
            self.rows.is_about(row, about | {"status": "done"})
            and not self.rows.differences(row["machine"], self.machine)
            for row in self.rows.read(self.path)
        )

    def _command(self, step):
        if step.command[:2] == ("-m", "bench"):
            options = ["--out", str(self.folder)] + ["--fresh"] * self.options.fresh
            return [sys.executable, *step.command, *options, *["--quick"] * self.options.rehearse]
        python = [] if step.command[0] == "compute-sanitizer" else [sys.executable]
        more = ["--collect-only"] * (self.options.rehearse and "pytest" in step.command)
        if step.name == "tests" and importlib.util.find_spec("xdist"):
            more += ["-n", "8", "--dist", "worksteal"]
        return [*python, *step.command, *more]

    def report(self):
        """Prints what became of every step; returns the exit status: whether one failed."""
        for name, status in self.found.items():
            print(f"{name:12} {status}")
        return int(any(status.startswith("failed") for status in self.found.values()))


def limit_of(step, left, rehearse):
    """The seconds that a step may take of those that are ``left``.

    Its own limit is for a GPU machine that has nothing else to do; a rehearsal is on any machine.
    """
    return left if rehearse else min(step.seconds, left)


def _run(command, seconds, environment):
    """Runs a command for ``seconds`` at most; returns what became of it."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=os.setpgrp)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"cut after {seconds:.0f} s"
    return "done" if code == 0 else f"failed: exit status {code}"


if __name__ == "__main__":
    sys.exit(main())
