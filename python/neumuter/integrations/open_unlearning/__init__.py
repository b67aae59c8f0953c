"""NeuMuter as a plug-in of open-unlearning (github.com/locuslab/open-unlearning).

A trainer named NeuMuter and the metrics extraction_likelihood and memorization_accuracy, registered from
outside; nothing of that framework is imported here. See docs/open-unlearning.md.
"""

from collections.abc import Callable
from typing import Any

from neumuter.integrations.open_unlearning.metrics import extraction_likelihood, memorization_accuracy
from neumuter.integrations.open_unlearning.trainer import Muting


def register(
    trainers: dict[str, Any], metrics: dict[str, Any], unlearning_metric: Callable[..., Callable[..., Any]]
) -> None:
    """Put the trainer and the metrics into open-unlearning's registries.

    ``trainers``: its TRAINER_REGISTRY, {name: class}, whose FinetuneTrainer becomes the base of ours.
    ``metrics``: its METRICS_REGISTRY, {name: metric}. ``unlearning_metric``: its decorator, which makes
    metrics of functions. Raises KeyError if there is no FinetuneTrainer.
    """
    trainers["NeuMuter"] = type("NeuMuter", (Muting, trainers["FinetuneTrainer"]), {})
    for function in (extraction_likelihood, memorization_accuracy):
        metrics[function.__name__] = unlearning_metric(name=function.__name__)(function)
