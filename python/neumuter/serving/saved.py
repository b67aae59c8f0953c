"""Muted models saved as checkpoints and read back."""

from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from neumuter.files import PathLike
from neumuter.models.modes import without_dropout
from neumuter.serving.adapters import random_tokens

# The largest difference of logits, as a share of the largest logit. The same weights give the same bits, but
# for some kernels of GPUs.
MAX_DIFFERENCE = 1e-3


@torch.no_grad()
def save_verified(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: PathLike) -> None:
    """Save a model with its tokenizer, load them again, and compare.

    Two models are never in memory: ``model`` loses its weights.

    Args:
        model: the model, in memory; mutes are folded into it.
        tokenizer: its tokenizer.
        folder: where to; existing files are overwritten.

    Raises:
        RuntimeError: what was loaded has other logits on 32 random tokens.
    """
    ids = random_tokens(model)
    with without_dropout(model):
        expected = cast(Any, model)(input_ids=ids).logits
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    cast(Any, model).to("meta")
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
    actual = loaded.to(ids.device).eval()(input_ids=ids).logits
    difference = (actual - expected).abs().max().item()
    if not difference <= MAX_DIFFERENCE * expected.abs().max().item():
        raise RuntimeError(
            f"the saved {type(model).__name__} does not compute what it did in memory: its logits are "
            f"{difference:.3g} away. Use neumuter.mute on the live model"
        )
