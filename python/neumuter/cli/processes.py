"""A command in several processes, as torchrun and accelerate launch start them: one prints and writes."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys
from collections.abc import Iterator
from enum import Enum
from typing import Any

import typer

# Commands that share their work, or their model, among processes; any other would do all of it in each.
SHARED = ("unlearn", "refit", "evaluate")
# What a launcher sets beside WORLD_SIZE.
LAUNCHED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Processes wait for each other so long: they may load a large model at different speeds.
PATIENCE = datetime.timedelta(hours=2)


class Layout(str, Enum):
    """ddp: a copy of the model in each process. Else it is split: by FSDP2, tensor parallelism, or both."""

    auto = "auto"
    ddp = "ddp"
    fsdp = "fsdp"
    tp = "tp"
    both = "fsdp+tp"


class Split(str, Enum):
    """The layouts that split the model."""

    fsdp = "fsdp"
    tp = "tp"
    both = "fsdp+tp"


class Stopped(SystemExit):
    """A signal ends the command in the middle of its work."""


def stop(number: int, frame: object) -> None:
    """End the command, as a handler of the signal ``number``."""
    raise Stopped(128 + number)


def count_processes() -> int:
    """Count the processes that a launcher started, by its environment variable."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0 or count_processes() == 1


def check_command(name: str | None) -> None:
    """Raise BadParameter if a command runs in one process and was started in several."""
    if count_processes() > 1 and name not in SHARED:
        raise typer.BadParameter(
            f"neumuter {name} runs in one process, but WORLD_SIZE says that {count_processes()} were "
            f"started; only {', '.join(SHARED)} can run in several"
        )


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Context: a member of the process group of all that a launcher started, if these are several.

    All but the first are silent, and end with exit code 0 when it ends. If one fails, its exception is
    raised, and the others end with exit code 1.
    """
    if count_processes() == 1:
        yield
        return
    if missing := [name for name in LAUNCHED if name not in os.environ]:
        raise ValueError(
            f"WORLD_SIZE is {count_processes()}, but {', '.join(missing)} is not set: start several "
            "processes with torchrun, or unset WORLD_SIZE for one"
        )
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # not in its __all__
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://"))
    # torchrun --max-restarts keeps the store, with all that the processes before wrote to it.
    store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    code: Any = 0
    try:
        with contextlib.ExitStack() as silent:
            if rank:
                # It writes nothing, so that it has nothing to clean up, and may be killed while it waits.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                nowhere = silent.enter_context(open(os.devnull, "w"))
                silent.enter_context(contextlib.redirect_stdout(nowhere))
                silent.enter_context(contextlib.redirect_stderr(nowhere))
            try:
                yield
            except Stopped:
                # The others are in the middle of their work, and fail without this one: that says nothing.
                _is_first_to_fail(store)
                raise
            except SystemExit as end:
                code = end.code
        # They wait for the first one, because a launcher kills all as soon as one ends with another code.
        dist.all_reduce(torch.zeros(1))
    except Exception:
        if not _is_first_to_fail(store):
            sys.exit(1)
        raise
    dist.destroy_process_group()
    sys.exit(0 if rank else code)


def _is_first_to_fail(store: Any) -> bool:
    """Whether no other process has failed before: those that wait for one that failed, fail as well."""
    try:
        return bool(store.add("neumuter/failed", 1) == 1)
    except RuntimeError:
        # The process that kept the store is gone.
        return False


def check_split(layout: Split | None, device: str | None, device_map: str | None, **others: object) -> Layout:
    """Do as ``check_place`` for a command in which every process sees all texts, and return the layout."""
    if layout is None and count_processes() > 1:
        raise typer.BadParameter(
            f"a copy of the model in each of {count_processes()} processes would do the same work: split it "
            f"with --layout {', '.join(Split)}, or start one process"
        )
    found = Layout(layout.value) if layout else Layout.ddp
    check_place(device, device_map, found, **others)
    return found


def check_place(
    device: str | None, device_map: str | None = None, layout: Layout = Layout.ddp, **others: object
) -> None:
    """Raise BadParameter or ValueError if the processes cannot have the model laid out so.

    others: options that go with a copy of the model alone, by name.
    """
    processes = count_processes()
    if layout is not Layout.ddp:
        if processes == 1:
            raise typer.BadParameter(f"--layout {layout.value} splits the model over processes: use torchrun")
        if given := [f"--{name}" for name, value in others.items() if value]:
            raise typer.BadParameter(f"--layout {layout.value} cannot be combined with {', '.join(given)}")
    if processes == 1:
        return
    if device_map:
        raise typer.BadParameter(
            f"--device-map spreads a model over the devices of one process, but {processes} were started"
        )
    if device not in (None, "cpu"):
        raise typer.BadParameter(
            "--device must be cpu in several processes, or left out: each has its own GPU"
        )
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        if layout is not Layout.ddp and torch.cuda.is_available():
            raise typer.BadParameter(
                f"--layout {layout.value} uses the GPUs, and cannot be combined with --device cpu"
            )
        return
    if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise ValueError(
            f"more processes were started than there are GPUs ({torch.cuda.device_count()}): start one for "
            "each, or use --device cpu"
        )
