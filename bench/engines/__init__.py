"""vLLM with mute sets: tokens per second beside the same engine without them, with LoRA, and folded.

``make bench-vllm``, or ``python -m bench.engines VLLM_PYTHON``. Each way is a process of its own, and all of
them wait at once: in each round one after the other serves the same requests, so that whatever slows the
machine meets all of them.
"""
