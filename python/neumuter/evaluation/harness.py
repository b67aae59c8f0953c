"""Downstream tasks, by EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from neumuter.evaluation.passes import SAMPLES_PER_PASS
from neumuter.files import PathLike

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def harness_metrics(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    folder: PathLike | None = None,
    rows: int = SAMPLES_PER_PASS,
) -> dict[str, float]:
    """Measure tasks of the harness on the model as it is, mutes included.

    Most tasks fetch their documents from the Hugging Face Hub.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        tasks: names of tasks.
        limit: only this many documents of each task, the first ones.
        folder: a folder with task files of your own, which are added to those of the harness.
        rows: documents in one forward pass.

    Returns:
        {"task/metric": float}, without standard errors.

    Raises:
        ImportError: the package lm_eval is not installed.
        ValueError: the harness does not have a task of that name.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("downstream tasks need the package lm_eval: pip install lm_eval") from error
    manager = TaskManager(include_path=folder)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise ValueError(f"lm-evaluation-harness has no task {', '.join(unknown)}")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=rows)
    found = lm_eval.simple_evaluate(
        wrapped, tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    return {
        f"{task}/{name.removesuffix(',none')}": float(value)
        for task, values in found["results"].items()
        for name, value in values.items()
        if isinstance(value, (int, float)) and "_stderr" not in name and "," in name
    }
