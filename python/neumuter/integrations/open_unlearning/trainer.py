"""open-unlearning's trainer ``NeuMuter``."""

import math
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import TrainOutput

from neumuter.integrations.open_unlearning.batches import batch_of
from neumuter.mutes.mute_set import MuteSet
from neumuter.recipes import FittedConfig, GainsConfig
from neumuter.recipes.trainer import SCORES, NeuMuterConfig, NeuMuterTrainer
from neumuter.serving.fold import fold
from neumuter.training.losses import predicting
from neumuter.training.selection import NothingSelectedError
from neumuter.types import Batch
from neumuter.unlearning import unlearn

# The mute file in the output folder.
MUTES = "mutes.safetensors"
SHARED = ("output_dir", "seed", "logging_steps", "report_to", "disable_tqdm", "use_cpu")


class Muting:
    """What makes a trainer of open-unlearning NeuMuter's; ``register`` puts it before FinetuneTrainer.

    Training finds neurons and folds them into the weights, so what is then saved and evaluated is the muted
    model. The samples come from ``train_dataset.forget`` and ``train_dataset.retain``, without the collator.

    The method's arguments (``trainer.method_args``):

    recipe: "fitted", the recipe of ``neumuter.unlearn``, or "paper", NeuMuter's own inside
        ``NeuMuterTrainer``.
    start_layer: the first FFN that gets gates.
    retain_limit: how many of the retain samples serve, drawn by the seed; None takes all.
    fitted: ``budget`` and fields of ``GainsConfig``.
    paper: fields of ``NeuMuterConfig``.

    Of ``trainer.args``, ``SHARED`` are read, and ``num_train_epochs`` where the recipe's own steps or epochs
    are None: an epoch is one pass over the forget samples. Learning rates and batch sizes there are for
    weights. All other arguments go to the base class, whichever of its two names the tokenizer has.

    Raises:
        ValueError: another recipe, or an argument that neither this class nor the base class takes.
    """

    # These attributes are FinetuneTrainer's.
    args: Any
    log: Callable[[dict[str, float]], None]
    model: nn.Module
    state: Any
    train_dataset: Any

    def __init__(
        self,
        *args: Any,
        recipe: str = "fitted",
        start_layer: int = 1,
        retain_limit: int | None = None,
        paper: dict[str, Any] | None = None,
        fitted: dict[str, Any] | None = None,
        tokenizer: Any = None,
        processing_class: Any = None,
        **options: Any,
    ) -> None:
        recipes = {"fitted": (self._fitted, fitted), "paper": (self._paper, paper)}
        if recipe not in recipes:
            raise ValueError(f'method_args.recipe must be "fitted" or "paper", got {recipe!r}')
        if retain_limit is not None and retain_limit < 1:
            raise ValueError(f"method_args.retain_limit must be null or at least 1, got {retain_limit!r}")
        taken = {name for base in type(self).__mro__[:-1] for name in signature(base).parameters}
        if strange := sorted(options.keys() - taken):
            away = " ".join(f"~trainer.method_args.{name}" for name in strange)
            raise ValueError(
                f"the trainer NeuMuter does not take {', '.join(strange)}, which the experiment sets for "
                f"another trainer. Add to the command: {away}"
            )
        self._recipe, settings = recipes[recipe]
        self._settings = {key: _plain(value) for key, value in (settings or {}).items()}
        self._start_layer, self._retain_limit = start_layer, retain_limit
        given = processing_class if tokenizer is None else tokenizer
        super().__init__(*args, processing_class=given, **options)  # type: ignore[call-arg]  # FinetuneTrainer's
        # FinetuneTrainer.evaluate reads it, and transformers 5 no longer sets it.
        self.tokenizer = given

    def train(self) -> TrainOutput:
        """Find the neurons, write their mute file to the output folder and fold them; a TrainOutput.

        Raises ValueError for a dataset without forget or retain samples, NothingSelectedError if the paper's
        recipe closed no gate, after it has saved the scores, and what ``fold`` raises. No weight is changed
        then.
        """
        forget_batch = self._batch("forget")
        retain_batch = self._batch("retain", self._retain_limit)
        mutes, output = self._recipe(forget_batch, retain_batch)
        if self.args.should_save:
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            mutes.save(Path(self.args.output_dir) / MUTES)
        fold(self.model, mutes)
        return output

    def _batch(self, split: str, count: int | None = None) -> Batch:
        """The samples of a split that count a token, or ``count`` of them, as a batch."""
        data = getattr(self.train_dataset, split, None)
        if not data:
            raise ValueError(
                f"the trainer NeuMuter needs forget and retain samples; there is no {split} data"
            )
        order = list(range(len(data)))
        if count is not None:
            generator = torch.Generator().manual_seed(self.args.seed)
            order = torch.randperm(len(data), generator=generator)[:count].tolist()
        batch = batch_of([data[i] for i in order])
        # Their tokenisation may leave an answer without a token.
        counting = predicting(batch["labels"]).any(1)
        return {key: value[counting] for key, value in batch.items()}

    def _paper(self, forget_batch: Batch, retain_batch: Batch) -> tuple[MuteSet, TrainOutput]:
        shared = {name: getattr(self.args, name) for name in SHARED}
        own = {"start_layer": self._start_layer, "save_strategy": "no"} | self._settings
        if own.get("num_train_epochs") is None:
            own["num_train_epochs"] = self.args.num_train_epochs
        inner = NeuMuterTrainer(self.model, NeuMuterConfig(**shared | own), forget_batch, retain_batch)
        with inner.masked:
            output = inner.train()
            self.state = inner.state
            try:
                return inner.mute_set(), output
            except NothingSelectedError as error:
                inner.save_model()
                scores = Path(self.args.output_dir) / SCORES
                raise NothingSelectedError(
                    f"{error}. Set trainer.method_args.paper.budget to a share of the neurons, train longer "
                    "(paper.num_train_epochs), or take the recipe fitted. The scores are kept in "
                    f"{scores}: docs/open-unlearning.md says how to select by them"
                ) from None

    def _fitted(self, forget_batch: Batch, retain_batch: Batch) -> tuple[MuteSet, TrainOutput]:
        settings = {"budget": None, "batch_size": GainsConfig.batch_size} | self._settings
        budget, count = settings.pop("budget"), len(forget_batch["labels"])
        if settings.get("steps") is None:
            # A step never has more samples than there are.
            size = min(settings["batch_size"] or count, count)
            settings["steps"] = math.ceil(self.args.num_train_epochs * count / size)
        # Below 1 it is a share of the steps.
        every = self.args.logging_steps
        every = every if every >= 1 else math.ceil(every * settings["steps"])
        losses = list[float]()

        def report(step: int, total: int, info: dict[str, Any]) -> None:
            self.state.global_step = step
            losses.append(info["loss"])
            if step % every == 0:
                self.log({name: info[name] for name in ("loss", "forget_loss", "kl", "muted")})

        outcome = unlearn(
            self.model,
            None,
            forget_batch,
            retain_batch,
            budget=budget,
            recipe=FittedConfig(GainsConfig(**settings)),
            samples=0,
            start_layer=self._start_layer,
            seed=self.args.seed,
            callback=report,
        )
        return outcome.mutes, TrainOutput(len(losses), sum(losses) / len(losses), {})


def _plain(value: Any) -> Any:
    """Lists of Hydra's as tuples, which mute files can record."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
