"""How the weights of a model are quantised, by its config, and what several processes cannot do with them."""

from typing import Any

from transformers import BitsAndBytesConfig

# Formats that transformers turns into plain weights while it loads them, where nothing can compute with them.
UNPACKED = ("mxfp4", "fp8")


def make_quantisation(quantize: str) -> BitsAndBytesConfig:
    """Make what transformers' from_pretrained takes to quantise weights to "4bit" or "8bit"."""
    return BitsAndBytesConfig(**{f"load_in_{quantize}": True})


def find_quantisation(config: Any) -> dict[str, Any]:
    """Describe how the weights of a model with this config are quantised; empty if they may load as plain."""
    found = _describe(config)
    return {} if found.get("dequantize") or found.get("quant_method") in UNPACKED else found


def is_quantised(config: Any) -> bool:
    """Whether a model with this config was saved with quantised weights, which are never split."""
    return bool(_describe(config))


def refuse_quantised(config: Any, split: bool) -> None:
    """Raise ValueError, which names the library, if several processes cannot have a model with this config.

    split: whether they share one model, or have a copy each.
    """
    # Formats that are unpacked are no exception: transformers 5.24 unpacks a part of an FP8 weight with the
    # scales of other blocks, and says nothing.
    if split and (given := _describe(config)):
        raise ValueError(
            f"the weights are quantised by {given.get('quant_method')}, and are not split over processes: "
            "give each process a copy, or split a model that was saved with plain weights"
        )
    found = find_quantisation(config)
    if found.get("load_in_8bit") and found.get("llm_int8_threshold", 0.0) > 0:
        raise ValueError(
            "bitsandbytes at 8 bits computes samples that run together otherwise than alone, because an "
            "outlier of one changes how all are rounded: the result would depend on the number of processes. "
            "Use one process, 4 bits, int8 weights of torchao, or llm_int8_threshold=0.0"
        )


def _describe(config: Any) -> dict[str, Any]:
    given = getattr(config, "quantization_config", None) or {}
    found: dict[str, Any] = given if isinstance(given, dict) else given.to_dict()
    return found
