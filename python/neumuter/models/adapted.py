"""The folder of a PEFT adapter as a model: its base, with the adapter on it."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import huggingface_hub
import torch
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from neumuter.models.hub import find_model

# Adapters that change linear maps of the base, so that they can be merged into its weights.
KINDS = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA")
# What makes LoRA depend on the tokens.
BY_TOKEN = ("alora_invocation_tokens", "arrow_config")
# The files of an adapter on the Hub; its tokenizer among them.
FILES = ["adapter_*", "*token*", "vocab*", "merges.txt", "*.model", "*.jinja"]


class Source(NamedTuple):
    """What a model is loaded from.

    Attributes:
        base: a folder, or a name on the Hub.
        cached: it must come from the Hub's cache.
        revision: of ``base`` on the Hub; None for the newest.
        adapter: the adapter on it, a folder or a name; None for an ordinary model.
    """

    base: str
    cached: bool
    revision: str | None = None
    adapter: str | None = None


def find_source(model: str) -> Source:
    """Find out at once whether ``model`` is a checkpoint or an adapter, and what it needs.

    Raises:
        FileNotFoundError: there is no such model, or an adapter's base is not there.
        ImportError: it is an adapter, and the package peft is not installed.
        ValueError: an adapter of a kind that cannot be a part of the weights, or a damaged configuration.
    """
    cached = find_model(model)
    file = None if Path(model).is_file() else find_adapter_config_file(model, local_files_only=cached)
    if file is None:
        return Source(model, cached)
    try:
        config = json.loads(Path(file).read_bytes())
        kind, base, revision = (
            config.get(key) for key in ("peft_type", "base_model_name_or_path", "revision")
        )
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not the configuration of an adapter: {error}") from None
    if kind not in KINDS or any(config.get(key) for key in BY_TOKEN):
        reason = next((f" with {key}" for key in BY_TOKEN if config.get(key)), "")
        raise ValueError(
            f"{model} is an adapter of the kind {kind!r:.80}{reason}, which is no part of the weights; "
            f"allowed are {', '.join(KINDS)}"
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"{model} is an adapter for the task {config['task_type']!r:.80}; allowed is CAUSAL_LM alone"
        )
    if find_spec("peft") is None:
        raise ImportError(f"{model} is an adapter, which needs the package peft: pip install peft")
    named = f"the base of the adapter {model}, base_model_name_or_path in its adapter_config.json"
    if type(base) is not str or not base or type(revision) not in (str, type(None)):
        raise ValueError(f"{named}, must be the folder or the name of a model, got {base!r:.80}")
    try:
        own = find_model(base)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{named}, is not there: {error}") from None
    if Path(base).is_file() or find_adapter_config_file(base, revision=revision, local_files_only=own):
        raise ValueError(f"{named}, must be a checkpoint, but {base} is a file or an adapter itself")
    return Source(base, own, revision, model)


def find_folder(adapter: str) -> Path:
    """Find the folder of an adapter; one on the Hub is downloaded, or comes from the cache."""
    if Path(adapter).exists():
        return Path(adapter)
    cached = find_model(adapter)
    return Path(huggingface_hub.snapshot_download(adapter, allow_patterns=FILES, local_files_only=cached))


def put_adapter(network: PreTrainedModel, folder: Path, merge: bool) -> PreTrainedModel:
    """Put the adapter in ``folder`` on its base, or merge it into the base's weights, in place.

    The embeddings of the base grow, or shrink, to those that the adapter brings.

    Raises:
        ValueError: the adapter does not fit the base: something of it is missing there, or here.
    """
    import peft

    config = peft.PeftConfig.from_pretrained(folder)
    # Training needs no gradients of it.
    config.inference_mode = True
    _resize_embeddings(network, peft.load_peft_weights(folder, device="cpu"))
    # PEFT draws first values, which it then overwrites.
    with torch.random.fork_rng(devices=[]):
        adapted = peft.get_peft_model(network, config)
        mapping = getattr(network, "_checkpoint_conversion_mapping", {})
        result = adapted.load_adapter(folder, "default", key_mapping=mapping)
    # Of modules that are trained whole, PEFT may write a second copy under a name that it does not read.
    unread = [key for key in result.unexpected_keys if ".modules_to_save." not in key]
    if wrong := [*result.missing_keys, *unread]:
        raise ValueError(
            f"the adapter {folder} does not fit its base {network.name_or_path}: only one of them has "
            f"{', '.join(wrong[:4])}{' and more' if len(wrong) > 4 else ''}"
        )
    if merge:
        return cast(PreTrainedModel, adapted.merge_and_unload(safe_merge=True))
    return cast(PreTrainedModel, adapted.get_base_model())


def _resize_embeddings(network: PreTrainedModel, weights: dict[str, Any]) -> None:
    embeddings: Any = network.get_input_embeddings()
    head: Any = network.get_output_embeddings()
    paths = {module: f"base_model.model.{path}" for path, module in network.named_modules()}
    names = (f"{paths[embeddings]}.{key}" for key in ("weight", "base_layer.weight"))
    rows = next((len(weights[name]) for name in names if name in weights), len(embeddings.weight))
    if rows == len(embeddings.weight):
        return
    if head.weight is not embeddings.weight and f"{paths[head]}.weight" not in weights:
        raise ValueError(
            f"the adapter has embeddings of {rows} tokens and no output layer of them; its base "
            f"{network.name_or_path} has {len(embeddings.weight)} tokens. Save the adapter with its output "
            "layer"
        )
    network.resize_token_embeddings(rows, mean_resizing=False)
