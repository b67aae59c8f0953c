"""``python -m neumuter.demo FOLDER``: a small model and its records, to try the commands on."""

import argparse
import sys

from neumuter.demo.tutorial import write_tutorial
from neumuter.report.progress import show_progress

parser = argparse.ArgumentParser(
    "python -m neumuter.demo", description="Train a small model on made-up records, and write both down."
)
parser.add_argument("folder", help="where to write them; it must not hold anything yet")
folder = parser.parse_args().folder
with show_progress("Training a small model") as advance:
    try:
        names = write_tutorial(folder, advance)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
print(f"{folder} has {', '.join(names)}")
