"""One progress bar for everything that takes long: in a terminal, in a notebook, or as lines in a log."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from tqdm.auto import tqdm

from neumuter.training.history import add_point
from neumuter.training.processes import is_first
from neumuter.types import Callback

# Seconds; shorter times are not announced.
ANNOUNCED = 60.0
# The share of the steps after which it is clear how long the others will take.
CLEAR = 0.05
# Without a terminal there is a line whenever another one of these parts is done.
PARTS = 10

logger = logging.getLogger("neumuter")


@contextmanager
def show_progress(description: str) -> Iterator[Callable[..., None]]:
    """Show a progress bar from the first step on; yields ``advance(step, total, info=None)``.

    Of ``info``, the loss in nats and the share of muted neurons are shown.
    """
    # In a notebook the bar is a widget.
    lines = not sys.stderr.isatty() and "ipykernel" not in sys.modules
    bar: Any = None
    told = 0

    def advance(step: int, total: int, info: dict[str, Any] | None = None) -> None:
        nonlocal bar, told
        shown = {}
        if info and "loss" in info:
            shown["loss"] = f"{info['loss']:.3f}"
        if info and "muted" in info:
            shown["muted"] = f"{info['muted']:.2%}"
        if lines:
            if (part := PARTS * step // max(1, total)) != told:
                told = part
                facts = "".join(f", {name} {value}" for name, value in shown.items())
                share = f"{100 * step // max(1, total)} % ({step} of {total})"
                print(f"{description}: {share}{facts}", file=sys.stderr, flush=True)
            return
        if bar is None:
            bar = tqdm(total=total, desc=description)
        bar.total = total
        if shown:
            bar.set_postfix(shown, refresh=False)
        bar.update(step - bar.n)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()


def announce(what: str, seconds: float) -> None:
    """Log how long something takes, if it is long."""
    if seconds >= ANNOUNCED and is_first():
        minutes = round(seconds / 60)
        hours = f"{minutes // 60} h " if minutes >= 60 else ""
        logger.info("%s about %s%d min.", what, hours, minutes % 60)


def _say_nothing(*_: object) -> None:
    """What a part of the job reports to where nobody is told of it."""


class Watch:
    """Progress of each part of the job, as a bar in the first process; or of steps alone, to a callback."""

    def __init__(self, callback: Callback | None) -> None:
        self.callback = callback

    @contextmanager
    def __call__(
        self, description: str, of_steps: bool = False, history: list[dict[str, Any]] | None = None
    ) -> Iterator[Callable[..., None]]:
        """Yields ``advance(step, total, info)``, which also adds each step to ``history``.

        of_steps: whether these are steps of training, with losses in ``info``.
        """
        silent = self.callback is not None or not is_first()
        told = self.callback if self.callback and of_steps else _say_nothing
        with nullcontext(told) if silent else show_progress(description) as tell:
            first, since, last, clear = 0, 0.0, 0.0, False

            def advance(step: int, total: int, info: dict[str, Any] | None = None) -> None:
                nonlocal first, since, last, clear
                now = time.perf_counter()
                # Each budget tried counts from 1.
                if not first or step <= first:
                    first, since = step, now
                elif not clear and step - first >= CLEAR * total:
                    pace = (now - since) / (step - first)
                    left = pace * (total - step)
                    # A GPU's steps are told several at once. Only the first of them shows how long they took.
                    if left >= ANNOUNCED and now - last > pace / 2:
                        clear = True
                        announce(f"{description}, {step} of {total} steps done: the others take", left)
                last = now
                if history is not None:
                    add_point(history, info or {})
                tell(step, total, {"phase": description} | (info or {}))

            yield advance
