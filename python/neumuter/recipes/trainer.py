"""NeuMuter's recipe inside transformers' Trainer, with its logging, accumulation and checkpoints."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from neumuter.evaluation import summary_metrics
from neumuter.files import PathLike, write_atomically
from neumuter.models.devices import move
from neumuter.models.modes import without_dropout
from neumuter.mutes.mute_set import MuteSet
from neumuter.recipes.paper import (
    PaperConfig,
    combine_losses,
    describe_method,
    join_pairs,
    measure_closed_share,
    sample_gates,
)
from neumuter.training.batches import PairedBatches
from neumuter.training.masked import attach
from neumuter.training.selection import NothingSelectedError, neuron_count
from neumuter.types import Batch

# The file of the scores in a checkpoint.
SCORES = "scores.safetensors"
_PAPER = PaperConfig()


@dataclass
class NeuMuterConfig(TrainingArguments):
    """transformers' TrainingArguments with the authors' values as defaults, and what NeuMuter adds.

    ``sparsity``, ``sparsity_per_neuron``, ``kl_weight``, ``stop_loss``, ``descent``, ``threshold``,
    ``refined``: as in ``PaperConfig``. An epoch is one pass over the forget samples. ``budget``: a share
    (float) or number (int) of neurons to mute, instead of the threshold. ``start_layer``: the first FFN that
    gets gates. ``goal_forget_loss``, ``goal_forget_ma``: training ends
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
    refined: bool = _PAPER.refined
    budget: float | None = None
    start_layer: int = 1
    goal_forget_loss: float | None = None
    goal_forget_ma: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # transformers'
        if self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel must be False: when training begins, the Trainer would put Liger's FFNs in "
                "the place of those with gates, which run on NeuMuter's own kernels"
            )
        if (
            self.goal_forget_loss is not None or self.goal_forget_ma is not None
        ) and self.eval_strategy == "no":
            raise ValueError("goals are looked at in evaluations: set eval_strategy to 'epoch' or 'steps'")
        # A command line gives a number of neurons as a float, too.
        if isinstance(self.budget, float) and self.budget > 1 and self.budget.is_integer():
            self.budget = int(self.budget)
        _ = self.objective  # raises where a constant is bad

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
            refined=self.refined,
        )


class _Item(NamedTuple):
    """A forget and a retain sample. Not counted: it fills the batches at the end of an epoch, so that all
    processes have equally many."""

    forget: int
    retain: int
    counted: bool


class _ForgetSamples(torch.utils.data.Dataset[_Item]):
    """As long as there are forget samples. What the sampler draws is itself the item."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: _Item) -> _Item:
        return item


class _Epochs(torch.utils.data.Sampler[_Item]):
    """The pairs of the Trainer's current epoch, filled up to a multiple of ``size``."""

    def __init__(self, trainer: "NeuMuterTrainer", size: int) -> None:
        self.trainer, self.size = trainer, size

    def __len__(self) -> int:
        return math.ceil(self.trainer.pair.forget_count / self.size) * self.size

    def __iter__(self) -> Iterator[_Item]:
        trainer = self.trainer
        pairs = trainer.pair.epoch(int(trainer.state.epoch or 0), trainer.args.seed)
        yield from (_Item(*pair, counted=True) for pair in pairs)
        yield from [_Item(*pairs[0], counted=False)] * (len(self) - len(pairs))


def _collate(items: Sequence[_Item]) -> dict[str, Any]:
    counted = [item for item in items if item.counted]
    ids = join_pairs([(item.forget, item.retain) for item in counted or items[:1]])
    # A list: a tensor would go to the device, and coming back wait for it.
    return {"sample_ids": ids, "weight": float(bool(counted))}


class _Step(NamedTuple):
    """A step of all processes: its batches in each; its tokens that count, int64 [2] of forget and retain;
    and its forget loss where each batch needs it first."""

    batches: int
    tokens: torch.Tensor
    level: torch.Tensor | None


class _Goals(TrainerCallback):
    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        if _are_met(cast(NeuMuterConfig, args), given["metrics"]):
            control.should_training_stop = True


def _are_met(goals: NeuMuterConfig, metrics: Mapping[str, float]) -> bool:
    """Whether there are goals, and all of them are met."""
    # The metrics of another evaluation may have other names.
    if "eval_forget_loss" not in metrics:
        return False
    wanted: tuple[tuple[float | None, Callable[[float], bool]], ...] = (
        (goals.goal_forget_loss, lambda goal: metrics["eval_forget_loss"] >= goal),
        (goals.goal_forget_ma, lambda goal: metrics["eval_forget_ma"] <= goal),
    )
    reached = [met(goal) for goal, met in wanted if goal is not None]
    return bool(reached) and all(reached)


class NeuMuterTrainer(Trainer):
    """Trains the gates of a model with NeuMuter's objective (see ``recipes.train_gates``).

    ``model``: attached here (``trainer.masked``); detach it with ``trainer.masked.detach()``. ``args``:
    NeuMuterConfig. ``forget_batch``, ``retain_batch``: see ``PairedBatches``. Other
    arguments go to transformers' Trainer. A training batch has ``per_device_train_batch_size`` samples of
    each kind, fewer at the end of an epoch. How a step is split into batches and processes changes nothing
    but rounding. Dropout of the model is off.

    Accelerate wraps the steps of a Trainer, so they run eagerly; on one GPU ``recipes.train_gates`` takes the
    same steps as CUDA graphs, which launch faster. What is done here in a step never waits for the device.

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
        self.batches = {"forget": forget_batch, "retain": retain_batch}
        self._sums: dict[str, Tensor | float] = {}
        self._steps = 0
        args.remove_unused_columns = False
        try:
            # A bad budget must not show after training.
            if args.budget is not None:
                neuron_count(args.budget, sum(len(score) for score in self.masked.scores.values()))
            self.pair = PairedBatches(self.masked, forget_batch, retain_batch)
            # Before the Trainer wraps the model.
            if not args.refined:
                self.masked.open_before()
            data = _ForgetSamples(self.pair.forget_count)
            super().__init__(
                model=model, args=args, train_dataset=data, eval_dataset=data, data_collator=_collate,
                callbacks=[_Goals(), *callbacks], **options,
            )  # fmt: skip
        except BaseException:
            self.masked.detach()
            raise
        # In evaluation mode transformers does nothing of it.
        if args.gradient_checkpointing:
            self.masked.recomputation.begin()
        # Or the Trainer would divide by the number of batches, which may have unequally many tokens.
        self.model_accepts_loss_kwargs = True

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any
    ) -> TrainOutput:
        """``resume_from_checkpoint``: a folder, or True for the last whole checkpoint, if there is one.

        A checkpoint of which the goals were met is loaded, and no step is taken.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(cast(str, self.args.output_dir))
        if isinstance(resume_from_checkpoint, str) and Path(resume_from_checkpoint, SCORES).is_file():
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json"))
            last = [entry for entry in state.log_history if entry["step"] == state.global_step]
            if any(_are_met(self.args, entry) for entry in last):
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint, *arguments, **options)

    def _get_train_sampler(self, train_dataset: Any = None) -> _Epochs:
        return _Epochs(self, self._train_batch_size * self.accelerator.num_processes)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of a step; and their ``_Step``, which the losses of each depend on."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [
            self.pair.count_tokens(batch["sample_ids"], not self.args.refined)
            for batch in batches
            if batch["weight"]
        ]
        tokens = move(torch.tensor([(0, 0), *counts]).sum(0), device)
        tokens = self.accelerator.reduce(tokens, "sum")
        level = self._measure_level(batches) / tokens[0] if len(batches) > 1 else None
        self._steps += 1
        return batches, _Step(len(batches), tokens, level)

    @torch.no_grad()
    def _measure_level(self, batches: Sequence[dict[str, Any]]) -> Tensor:
        """The sum of the forget losses of all tokens of a step: whether it ascends depends on it."""
        total = torch.zeros((), device=self.args.device)
        with without_dropout(self.model), self.accelerator.autocast():
            for batch in batches:
                forget = [i for i in batch["sample_ids"] if i < self.pair.forget_count]
                with self._sampling(forget):
                    total += batch["weight"] * torch.cat([*self.pair.sample_losses(forget)]).sum()
        return cast(Tensor, self.accelerator.reduce(total, "sum"))

    def _sampling(self, sample_ids: Sequence[int]) -> AbstractContextManager[object]:
        step = self.state.global_step
        return sample_gates(self.pair, self.args.objective, self.args.seed, step, torch.tensor(sample_ids))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        # Around the backward pass, too, in which activation checkpointing runs the forward again.
        with self._sampling(inputs["sample_ids"]):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        step: _Step = num_items_in_batch
        # Dropout is off, also that of a layer itself. The Trainer switches back in every step.
        model.eval()
        # The Trainer leaves this to the model's own forward, which is called only where something wraps it.
        with self.accelerator.autocast():
            losses = self.pair.token_losses(inputs["sample_ids"], model, not self.args.refined)
        # What this batch adds to the means of the step.
        parts = torch.stack([inputs["weight"] * loss.sum() for loss in losses]) / step.tokens
        means = self.accelerator.reduce(parts.detach(), "sum")
        # Gradients are averaged over processes.
        forget_loss, kl = parts * self.accelerator.num_processes
        scores = list(self.masked.scores.values())
        level = means[0] if step.level is None else step.level
        loss = combine_losses(forget_loss, kl, scores, self.args.objective, level, step.batches)
        closed = measure_closed_share(scores, self.args.threshold) / step.batches
        for name, value in {"forget_loss": means[0], "kl": means[1], "muted": closed}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {name: float(total) / self._steps for name, total in self._sums.items()}
            self._sums, self._steps = {}, 0
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The forget loss and MA and the retain loss with the neurons muted that would be muted now.

        "muted" is the share of these neurons.
        """
        layers = self._selected()
        with without_dropout(self.model), self.masked.applying(self._masks(layers)):
            metrics = summary_metrics(self.model, **self.batches)
        muted = sum(len(indices) for indices, _ in layers.values())
        metrics["muted"] = muted / sum(score.numel() for score in self.masked.scores.values())
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *arguments: Any, **options: Any) -> Any:
        raise NotImplementedError("NeuMuterTrainer predicts nothing; evaluate() measures what is forgotten")

    def _selected(self) -> dict[str, tuple[Tensor, Tensor]]:
        try:
            return self.masked.selected(**self._selection())
        except NothingSelectedError:
            return {}

    def _masks(self, layers: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
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
            shapes = {name: file.get_slice(name).get_shape() for name in set(file.keys())}
            if shapes != {name: [*score.shape] for name, score in scores.items()}:
                raise ValueError(f"{path} holds scores of other FFNs than this model has")
            for name, score in scores.items():
                score.copy_(file.get_tensor(name))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(cast(str, self.state.best_model_checkpoint))


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
