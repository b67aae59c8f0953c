"""One progress bar for everything that takes long: in a terminal, in a notebook, or as lines in a log."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

# Seconds between two lines where there is no terminal to redraw one in.
SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def show_progress(description: str) -> Iterator[Callable[..., None]]:
    """Show a progress bar from the first step on; yields ``advance(step, total, info=None)``.

    Of ``info``, the loss in nats and the share of muted neurons are shown.
    """
    bar: Any = None
    interval = 0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES

    def advance(step: int, total: int, info: dict[str, Any] | None = None) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, desc=description, mininterval=interval)
        bar.total = total
        shown = {}
        if info and "loss" in info:
            shown["loss"] = f"{info['loss']:.3f}"
        if info and "muted" in info:
            shown["muted"] = f"{info['muted']:.2%}"
        if shown:
            bar.set_postfix(shown, refresh=False)
        bar.update(step - bar.n)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()
