"""Load a causal language model and its tokenizer from a folder, a GGUF file or the Hugging Face Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def refuse_missing_folder(model: str) -> None:
    """Raise FileNotFoundError if ``model`` is a path to nothing, before it is looked up on the Hub."""
    path = Path(model)
    if not path.exists() and (path.is_absolute() or model.startswith(".") or len(path.parts) > 2):
        raise FileNotFoundError(f"no such folder: {model}")


def load_model(
    model: str, dtype: str = "auto", gguf_file: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in evaluation mode, on the GPU where there is one, and its tokenizer.

    Code that comes with a checkpoint never runs.

    Args:
        model: a folder, or a name on the Hub.
        dtype: "auto" is the checkpoint's own; or "float32", "bfloat16", "float16".
        gguf_file: the name of a GGUF file in ``model`` to read the weights from; they are dequantised.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a damaged or hostile checkpoint.
    """
    refuse_missing_folder(model)
    transformers.utils.logging.disable_progress_bar()
    with _raise_one_line(model):
        where: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
        tokenizer = load_tokenizer(model, gguf_file)
        # Older versions always unpack the weights.
        if gguf_file and hasattr(transformers, "GgufConfig"):
            where["quantization_config"] = transformers.GgufConfig(dequantize=True)
        network: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, trust_remote_code=False, **where
        )
        # The weights are ordinary ones now.
        if gguf_file and getattr(network, "hf_quantizer", None) is not None:
            network.hf_quantizer.remove_quantization_config(network)
    return network.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def load_tokenizer(model: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, or of a name on the Hub."""
    where = {"gguf_file": gguf_file} if gguf_file else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False, **where)
    return cast(PreTrainedTokenizerBase, tokenizer)


def limit_length(model: Any, max_length: int) -> int:
    """Return the number of tokens that a text may have: ``max_length``, or all positions of the model."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return min(max_length, getattr(config, "max_position_embeddings", None) or max_length)


@contextmanager
def _raise_one_line(model: str) -> Iterator[None]:
    """What a damaged checkpoint makes safetensors or unpickling raise, as a ValueError of one line."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{model} cannot be loaded: {type(error).__name__}: {reason}") from error
