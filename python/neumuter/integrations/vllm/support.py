"""Which versions and features of vLLM the plug-in serves; a server of others does not start."""

import re
from typing import Any

# From the first that was tested up to the first that was not: the plug-in uses names that vLLM may change.
FIRST, BEYOND = (0, 32), (0, 33)


def refuse_version(version: str) -> None:
    """Raise RuntimeError for a version of vLLM that was not tested."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found or not FIRST <= (int(found[1]), int(found[2])) < BEYOND:
        first, beyond = (".".join(map(str, v)) for v in (FIRST, BEYOND))
        raise RuntimeError(
            f"mute sets are served by vLLM {first} up to, not including, {beyond}, and this is {version}: "
            "install another version, or unset NEUMUTER_VLLM_SETS and serve folded checkpoints"
        )


def refuse_features(config: Any) -> None:
    """Raise ValueError, naming it, for a feature in a ``VllmConfig`` that muting was not written for."""
    parallel, model = config.parallel_config, config.model_config
    features = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "dual batch overlap (microbatches)": parallel.enable_dbo or parallel.num_ubatches > 1,
        "speculative decoding": config.speculative_config is not None,
        "--kv-sharing-fast-prefill": config.cache_config.kv_sharing_fast_prefill,
        "a KV connector, whose caches may not tell mute sets apart": config.kv_transfer_config is not None,
        "an encoder": model.is_encoder_decoder,
        "multimodal models": model.is_multimodal_model,
        "pooling models": model.runner_type != "generate",
    }
    if found := [name for name, is_on in features.items() if is_on]:
        raise ValueError(
            f"mute sets cannot be served with {', '.join(found)}: switch it off, or fold the mutes"
        )
