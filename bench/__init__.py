"""The benchmarks: every figure of the documentation, with its baselines.

``python -m bench NAME [--out DIR] [--quick] [--fresh]`` measures what ``bench.__main__.BENCHMARKS`` lists, or
``static`` or ``all``; ``make gpu`` runs what only a GPU can tell; ``python -m bench report [--check]`` makes
docs/performance.md and docs/results.md from the results.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
