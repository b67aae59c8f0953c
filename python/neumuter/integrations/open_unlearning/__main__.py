"""``python -m neumuter.integrations.open_unlearning SCRIPT ...``, in the place of ``python SCRIPT ...``.

SCRIPT is src/train.py or src/eval.py of a checkout of open-unlearning; what follows are its own arguments.
"""

import importlib
import runpy
import sys
from pathlib import Path

from neumuter.integrations.open_unlearning import register

CONFIGS = Path(__file__).parent / "configs"


def main(arguments: list[str]) -> None:
    """Register the plug-in with the checkout that the script is in, and run the script.

    Hydra gets our configurations as its ``--config-dir``. Exits with a message if there is no such script,
    and raises ImportError if it is not open-unlearning's.
    """
    if not arguments or not Path(arguments[0]).is_file():
        sys.exit("usage: python -m neumuter.integrations.open_unlearning src/train.py [its arguments]")
    script, *options = arguments
    sys.path.insert(0, str(Path(script).resolve().parent))
    metrics = importlib.import_module("evals.metrics")
    decorator = importlib.import_module("evals.metrics.base").unlearning_metric
    register(importlib.import_module("trainer").TRAINER_REGISTRY, metrics.METRICS_REGISTRY, decorator)
    sys.argv = [script, "--config-dir", str(CONFIGS), *options]
    # Hydra looks for configurations from the file of __main__.
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
