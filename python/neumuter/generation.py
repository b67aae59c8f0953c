"""Generation by settings of our own, so that figures do not depend on what a checkpoint prefers."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from neumuter.models.modes import without_dropout


@torch.no_grad()
def generate(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
    """Generate by ``options`` alone: greedily without any, and as if the model had no generation_config.

    transformers takes what a caller leaves open from the checkpoint's generation_config: a repetition
    penalty, suppressed tokens, stop strings. Its end tokens alone are facts of the model, and stay. The model
    runs without dropout.

    Args:
        input_ids, attention_mask: int64 [B, T] each, padded on the left.
        options: as of transformers' ``generate``.

    Returns:
        int64 [B, T + new tokens].
    """
    device = cast(torch.device, model.device)
    with _own_settings(model), without_dropout(model):
        ids: Tensor = cast(Any, model).generate(
            input_ids.to(device), attention_mask=attention_mask.to(device), **options
        )
    return ids


def find_end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Find the tokens that end what the model says: the checkpoint's and the tokenizer's, or None."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    return sorted(found) or None


def cut_at_end(ids: Sequence[int], ends: Collection[int] | None) -> list[int]:
    """Cut off what stands behind the first end token: it fills up a row that ended before others."""
    stops = (place + 1 for place, token in enumerate(ids) if token in (ends or ()))
    return list(ids[: next(stops, len(ids))])


@contextmanager
def _own_settings(model: nn.Module) -> Iterator[None]:
    """Context in which the model, and whatever it wraps, has a generation_config without preferences."""
    holders = [vars(module) for module in model.modules() if "generation_config" in vars(module)]
    former = [holder["generation_config"] for holder in holders]
    for holder, config in zip(holders, former, strict=True):
        holder["generation_config"] = GenerationConfig(eos_token_id=getattr(config, "eos_token_id", None))
    try:
        yield
    finally:
        for holder, config in zip(holders, former, strict=True):
            holder["generation_config"] = config
