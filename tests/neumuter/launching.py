"""Starts real processes on the CPU, as torchrun does, but without its seconds of imports."""

import contextlib
import multiprocessing
import os
import time
from multiprocessing import connection
from pathlib import Path

import torch
from torch.distributed import TCPStore

SECONDS = 60  # until those are killed that wait for one that failed
# Processes are forks of one that has imported torch and transformers.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.neumuter.distributed", "tests.neumuter.jobs"])


def run(target, processes, folder, *arguments):
    """Calls ``target(*arguments)`` in so many processes; an error in one of them fails the test."""
    ended = end(target, processes, folder, *arguments)
    assert not any(code for code, _ in ended), "\n".join(log[-4000:] for code, log in ended if code)


def end(target, processes, folder, *arguments):
    """Of each of so many processes that call ``target(*arguments)``, its exit code and what it printed."""
    return _end(_store(), 0, target, processes, folder, arguments)


def end_twice(target, processes, folder, *arguments):
    """Do as ``end``, and once more as torchrun starts processes again, with the store of the first ones."""
    store = _store()
    return [_end(store, attempt, target, processes, folder, arguments) for attempt in range(2)]


def _store():
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def _end(store, attempt, target, processes, folder, arguments):
    with _started(store, attempt, target, processes, folder, arguments) as running:
        waiting = {process.sentinel: process for process in running}
        while waiting:
            ready = connection.wait(waiting, SECONDS if any(p.exitcode for p in running) else None)
            for sentinel in ready:
                waiting.pop(sentinel).join()
            if not ready:
                for process in waiting.values():  # they wait for the one that failed
                    process.kill()
    return [(p.exitcode, (Path(folder) / f"{rank}.log").read_text()) for rank, p in enumerate(running)]


def kill(seconds, target, processes, folder, *arguments):
    """Kills so many processes that call ``target(*arguments)``, after so many seconds."""
    with _started(_store(), 0, target, processes, folder, arguments) as running:
        time.sleep(seconds)
        for process in running:
            process.kill()
        for process in running:
            process.join()


@contextlib.contextmanager
def _started(store, attempt, target, processes, folder, arguments):
    """Context: the processes, which find each other by the store."""
    about = (processes, store.port, attempt, folder, target, arguments)
    running = [FORKS.Process(target=_process, args=(rank, *about)) for rank in range(processes)]
    for process in running:
        process.start()
    yield running


def _process(rank, world, port, attempt, folder, target, arguments):
    """Process ``rank`` of ``world``; the others find it by the store at ``port``, as torchrun's do."""
    log = os.open(Path(folder) / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    store = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    agent = {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": attempt}
    os.environ.update({key: str(value) for key, value in (ranks | store | agent).items()})
    target(*arguments)
