"""``neumuter demo``."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the mute files, the checkpoint and the report.")
    ] = Path("demo-out"),
    seed: Annotated[int, typer.Option(min=0, help="Seeds the records, the training and the masks.")] = 0,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train the model again even if it is cached.")
    ] = False,
    short: Annotated[
        bool, typer.Option("--short", help="Make fewer comparisons, for continuous integration.")
    ] = False,
) -> None:
    """Show the whole job on made-up records: train a small model, make it forget, and measure."""
    from neumuter.demo import run_demo

    run_demo(out, seed=seed, fresh=fresh, short=short)
