"""Downstream tasks, by EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from neumuter.evaluation.passes import ROWS
from neumuter.files import PathLike

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def harness_metrics(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    folder: PathLike | None = None,
    rows: int = ROWS,
) -> dict[str, float]:
    """{"task/metric": float} of ``tasks`` (their names) on the model as it is, mutes included.

    ``limit``: only the first documents of each task. ``folder``: of the user's own task files, beside those
    of the harness. Most tasks fetch their documents from the Hugging Face Hub. Standard errors are left out.

    Raises ImportError without the package lm_eval, and ValueError for tasks that it does not have.
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
