"""What mask training is compared with: methods that tune the weights of the model.

All minimise a forget loss, most of them plus ``retain_weight`` times the cross-entropy of the retain texts,
with AdamW over the parameters that require gradients: all of them, or those of a PEFT adapter.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neumuter.training.constants import check_constants
from neumuter.training.losses import predicting, token_losses
from neumuter.training.sources import Shuffled
from neumuter.types import IGNORED, Batch, Callback, check_batch, check_model

METHODS = ("ascent", "difference", "npo", "simnpo", "relearn")
# These take no retain texts.
ALONE = ("ascent", "relearn")


@dataclass(frozen=True)
class WeightsConfig:
    """``method``: "ascent" and "difference", gradient ascent without and with the retain loss (Jang et al.
    2023; Liu et al. 2022); "npo" (Zhang et al. 2024, *Negative Preference Optimization*); "simnpo" (Fan et
    al. 2024, *Simplicity Prevails*). "relearn" is the opposite, for attacks: descent on the forget texts."""

    method: str = "npo"
    steps: int = 50
    # Texts of each kind per step.
    batch_size: int = 8
    lr: float = 1e-5
    weight_decay: float = 0.01
    # Of NPO; 2.5 is usual for SimNPO.
    beta: float = 0.1
    # The margin of SimNPO.
    gamma: float = 0.0
    # Not used by ascent and relearn.
    retain_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        check_constants(self, ("lr",))


def tune_weights(
    model: nn.Module,
    forget_batch: Batch,
    retain_batch: Batch | None,
    config: WeightsConfig = WeightsConfig(),
    seed: int = 0,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """Train the weights of ``model`` in place; returns the config as a dict.

    ``forget_batch``, ``retain_batch``: as in :class:`neumuter.training.batches.PairedBatches`. The methods
    ascent and relearn take None as ``retain_batch``. The reference of NPO is the model as it is now: its
    log-likelihoods of the forget texts are computed once, so no copy is kept.
    ``callback(step, total, info)`` after every step, info = {"loss", "forget_loss", "retain_loss"}.

    Raises ValueError if no parameter requires a gradient.
    """
    check_model(model)
    check_batch("forget_batch", forget_batch)
    if retain_batch is not None:
        check_batch("retain_batch", retain_batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient: nothing can be tuned")
    alone = config.method in ALONE
    if retain_batch is None and not alone:
        raise ValueError(f"retain_batch must be given for method {config.method!r}")
    device = cast(torch.device, model.device)
    given = (forget_batch,) if alone else (forget_batch, cast(Batch, retain_batch))
    batches = [_on(device, b) for b in given]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    reference = torch.zeros(len(batches[0]["labels"]), device=device)
    if config.method == "npo":
        with torch.no_grad():
            reference = torch.cat([text_losses(model, _rows(batches[0], [i])) for i in range(len(reference))])
    generator = torch.Generator().manual_seed(seed)
    queues = [Shuffled(0, len(batch["labels"]), generator) for batch in batches]
    for step in range(1, config.steps + 1):
        forget_ids, *retain_ids = ([next(queue) for _ in range(config.batch_size)] for queue in queues)
        losses = text_losses(model, part := _rows(batches[0], forget_ids))
        loss = forget_loss(losses, predicting(part["labels"]).sum(1), reference[forget_ids], config)
        info = {"forget_loss": losses.detach().sum() / predicting(part["labels"]).sum()}
        if not alone:
            retained = _rows(batches[1], retain_ids[0])
            retain_loss = token_losses(_logits(model, retained), retained["labels"]).mean()
            loss = loss + config.retain_weight * retain_loss
            info["retain_loss"] = retain_loss.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if callback:
            callback(step, config.steps, {name: x.item() for name, x in {"loss": loss, **info}.items()})
    optimizer.zero_grad()
    return asdict(config)


def forget_loss(losses: Tensor, lengths: Tensor, reference: Tensor, config: WeightsConfig) -> Tensor:
    """What is minimised on the forget texts, a scalar.

    ``losses``: −ln π(text) in nats of each text, float [B]; ``lengths``: its counted tokens, int [B];
    ``reference``: −ln π_ref(text), float [B]. Ascent: −mean token loss; relearn: plus. NPO:
    −(2/β)·mean ln σ(−β·ln(π/π_ref)). SimNPO: −(2/β)·mean ln σ(−(β/length)·ln π − γ).
    """
    if config.method in ("ascent", "difference", "relearn"):
        return (1 if config.method == "relearn" else -1) * losses.sum() / lengths.sum()
    if config.method == "npo":
        inside = config.beta * (losses - reference)
    else:
        inside = config.beta * losses / lengths - config.gamma
    return -2 / config.beta * F.logsigmoid(inside).mean()


def text_losses(model: nn.Module, batch: Batch) -> Tensor:
    """−ln π in nats of each text's counted tokens, their sum: float32 [B], differentiable."""
    logits = _logits(model, batch)[:, :-1].float()
    losses = F.cross_entropy(
        logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none", ignore_index=IGNORED
    )
    return losses.sum(1)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits: Tensor = output.logits
    return logits


def _on(device: torch.device, batch: Batch) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}


def _rows(batch: Batch, ids: Sequence[int]) -> Batch:
    return {key: value[ids] for key, value in batch.items()}
