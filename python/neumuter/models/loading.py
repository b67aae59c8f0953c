"""Load a causal language model and its tokenizer from a folder, a GGUF file or the Hugging Face Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from neumuter.models.adapted import Source, find_folder, find_source, put_adapter
from neumuter.models.layouts import make_distributed_config
from neumuter.models.quantised import make_quantisation


def load_model(
    model: str,
    dtype: str = "auto",
    gguf_file: str | None = None,
    device: str | None = None,
    device_map: str | None = None,
    quantize: str | None = None,
    attention: str | None = None,
    merge: bool = False,
    layout: str = "ddp",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in evaluation mode, and its tokenizer.

    Code that comes with a checkpoint never runs.

    Args:
        model: a folder, or a name on the Hub. That of a PEFT adapter stands for its base, which
            adapter_config.json names, with the adapter on it.
        dtype: "auto" is the checkpoint's own; or "float32", "bfloat16", "float16".
        gguf_file: the name of a GGUF file in ``model`` to read the weights from; they are dequantised.
        device: such as "cuda:1"; None takes the GPU where there is one.
        device_map: how accelerate spreads the model over devices, such as "auto", instead of ``device``.
        quantize: "4bit" or "8bit" quantises the weights with bitsandbytes.
        attention: transformers' attn_implementation, such as "eager" or "sdpa".
        merge: merge an adapter into the weights, so that an ordinary model comes out.
        layout: in a process group, "ddp" loads a copy in each process; the others split the model over
            the processes; see ``neumuter.models.layouts``.

    Raises:
        FileNotFoundError: there is no such folder, or an adapter's base is not there.
        ImportError: an adapter, without the package peft.
        ValueError: a damaged or hostile checkpoint; a device that is not there; an adapter of a kind that
            cannot be merged, one that does not fit its base, or one whose base would be a GGUF file; or a
            layout that does not fit the model.
    """
    if Path(model).is_file():
        raise ValueError(
            f"{model} is a file: give the folder of a model, or its name on the Hub; gguf_file names a file "
            "in a folder"
        )
    source = find_source(model)
    if gguf_file and source.adapter:
        raise ValueError(f"gguf_file cannot be combined with an adapter, which {model} is")
    if layout != "ddp" and gguf_file:
        raise ValueError(f"the layout {layout!r} cannot split a GGUF file, {gguf_file}: save the model first")
    if layout != "ddp" and source.adapter:
        raise ValueError(f"the layout {layout!r} cannot split an adapter, which {model} is: merge it first")
    where = _places(source)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(place)
    transformers.utils.logging.disable_progress_bar()
    with raising_one_line(model):
        tokenizer = _load_tokenizer(source, {"gguf_file": gguf_file} if gguf_file else {})
        if gguf_file:
            where["gguf_file"] = gguf_file
            # Older versions always unpack the weights.
            if hasattr(transformers, "GgufConfig"):
                where["quantization_config"] = transformers.GgufConfig(dequantize=True)
        if quantize:
            where["quantization_config"] = make_quantisation(quantize)
        if quantize or device_map:
            where["device_map"] = device_map or place
        if layout != "ddp":
            empty = _make_empty(source)
            where["distributed_config"] = make_distributed_config(layout, dist.get_world_size(), empty)
        if attention:
            where["attn_implementation"] = attention
        network: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source.base, dtype=dtype, trust_remote_code=False, **where
        )
        # The weights are ordinary ones now.
        if gguf_file and getattr(network, "hf_quantizer", None) is not None:
            network.hf_quantizer.remove_quantization_config(network)
        if layout == "ddp" and "device_map" not in where:
            network.to(place)
        if source.adapter:
            network = put_adapter(network, find_folder(source.adapter), merge)
    return network.eval(), tokenizer


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, or of a name on the Hub; an adapter may have that of its base."""
    return _load_tokenizer(find_source(model), {})


def _places(source: Source) -> dict[str, Any]:
    """What from_pretrained takes to load the base."""
    revision = {"revision": source.revision} if source.revision else {}
    return {"local_files_only": source.cached, **revision}


def _make_empty(source: Source) -> Any:
    """The base on the meta device."""
    config = transformers.AutoConfig.from_pretrained(source.base, trust_remote_code=False, **_places(source))
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _load_tokenizer(source: Source, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    model, where = source.base, _places(source)
    if source.adapter and ((folder := find_folder(source.adapter)) / "tokenizer_config.json").is_file():
        model, where = str(folder), {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False, **where, **options)
    return cast(PreTrainedTokenizerBase, tokenizer)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"device {device!r} cannot be used: {reason}") from None


def limit_length(model: Any, max_length: int) -> int:
    """Return the number of tokens that a text may have: ``max_length``, or all positions of the model."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return min(max_length, getattr(config, "max_position_embeddings", None) or max_length)


@contextmanager
def raising_one_line(model: str) -> Iterator[None]:
    """Context: what a damaged checkpoint makes other libraries raise is a ValueError of one line."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{model} cannot be loaded: {type(error).__name__}: {reason}") from error
