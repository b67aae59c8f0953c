"""What a model says: greedy continuations of the beginnings of texts."""

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neumuter.evaluation.passes import PROMPT_SHARE
from neumuter.generation import find_end_tokens, generate
from neumuter.types import IGNORED, Batch, check_batch

MAX_TOKENS = 64


def continue_texts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch: Batch, limit: int
) -> list[dict[str, str]]:
    """Decode greedily from the prompts of the first ``limit`` texts of a batch.

    A text's prompt ends where its counted tokens begin; of a text that counts from its start on, the first
    third is the prompt.

    Returns:
        For each text {"prompt", "truth", "said"}: its beginning, how it goes on, and what the model says
        instead, at most ``MAX_TOKENS`` tokens.
    """
    check_batch("batch", batch)
    found = []
    for ids, shown, labels in zip(
        *(batch[name][:limit].cpu() for name in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        ids, labels = ids[shown.bool()], labels[shown.bool()]
        counted = (labels != IGNORED).nonzero().flatten().tolist()
        start, end = counted[0], counted[-1] + 1
        if all(token in tokenizer.all_special_ids for token in ids[:start].tolist()):
            start = max(1, int(len(ids) * PROMPT_SHARE))
        prompt = ids[None, :start]
        made = generate(
            model,
            prompt,
            torch.ones_like(prompt),
            max_new_tokens=min(end - start, MAX_TOKENS),
            eos_token_id=find_end_tokens(model, tokenizer),
            pad_token_id=tokenizer.pad_token_id or 0,
        )
        parts = {"prompt": ids[:start], "truth": ids[start:end], "said": made[0, start:]}
        found.append(
            {name: str(tokenizer.decode(part, skip_special_tokens=True)) for name, part in parts.items()}
        )
    return found
