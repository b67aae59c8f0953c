"""How much work a search is, known before it begins."""

from typing import NamedTuple

from neumuter.recipes.fisher import MEASURED_RETAIN
from neumuter.recipes.fitted import FittedConfig, GainsConfig
from neumuter.recipes.paper import PaperConfig, count_gate_steps
from neumuter.recipes.schedule import count_steps
from neumuter.recipes.support import SupportConfig
from neumuter.texts.encoding import count_rows, count_tokens
from neumuter.texts.store import Windows
from neumuter.types import Batch


class Work(NamedTuple):
    """The work of a search in this process.

    steps: of all phases. ranking: tokens that go through the model, forward and back, before the first step.
    fitting: tokens that do so in all steps.
    """

    steps: int
    ranking: int
    fitting: int

    def count_left(self, done: int) -> int:
        """Count the tokens that are left after ``done`` steps."""
        left = max(0, self.steps - done)
        return self.fitting * left // max(1, self.steps) + (0 if done else self.ranking)


def estimate_work(
    forget: Batch | Windows | None,
    retain: Batch | Windows,
    config: FittedConfig | GainsConfig | PaperConfig,
    mode: str = "modulate",
    processes: int = 1,
) -> Work:
    """Estimate the work of a search, from the texts alone.

    Args:
        forget, retain: the texts, as ``PairedBatches`` takes them.
        config: of ``fit_mutes`` with ``mode``, of ``refit_gains``, or of ``train_gates``.
        processes: how many share the samples of each step.
    """
    counts = [0 if batch is None else count_rows(batch) for batch in (forget, retain)]
    sizes = [0 if batch is None else count_tokens(batch) for batch in (forget, retain)]

    def count(visits: list[int]) -> int:
        """The tokens of so many visits to samples of each kind."""
        parts = zip(sizes, visits, counts, strict=True)
        return sum(size * seen // max(1, count) for size, seen, count in parts) // processes

    if isinstance(config, PaperConfig):
        pairs = counts if config.batch_size is None else counts[:1] * 2
        visits = [config.epochs * number for number in pairs]
        return Work(count_gate_steps(counts[0], config), 0, count(visits))
    ranked = [0, 0]
    if isinstance(config, GainsConfig):
        phases: list[GainsConfig | SupportConfig] = [config]
    else:
        support = config.support or (SupportConfig() if mode == "mute" else None)
        phases = [support] if support else []
        phases += [config.gains] if mode == "modulate" else []
        # The Fisher pass reads all forget samples.
        ranked = ranked if support else [counts[0], min(counts[1], MEASURED_RETAIN)]
    total, visits = 0, [0, 0]
    for phase in phases:
        steps = count_steps(counts[0], phase.steps, phase.batch_size)
        total += steps
        for kind, number in enumerate(counts):
            visits[kind] += steps * min(phase.batch_size or number, number)
    return Work(total, count(ranked), count(visits))
