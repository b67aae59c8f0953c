"""All metrics at once, on the texts or the TOFU files that a user has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from neumuter.evaluation import language, membership, memory, tofu
from neumuter.evaluation.metrics import METRICS
from neumuter.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts of at most this number of tokens have no EL.
EL_N = 10


def text_metrics(
    model: nn.Module,
    forget: Batch,
    retain: Batch | None = None,
    heldout: Batch | None = None,
    paraphrased: Batch | None = None,
    original: nn.Module | Callable[[], AbstractContextManager[object]] | None = None,
    retrained_auc: float | None = None,
    nonmembers: Batch | None = None,
) -> dict[str, float]:
    """Measure what is in ``METRICS`` on batches of texts, as far as these are given.

    EL_10 is left out if a forget text has at most 10 tokens.

    Args:
        model: the model as it is, mutes included.
        forget: the texts to forget: input_ids, attention_mask and labels, int64 [B, T] each; −100 on tokens
            that do not count. The other batches are alike.
        retain: texts to keep.
        heldout: texts that the model never saw, for membership and perplexity.
        paraphrased: the forget texts behind other prompts, whose tokens do not count.
        original: the original model, for KL on ``heldout``; see ``kl_to_original``.
        retrained_auc: Min-40% AUC of a model that never saw the forget texts; without it PrivLeak is
            relative to 0.5.
        nonmembers: the texts of ``heldout`` in the forms that ``forget`` was taken in, for membership; see
            ``most_known``. None takes ``heldout``.

    Returns:
        {name in ``METRICS``: value}.
    """
    found = {
        "forget_ma": memory.memorization_accuracy(model, forget),
        "forget_extraction": memory.extraction_rate(model, forget),
        "forget_sampled": memory.sampled_extraction(model, forget),
        "forget_strength": memory.extraction_strength(model, forget),
        "forget_loss": language.mean_token_loss(model, forget),
    }
    if forget["attention_mask"].sum(1).min() > EL_N:
        found["forget_el"] = memory.extraction_likelihood(model, forget, EL_N)
    if paraphrased is not None:
        found["paraphrased_ma"] = memory.memorization_accuracy(model, paraphrased)
        found["paraphrased_extraction"] = memory.extraction_rate(model, paraphrased)
    if retain is not None:
        found["retain_loss"] = language.mean_token_loss(model, retain)
    if heldout is not None:
        found["heldout_perplexity"] = language.perplexity(model, heldout)
        compared = (forget, heldout if nonmembers is None else nonmembers)
        found["min_k_auc"] = membership.auc(*(membership.min_k_scores(model, batch) for batch in compared))
        found["loss_auc"] = membership.auc(*(-language.sample_losses(model, batch) for batch in compared))
        found["priv_leak"] = membership.privacy_leakage(
            found["min_k_auc"], 0.5 if retrained_auc is None else retrained_auc
        )
        if original is not None:
            found["heldout_kl"] = language.kl_to_original(model, original, heldout)
    return {name: found[name] for name in METRICS if name in found}


def summary_metrics(model: nn.Module, forget: Batch, retain: Batch) -> dict[str, float]:
    """Measure what a search changes, quickly: the forget texts' loss and MA, and the retain texts' loss."""
    return {
        "forget_loss": language.mean_token_loss(model, forget),
        "forget_ma": memory.memorization_accuracy(model, forget),
        "retain_loss": language.mean_token_loss(model, retain),
    }


def tofu_metrics(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[tofu.Question]],
    retrained_ratios: Tensor | None = None,
) -> tuple[dict[str, float], Tensor]:
    """Measure what is in ``METRICS`` on TOFU's questions.

    Args:
        model: the model as it is, mutes included.
        tokenizer: its tokenizer.
        sets: {"forget": [Question], and of ``tofu.UTILITY_SETS`` what there is}; the model utility needs all
            three.
        retrained_ratios: truth ratios, float64 [N], of a model trained without the forget set, for the
            forget quality.

    Returns:
        {name in ``METRICS``: value}, and the truth ratios of the forget set, float64 [N].
    """
    ratios = tofu.truth_ratios(model, tokenizer, sets["forget"])
    found = {
        "tofu_probability": tofu.probabilities(model, tokenizer, sets["forget"]).mean().item(),
        "tofu_rouge": tofu.rouge_recalls(model, tokenizer, sets["forget"]).mean().item(),
        "tofu_truth_ratio": ratios.mean().item(),
    }
    if retrained_ratios is not None:
        found["tofu_forget_quality"] = tofu.forget_quality(ratios, retrained_ratios)
    numbers = [
        number
        for name in tofu.UTILITY_SETS
        if name in sets
        for number in tofu.utility_numbers(model, tokenizer, sets[name], normalised=name != "retain")
    ]
    if len(numbers) == 3 * len(tofu.UTILITY_SETS):
        found["tofu_model_utility"] = tofu.model_utility(numbers)
    return {name: found[name] for name in METRICS if name in found}, ratios
