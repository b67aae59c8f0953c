"""Muted models saved as checkpoints and read back.

transformers 5 writes configurations that others misread: it moves rope_theta into rope_parameters. Programs
that look for it at the top level take 10000 instead, without a word. So configurations and tokenizers are
copied from where the model came from.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from neumuter.files import PathLike
from neumuter.models.adapted import find_source
from neumuter.models.modes import without_dropout
from neumuter.serving.adapters import random_tokens
from neumuter.serving.companions import copy_companions, find_companions, list_companions

# The largest difference of logits, as a share of the largest logit. The same weights give the same bits, but
# for some kernels of GPUs.
MAX_DIFFERENCE = 1e-3
# What loading writes into a configuration.
OF_LOADING = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures")


class Origin(NamedTuple):
    """Where a model came from.

    folder: has its files, of which ``files`` are to be copied. tokenizer: whether the tokenizer is there.
    """

    folder: Path
    files: list[Path]
    tokenizer: bool


def find_origin(model: str, gguf_file: str | None = None) -> Origin | None:
    """Find the files of a model, a folder or a name; a GGUF file has none.

    Raises:
        ValueError: a file that is to be copied is a link out of the folder.
    """
    if gguf_file:
        return None
    source = find_source(model)
    folder = find_companions(source)
    return Origin(folder, list_companions(folder), tokenizer=source.adapter is None)


@torch.no_grad()
def save_verified(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: PathLike,
    origin: Origin | None = None,
) -> None:
    """Save a model with its tokenizer, load them again, and compare.

    Two models are never in memory: ``model`` loses its weights.

    Args:
        model: the model, in memory; mutes are folded into it.
        tokenizer: its tokenizer.
        folder: where to; existing files are overwritten.
        origin: where the model came from: its files are copied, and its configuration, in which only what
            has changed since it was loaded is another.

    Raises:
        RuntimeError: what was loaded has other logits on 32 random tokens.
    """
    ids, folder = random_tokens(model), Path(folder)
    with without_dropout(model):
        expected = cast(Any, model)(input_ids=ids).logits
    model.save_pretrained(folder)
    if origin is None:
        _add_old_names(folder / CONFIG_NAME)
    else:
        (folder / GENERATION_CONFIG_NAME).unlink(missing_ok=True)
        copy_companions(origin.files, origin.folder, folder)
        _update_config(origin.folder, model, folder)
    if origin is None or not origin.tokenizer:
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


def _update_config(origin: Path, model: PreTrainedModel, folder: Path) -> None:
    """Write into the copied configuration what has changed in ``model`` since it was loaded, if anything."""
    before = AutoConfig.from_pretrained(origin, trust_remote_code=False).to_dict()
    stored = json.loads((origin / CONFIG_NAME).read_text(encoding="utf-8"))
    if _update(stored, before, model.config.to_dict()):
        (folder / CONFIG_NAME).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


def _update(stored: dict[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Change in ``stored`` what differs between ``before`` and ``after``; returns whether anything does."""
    changed = False
    for key, value in after.items():
        if key in OF_LOADING or before.get(key) == value:
            continue
        inner, old = stored.get(key), before.get(key)
        if isinstance(inner, dict) and isinstance(old, dict) and isinstance(value, dict):
            changed |= _update(inner, old, value)
        else:
            stored[key], changed = value, True
    return changed


def _add_old_names(file: Path) -> None:
    """Write the base of rotary positions where transformers 4 had it as well."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if theta := (config.get("rope_parameters") or {}).get("rope_theta"):
        file.write_text(json.dumps(config | {"rope_theta": theta}, indent=2) + "\n", encoding="utf-8")
