"""Types that many modules share."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# The label of a token that does not count: padding, a prompt.
IGNORED = -100

# A conversation: {"role", "content"} of each message, of which the last, an answer, counts.
Messages = list[dict[str, str]]

# A whole text; or a prompt and its completion, of which only the completion counts; or a conversation.
Text = str | tuple[str, str] | Messages

# "input_ids", "attention_mask" and "labels", int64 [B, T] each, padded on the right. The mask is 1 on real
# tokens; a label is the token's id, or IGNORED. The logits at position t predict the label at t + 1.
Batch = dict[str, Tensor]

# Called as (step, total, info) after every step.
Callback = Callable[[int, int, dict[str, Any]], object]

# What a batch has.
KEYS = ("input_ids", "attention_mask", "labels")


def check_kind(name: str, value: object, kinds: type | tuple[type, ...], allowed: str) -> None:
    """Raise TypeError that says what is allowed unless the argument ``name`` is of these kinds."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {allowed}, got {type(value).__name__}")


def check_texts(name: str, value: object) -> None:
    """Raise TypeError unless ``value``, the argument ``name``, can be several texts."""
    check_kind(name, value, Iterable, "a list of texts")
    # A string is iterable as well: each of its characters would be taken for a text.
    if isinstance(value, str | Mapping):
        raise TypeError(
            f"{name} must be a list of texts, got one {type(value).__name__}: put it into a list, or read it "
            "with neumuter.texts.read_texts if it is the name of a file"
        )


def check_batch(name: str, value: object) -> None:
    """Raise TypeError unless ``value``, the argument ``name``, is a batch."""
    found = value if isinstance(value, Mapping) else {}
    if missing := [key for key in KEYS if not isinstance(found.get(key), Tensor)]:
        lacking = f", which lacks {', '.join(missing)}" if found else ""
        raise TypeError(
            f"{name} must be a batch of {', '.join(KEYS)}, as neumuter.texts.encode makes it of texts, got "
            f"{type(value).__name__}{lacking}"
        )


def check_rows(name: str, batch: Batch) -> None:
    """Raise TypeError or ValueError unless ``batch``, the argument ``name``, has rows as ``Batch`` says."""
    if not isinstance(batch, Mapping):
        check_batch(name, batch)
    shape = batch["labels"].shape if isinstance(batch.get("labels"), Tensor) else None
    for key in KEYS:
        value = batch.get(key)
        if (
            not isinstance(value, Tensor)
            or value.dim() != 2
            or value.shape != shape
            or value.dtype != torch.int64
        ):
            given = type(value).__name__
            if isinstance(value, Tensor):
                given = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            raise ValueError(
                f"{name}[{key!r}] must be an int64 tensor [B, T], one shape for all of {', '.join(KEYS)}; "
                f"got {given}"
            )
    if not (batch["labels"][:, 1:] != IGNORED).any(1).all() or not len(batch["labels"]):
        raise ValueError(
            f"every sample of {name} must count a token (a label other than -100) after its first one"
        )
    if (batch["attention_mask"].diff(dim=1) > 0).any():
        raise ValueError(f"{name} must be padded on the right, so attention_mask must never rise in a row")
    if ((batch["labels"] != IGNORED) & (batch["attention_mask"] == 0)).any():
        raise ValueError(f"{name} counts padding: labels must be -100 where attention_mask is 0")


def check_model(model: object) -> None:
    """Raise TypeError unless ``model`` is a model."""
    check_kind("model", model, nn.Module, "a model of transformers, not its name; of a handle, handle.model")
