"""``python -m neumuter.demo FOLDER``: a small model and its records, to try the commands on."""

import sys

from neumuter.demo.tutorial import write_tutorial
from neumuter.models.loading import progress_bar

if len(sys.argv) != 2:
    sys.exit("usage: python -m neumuter.demo FOLDER")
with progress_bar("Training a small model", None, "loss") as advance:
    try:
        names = write_tutorial(
            sys.argv[1], lambda step, total, info: advance(step, total, loss=f"{info['loss']:.2f}")
        )
    except OSError as error:
        sys.exit(f"error: {error}")
print(f"{sys.argv[1]} has {', '.join(names)}")
