"""``python -m neumuter.demo FOLDER``: a small model and its records, to try the commands on."""

import sys

from neumuter.demo.tutorial import write_tutorial
from neumuter.report.progress import show_progress

if len(sys.argv) != 2:
    sys.exit("usage: python -m neumuter.demo FOLDER")
with show_progress("Training a small model") as advance:
    try:
        names = write_tutorial(sys.argv[1], advance)
    except OSError as error:
        sys.exit(f"error: {error}")
print(f"{sys.argv[1]} has {', '.join(names)}")
