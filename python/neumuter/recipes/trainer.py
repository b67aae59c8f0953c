"""NeuMuter's recipe inside transformers' Trainer, with its logging, accumulation and checkpoints."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from neumuter.evaluation import summary_metrics
from neumuter.files import PathLike, write_atomically
from neumuter.models.modes import without_dropout
from neumuter.mutes.mute_set import MuteSet
from neumuter.recipes.paper import PaperConfig, combine_losses, describe_method, measure_closed_share
from neumuter.training.batches import PairedBatches
from neumuter.training.masked import NothingSelectedError, attach
from neumuter.types import Batch

# The file of the scores in a checkpoint.
SCORES = "scores.safetensors"
_PAPER = PaperConfig()


@dataclass
class NeuMuterConfig(TrainingArguments):
    """transformers' TrainingArguments with the authors' values as defaults, and what NeuMuter adds.

    ``sparsity``, ``sparsity_per_neuron``, ``kl_weight``, ``stop_loss``, ``descent``, ``threshold``: as in
    ``PaperConfig``. ``budget``: a share (float) or number (int) of neurons to mute, instead of the threshold.
    ``start_layer``: the first FFN that gets gates. ``goal_forget_loss``, ``goal_forget_ma``: training ends
    as soon as an evaluation finds the forget loss (nats) at or above, and the MA at or below, these.
    ``seed`` is also the gates'.
    """

    learning_rate: float = _PAPER.lr
    num_train_epochs: float = _PAPER.epochs
    per_device_train_batch_size: int = _PAPER.batch_size or 1
    lr_scheduler_type: str = "constant"
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    sparsity: float = _PAPER.sparsity
    sparsity_per_neuron: float | None = _PAPER.sparsity_per_neuron
    kl_weight: float = _PAPER.kl_weight
    stop_loss: float = _PAPER.stop_loss
    descent: float = _PAPER.descent
    threshold: float = _PAPER.threshold
    budget: float | None = None
    start_layer: int = 1
    goal_forget_loss: float | None = None
    goal_forget_ma: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # transformers'
        if (
            self.goal_forget_loss is not None or self.goal_forget_ma is not None
        ) and self.eval_strategy == "no":
            raise ValueError("goals are looked at in evaluations: set eval_strategy to 'epoch' or 'steps'")

    @property
    def objective(self) -> PaperConfig:
        """The constants of the objective."""
        return PaperConfig(
            sparsity=self.sparsity,
            sparsity_per_neuron=self.sparsity_per_neuron,
            kl_weight=self.kl_weight,
            stop_loss=self.stop_loss,
            descent=self.descent,
            threshold=self.threshold,
        )


class _Indices(torch.utils.data.Dataset[tuple[int, int]]):
    """Pairs of sample ids; every forget and every retain sample comes at least once in a round."""

    def __init__(self, forget: int, retain: int) -> None:
        self.forget, self.retain = forget, retain

    def __len__(self) -> int:
        return max(self.forget, self.retain)

    def __getitem__(self, i: int) -> tuple[int, int]:
        return i % self.forget, self.forget + i % self.retain


def _collate(pairs: Sequence[tuple[int, int]]) -> dict[str, list[int]]:
    # A list: a tensor would go to the device, and coming back wait for it.
    return {"sample_ids": [first for first, _ in pairs] + [second for _, second in pairs]}


class _Goals(TrainerCallback):
    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        goals, metrics = cast(NeuMuterConfig, args), given["metrics"]
        wanted: tuple[tuple[float | None, Callable[[float], bool]], ...] = (
            (goals.goal_forget_loss, lambda goal: metrics["eval_forget_loss"] >= goal),
            (goals.goal_forget_ma, lambda goal: metrics["eval_forget_ma"] <= goal),
        )
        reached = [met(goal) for goal, met in wanted if goal is not None]
        if reached and all(reached):
            control.should_training_stop = True


class NeuMuterTrainer(Trainer):
    """Trains the gates of a model with NeuMuter's objective (see ``recipes.train_gates``).

    ``model``: attached here (``trainer.masked``); detach it with ``trainer.masked.detach()``. ``args``:
    NeuMuterConfig. ``forget_batch``, ``retain_batch``: see ``PairedBatches``. Other
    arguments go to transformers' Trainer. A training batch has ``per_device_train_batch_size`` samples of
    each kind. Dropout of the model is off.

    Checkpoints hold the scores, the optimiser and the Trainer's state, not the model. The gates' noise
    depends on the seed, the step and the samples alone, so a resumed run goes on with the same bits on the
    CPU.
    """

    args: NeuMuterConfig
    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        args: NeuMuterConfig,
        forget_batch: Batch,
        retain_batch: Batch,
        callbacks: Sequence[TrainerCallback] = (),
        **options: Any,
    ) -> None:
        self.masked = attach(model, args.start_layer)
        try:
            self.pair = PairedBatches(self.masked, forget_batch, retain_batch)
        except BaseException:
            self.masked.detach()
            raise
        self.batches = {"forget": forget_batch, "retain": retain_batch}
        self._sums: dict[str, tuple[Tensor | float, int]] = {}
        data = _Indices(self.pair.forget_count, self.pair.retain_count)
        args.remove_unused_columns = False
        super().__init__(
            model=model, args=args, train_dataset=data, eval_dataset=data, data_collator=_collate,
            callbacks=[_Goals(), *callbacks], **options,
        )  # fmt: skip
        self.model_accepts_loss_kwargs = False

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any
    ) -> TrainOutput:
        """``resume_from_checkpoint``: a folder, or True for the last whole checkpoint, if there is one."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(cast(str, self.args.output_dir))
        return super().train(resume_from_checkpoint, *arguments, **options)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        # Around the backward pass, too, in which activation checkpointing runs the forward again.
        with self.masked.sampling(self.args.seed, self.state.global_step, inputs["sample_ids"]):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not self.args.gradient_checkpointing:
            # This turns dropout off; the Trainer switches back in every step.
            model.eval()
        losses = self.pair.token_losses(inputs["sample_ids"], through=model)
        (forget_loss, level), (kl, divergence) = map(self._mean, losses)
        scores = list(self.masked.scores.values())
        loss = combine_losses(forget_loss, kl, scores, self.args.objective, level)
        closed = measure_closed_share(scores, self.args.threshold)
        parts = {"forget_loss": level, "kl": divergence, "muted": closed}
        for name, value in parts.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value.detach(), count + 1
        return (loss, {}) if return_outputs else loss

    def _mean(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """(what this process adds to the mean of all processes' tokens times their number, that mean).

        Gradients are averaged over processes, which have different numbers of tokens: so the result does not
        depend on how samples are split among them.
        """
        total = torch.stack([losses.detach().sum(), losses.new_tensor(len(losses))])
        total = self.accelerator.reduce(total, "sum")
        return losses.sum() * self.accelerator.num_processes / total[1], total[0] / total[1]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {name: float(total) / count for name, (total, count) in self._sums.items()}
            self._sums = {}
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The forget loss and MA and the retain loss with the neurons muted that would be muted now."""
        with without_dropout(self.model), self.masked.applying(self._masks()):
            metrics = summary_metrics(self.model, **self.batches)
        scores = list(self.masked.scores.values())
        metrics["muted"] = float(measure_closed_share(scores, self.args.threshold))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _masks(self) -> dict[str, Tensor]:
        try:
            layers = self.masked.selected(**self._selection())
        except NothingSelectedError:
            return {}
        scores, masks = self.masked.scores, {}
        for path, (indices, gains) in layers.items():
            place = scores[path].device
            masks[path] = torch.ones(len(scores[path]), device=place).index_copy(
                0, indices.long().to(place), gains.to(place)
            )
        return masks

    def mute_set(self) -> MuteSet:
        """The ``MuteSet`` of the scores as they are: ``masked.select`` by the budget or the threshold."""
        method = describe_method(self.args.objective)
        return self.masked.select(**self._selection(), method=method, seed=self.args.seed)

    def _selection(self) -> dict[str, Any]:
        by_budget = self.args.budget is not None
        return {"budget": self.args.budget} if by_budget else {"threshold": self.args.threshold}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or cast(str, self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            scores = {path: score.detach().cpu() for path, score in self.masked.scores.items()}
            write_atomically(folder / SCORES, to_safetensors(scores))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint) / SCORES
        with safe_open(path, framework="pt") as file, torch.no_grad():
            scores = self.masked.scores
            if set(file.keys()) != set(scores):
                raise ValueError(f"{path} holds scores of other FFNs than this model has")
            for name, score in scores.items():
                score.copy_(file.get_tensor(name))


def last_checkpoint(folder: PathLike) -> str | None:
    """The last whole checkpoint in a folder, or None. The Trainer writes trainer_state.json last."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        if number and (path / SCORES).is_file():
            found.append((int(number[1]), str(path)))
    return max(found, default=(-math.inf, None))[1]
