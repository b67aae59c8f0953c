"""open-unlearning's metrics ``extraction_likelihood`` and ``memorization_accuracy``.

Functions of a model and of what that framework makes of a metric's configuration: ``data``, a dataset of
samples with ``input_ids``, ``labels`` and ``index``; and ``batch_size``. They return
{"agg_value": the mean, "value_by_index": {index: {"score": value}}}; a value is None where it is not defined,
and the mean leaves it out.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from neumuter.evaluation import extraction_likelihood as mean_extraction_likelihood
from neumuter.evaluation.passes import find_hits
from neumuter.integrations.open_unlearning.batches import batch_of
from neumuter.training.losses import predicting
from neumuter.types import Batch


def extraction_likelihood(
    model: nn.Module, data: Any, batch_size: int, n: int = 10, **_: Any
) -> dict[str, Any]:
    """EL_n (Jang et al. 2023) of each sample's answer, its counted tokens; None for fewer than n.

    See ``neumuter.evaluation.extraction_likelihood``.
    """

    def scores(batch: Batch) -> list[float | None]:
        rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["labels"]))]
        long_enough = [predicting(row["labels"]).sum() >= n for row in rows]
        return [
            mean_extraction_likelihood(model, row, n, answers=True) if enough else None
            for row, enough in zip(rows, long_enough, strict=True)
        ]

    return _by_index(data, batch_size, scores)


def memorization_accuracy(model: nn.Module, data: Any, batch_size: int, **_: Any) -> dict[str, Any]:
    """MA (Jang et al. 2023) of each sample's counted tokens, see ``neumuter.evaluation``; None if none."""

    def scores(batch: Batch) -> list[float | None]:
        counted, right = (found.sum(1).tolist() for found in find_hits(model, batch, batch_size))
        return [hit / count if count else None for hit, count in zip(right, counted, strict=True)]

    return _by_index(data, batch_size, scores)


def _by_index(data: Any, batch_size: int, scores: Callable[[Batch], list[float | None]]) -> dict[str, Any]:
    samples = [data[i] for i in range(len(data))]
    found = {}
    for start in range(0, len(samples), batch_size):
        some = samples[start : start + batch_size]
        for sample, score in zip(some, scores(batch_of(some)), strict=True):
            found[int(sample["index"])] = {"score": score}
    defined = [value["score"] for value in found.values() if value["score"] is not None]
    # NaN if there is none, as in their metrics.
    mean = torch.tensor(defined, dtype=torch.float64).mean().item()
    return {"agg_value": mean, "value_by_index": found}
