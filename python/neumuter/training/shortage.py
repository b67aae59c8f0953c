"""A run whose model several processes share ends where one of them lacks memory; the next one takes less."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neumuter.files import PathLike, made_folder, write_atomically
from neumuter.models.pieces import SMALLER, SplitOutOfMemoryError, sparing
from neumuter.training.batches import PairedBatches
from neumuter.training.processes import find_most, gather, is_first

SHORTAGE = "shortage.json"
logger = logging.getLogger("neumuter")


@contextmanager
def remember_shortage(folder: PathLike, resume: bool) -> Iterator[None]:
    """Context: passes that run out of memory are noted in ``folder``; those of a resumed run are smaller.

    For each run that ended so, half of the samples go through the model at a time. Each process writes and
    reads ``SHORTAGE`` on its own machine, and removes it when the run has ended, or begins anew.

    Raises:
        SplitOutOfMemoryError: with what the user can do; a ``torch.OutOfMemoryError``.
    """
    path = Path(folder) / SHORTAGE
    if not resume:
        path.unlink(missing_ok=True)
    halvings = find_most(_read(path))
    try:
        with sparing(halvings) as total:
            if halvings:
                logger.warning(f"Memory ran out before: {SMALLER}", 2**total)
            yield
        path.unlink(missing_ok=True)
    except SplitOutOfMemoryError as error:
        with made_folder(path.parent):
            write_atomically(path, json.dumps({"halvings": halvings + 1}).encode())
        raise SplitOutOfMemoryError(
            f"{error} Go on by --resume (in Python, resume=True), with half of the samples at a time."
        ) from None


def tell_of_shortage(pair: PairedBatches) -> None:
    """Say in the first process, which alone is heard, which others took smaller parts than it.

    To be called by all processes, after the steps.
    """
    found = gather((pair.at_once.size, pair.masked.recomputation.runs))
    for rank, (size, recomputes) in enumerate(found):
        if is_first() and size < found[0][0]:
            logger.warning(
                "Process %d took its samples %d at a time, because more do not fit into its memory. This "
                "gives the same result.", rank, size,
            )  # fmt: skip
        if is_first() and recomputes and not found[0][1]:
            logger.warning(
                "Process %d computed activations again in the backward pass, because one sample alone does "
                "not fit into its memory. This takes longer and gives the same result.", rank,
            )  # fmt: skip


def _read(path: Path) -> int:
    return int(json.loads(path.read_text())["halvings"]) if path.exists() else 0
