"""NeuMuter's own recipe: hard-concrete gates, trained until few of them close."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import ceil, log
from typing import Any

import torch
from torch import Tensor

from neumuter.mutes.mute_set import MuteSet
from neumuter.training.adam import Adam
from neumuter.training.batches import PairedBatches, check_pair
from neumuter.training.constants import check_constants
from neumuter.training.gates import STRETCH, TEMPERATURE
from neumuter.training.journal import Journal
from neumuter.training.processes import agree
from neumuter.training.step import Measured, Step
from neumuter.types import Callback


@dataclass(frozen=True)
class PaperConfig:
    """The authors' values (Hou et al. 2025, section 4 and their code)."""

    # Passes over the forget samples.
    epochs: int = 200
    # Samples of each kind per step, fewer at the end of an epoch; None takes all of them.
    batch_size: int | None = 1
    # Of Adam.
    lr: float = 0.1
    # λ, the weight of the mean probability that a gate is closed.
    sparsity: float = 500.0
    # λ over the number of neurons, instead: 0.0148 on GPT-Neo-125M.
    sparsity_per_neuron: float | None = None
    # η, the weight of KL(reference ‖ masked) on the retain samples.
    kl_weight: float = 5.0
    # Above this forget loss, in nats, descend instead of ascend.
    stop_loss: float = 8.0
    # The weight of that descent.
    descent: float = 5.0
    # Neurons with σ(score) below it are muted.
    threshold: float = 0.15
    # False is the authors' algorithm: one mask for all forget samples of a step and one for all retain
    # samples; noise also in the FFNs before the first masked one, which stay open in the end; and KL at every
    # token of the retain samples. True gives each sample a mask of its own, leaves those FFNs alone, and
    # takes KL where a counted token is predicted.
    refined: bool = False

    def __post_init__(self) -> None:
        check_constants(self, ("lr", "threshold"))
        if not (isinstance(self.threshold, float) and self.threshold < 1):
            raise ValueError(f"threshold must be a float in (0, 1), got {self.threshold!r}")


def train_gates(
    pair: PairedBatches,
    config: PaperConfig = PaperConfig(),
    seed: int = 0,
    callback: Callback | None = None,
    journal: Journal | None = None,
) -> MuteSet:
    """Train the scores of ``pair.masked`` with NeuMuter's objective and select the neurons that closed.

    Per step s·LM(forget) + λ·(1 − mean_l mean_f p) + η·KL(p_ref ‖ p_masked on the retain texts), where LM is
    the mean loss of the counted forget tokens, s = −1 while LM ≤ stop_loss and +5 above, and
    p = σ(score − β·ln(−γ/ζ)) is the probability that a gate is open (Hou et al. 2025; Louizos et al.
    2018). λ over the number of neurons is the pull on each, which therefore depends on the model's size;
    ``sparsity_per_neuron`` gives that pull itself.

    This is what the authors' code computes, with two differences. Padding never counts. An epoch is one pass
    over the forget samples, and the retain samples go on where the last epoch ended; in the authors' code
    both begin anew, and the epoch ends with the shorter of the two. ``config.refined`` changes more.

    Args:
        pair: the forget and retain texts.
        callback: called as (step, total, info) after every step; info has "loss", "forget_loss" and "kl"
            in nats, and "muted", the share of neurons below the threshold.
        journal: see ``fit_mutes``.

    Returns:
        A MuteSet of mode "mute" with the evaluation gates as gains. The scores stay as they were trained.

    Raises:
        NothingSelectedError: no neuron ended below the threshold.
    """
    check_pair(pair, config=config, seed=seed)
    total = count_gate_steps(pair.forget_count, config)

    def tell(number: int, info: dict[str, float]) -> None:
        if callback:
            callback(number, total, info)

    step, ids = make_step(pair, config, seed), _steps(pair, config, seed)
    (journal or Journal()).take("gates", step, ids, total, callback and tell)
    method = describe_method(config) | {
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "lr": config.lr,
    }
    return agree(pair.masked.select(threshold=config.threshold, method=method, seed=seed))


def count_gate_steps(forget_count: int, config: PaperConfig) -> int:
    """Count the steps that ``train_gates`` takes."""
    return config.epochs * ceil(forget_count / (config.batch_size or forget_count))


def make_step(pair: PairedBatches, config: PaperConfig = PaperConfig(), seed: int = 0) -> Step:
    """Make the step that ``train_gates`` takes."""
    scores = list(pair.masked.scores.values())
    return Step(
        pair,
        scores,
        lambda inputs, counter: sample_gates(pair, config, seed, counter, inputs.samples, at_once=True),
        [lambda found: _objective(found, scores, config)],
        Adam(scores, [config.lr]),
        lambda: measure_closed_share(scores, config.threshold),
        everywhere=not config.refined,
    )


def _objective(found: Measured, scores: Sequence[Tensor], config: PaperConfig) -> Tensor:
    forget_loss = found.mean(found.losses)
    parts = found.processes.count if found.processes else 1
    return combine_losses(forget_loss, found.kl, scores, config, found.whole(forget_loss), parts)


def _steps(pair: PairedBatches, config: PaperConfig, seed: int) -> Iterator[list[int]]:
    """The sample ids of each step, forget samples first."""
    for epoch in range(config.epochs):
        pairs, size = pair.epoch(epoch, seed), config.batch_size
        if size is None:
            yield list(range(pair.forget_count + pair.retain_count))
        else:
            for start in range(0, len(pairs), size):
                yield join_pairs(pairs[start : start + size])


def join_pairs(pairs: Sequence[tuple[int, int]]) -> list[int]:
    """The sample ids of pairs (forget sample, retain sample), forget samples first."""
    return [first for first, _ in pairs] + [second for _, second in pairs]


def sample_gates(
    pair: PairedBatches,
    config: PaperConfig,
    seed: int,
    step: int | Tensor,
    sample_ids: Tensor,
    at_once: bool = False,
) -> AbstractContextManager[object]:
    """Context: the gates of a step, which depend on the seed, the step and, if refined, the samples.

    at_once: see ``Masked.sampling``.
    """
    if config.refined:
        return pair.masked.sampling(seed, step, sample_ids, at_once=at_once)
    # The same noise for all samples of a kind, in all processes: that of ids 0 and 1.
    kinds = (sample_ids >= pair.forget_count).long()
    return pair.masked.sampling(seed, step, kinds, everywhere=True, at_once=at_once)


def combine_losses(
    forget_loss: Tensor,
    kl: Tensor,
    scores: Sequence[Tensor],
    config: PaperConfig,
    level: Tensor,
    parts: int = 1,
) -> Tensor:
    """Compute NeuMuter's loss of a step, a scalar.

    Args:
        level: the forget loss of the whole step, which is compared with stop_loss.
        parts: of how many parts the step's loss is the sum; ``forget_loss`` and ``kl`` are of this part.
    """
    shift = TEMPERATURE * log(-STRETCH[0] / STRETCH[1])
    sign = torch.where(level <= config.stop_loss, -1.0, config.descent)
    sparsity = config.sparsity
    if config.sparsity_per_neuron is not None:
        sparsity = config.sparsity_per_neuron * sum(score.numel() for score in scores)
    closed = 1 - torch.stack([(s - shift).sigmoid().mean() for s in _joined(scores)]).mean()
    return sign * forget_loss + sparsity * closed / parts + config.kl_weight * kl


def measure_closed_share(scores: Sequence[Tensor], threshold: float) -> Tensor:
    """Compute the share of neurons with σ(score) below ``threshold``, a scalar tensor."""
    parts = _joined([score.detach() for score in scores])
    closed = torch.stack([(part.sigmoid() < threshold).sum() for part in parts]).sum()
    return closed / sum(score.numel() for score in scores)


def _joined(scores: Sequence[Tensor]) -> Sequence[Tensor]:
    """The scores in one tensor [L, F], which takes one launch for all layers, where that can be."""
    sharded = any(hasattr(score, "full_tensor") or hasattr(score, "ds_id") for score in scores)
    alike = len({(score.shape, score.device) for score in scores}) == 1
    return [torch.stack(list(scores))] if alike and not sharded else scores


def describe_method(config: PaperConfig) -> dict[str, Any]:
    """Describe the objective as a mute file records it."""
    names = ("sparsity", "sparsity_per_neuron", "kl_weight", "stop_loss", "descent", "threshold", "refined")
    recorded = {name: getattr(config, name) for name in names}
    return {"recipe": "paper", **recorded, "temperature": TEMPERATURE, "stretch": list(STRETCH)}
