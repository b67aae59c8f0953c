"""Teacher-forced forward passes, a few samples at a time."""

import torch

from neumuter.losses import IGNORED

ROWS = 16  # samples a forward pass


def parts(model, batch, rows=ROWS):
    """The batch in parts of ``rows`` samples, on the model's device."""
    for start in range(0, len(batch["input_ids"]), rows):
        yield {key: value[start : start + rows].to(model.device) for key, value in batch.items()}


@torch.no_grad()
def predictions(model, part):
    """Logits [B, T, V] of a part."""
    return model(input_ids=part["input_ids"], attention_mask=part["attention_mask"], use_cache=False).logits


def hits(model, batch, rows=ROWS):
    """Two bool tensors [B, T − 1] on the CPU: which tokens count, and which of them are the most likely."""
    found = []
    for part in parts(model, batch, rows):
        counted = part["labels"][:, 1:] != IGNORED
        best = predictions(model, part)[:, :-1].argmax(-1)
        found.append((counted.cpu(), (counted & (best == part["labels"][:, 1:])).cpu()))
    counted, right = zip(*found, strict=True)
    return torch.cat(counted), torch.cat(right)
