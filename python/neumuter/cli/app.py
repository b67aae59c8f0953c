"""The command line. Heavy imports are inside the commands, so that ``neumuter --help`` is fast."""

import logging
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError

from neumuter.cli.audit import audit
from neumuter.cli.demo import demo
from neumuter.cli.doctor import doctor
from neumuter.cli.evaluate import evaluate
from neumuter.cli.ledger import ledger, verify
from neumuter.cli.mute_file import export, fold, inspect
from neumuter.cli.plan import plan
from neumuter.cli.processes import check_command, joined, stop
from neumuter.cli.refit import refit
from neumuter.cli.unlearn import unlearn

OUT_OF_MEMORY = (
    "There is not enough memory, although passes were made smaller where possible. Try shorter windows "
    "(--max-length) or --dtype bfloat16. Several GPUs can hold a model together (torchrun, and unlearn "
    "--layout fsdp); there, try --recompute and fewer texts in a step (--batch-size) as well. neumuter plan "
    "CONFIG finds what fits."
)
# Loggers that warn of what the user of a command can do nothing about: how torchao registers its types, and,
# at each product, how bitsandbytes rounds.
NOISY = ("torch.utils._pytree", "bitsandbytes.autograd._functions")
COMMANDS = (demo, audit, unlearn, refit, evaluate, verify, inspect, fold, export, plan, doctor)

app = typer.Typer(
    help="Make a trained language model forget given texts by muting the few FFN neurons that hold them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(ledger, name="ledger")


def show_version(wanted: bool) -> None:
    """Print the version, and end."""
    if wanted:
        import neumuter

        print(neumuter.__version__)
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and end.", callback=show_version, is_eager=True),
    ] = False,
) -> None:
    check_command(context.invoked_subcommand)


def hide_foreign_warnings() -> None:
    """Hide what other libraries tell their own developers, unless Python was told to show warnings."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        for name in NOISY:
            logging.getLogger(name).addFilter(lambda record: False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error is one message on stderr and exit code 1 (2 for wrong usage)."""
    hide_foreign_warnings()
    # A polite kill unwinds the stack, which removes temporary files; kill -9 can leave them, under
    # hidden names of their own.
    signal.signal(signal.SIGTERM, stop)
    try:
        with joined():
            app(arguments)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError, SafetensorError) as error:
        message = str(error) or type(error).__name__
        if type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "allocate memory" in message:
            message += f"\n{OUT_OF_MEMORY}"
        Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
        sys.exit(1)
