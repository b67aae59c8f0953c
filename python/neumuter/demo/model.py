"""The model of the demo: trained from scratch in half a minute, then kept under a hash of all inputs."""

import hashlib
import inspect
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from neumuter.demo import task
from neumuter.files import write_atomically
from neumuter.models.families import find_ffns
from neumuter.types import Batch, Callback


@dataclass(frozen=True)
class Training:
    """How the model is trained. ``activation_penalty`` (L1) keeps memories in few neurons each."""

    steps: int = 250
    batch_size: int = 24
    records_per_batch: int = 16
    lr: float = 5e-3
    lr_warmup: int = 20
    activation_penalty: float = 5.0
    penalty_warmup: int = 100


def architecture() -> LlamaConfig:
    """Two Llama layers, hidden size 64, 2,048 neurons each: 0.9 M parameters."""
    return LlamaConfig(
        vocab_size=task.VOCABULARY,
        hidden_size=64,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def build(state: dict[str, Tensor], config: LlamaConfig | None = None) -> PreTrainedModel:
    """A fresh model with the weights ``state``, in evaluation mode; ``config``: as in ``train``."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config or architecture())
    model.load_state_dict(state)
    model.eval()
    return model


def cache_folder() -> Path:
    """``$NEUMUTER_CACHE``, else ``$XDG_CACHE_HOME/neumuter``, else ``~/.cache/neumuter``."""
    if folder := os.environ.get("NEUMUTER_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neumuter"


def content_hash(text: Tensor, records: Batch, training: Training, seed: int, config: LlamaConfig) -> str:
    """A digest of everything that the trained weights depend on."""
    digest = hashlib.sha256()
    about = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "architecture": config.to_dict(),
        "training": asdict(training),
        "seed": seed,
        "code": inspect.getsource(train),
    }
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    for tensor in (text, records["input_ids"], records["labels"]):
        digest.update(str(list(tensor.shape)).encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:32]


def load_or_train(
    text: Tensor,
    records: Batch,
    training: Training,
    seed: int,
    fresh: bool = False,
    callback: Callback | None = None,
    config: LlamaConfig | None = None,
) -> dict[str, Tensor]:
    """Return the weights of ``train(...)``, from the cache if they are there and ``fresh`` is false."""
    config = config or architecture()
    path = cache_folder() / f"demo-{content_hash(text, records, training, seed, config)}.safetensors"
    if path.exists() and not fresh:
        try:
            state = load_file(path)
            build(state, config)
            return state
        except (SafetensorError, RuntimeError, OSError):
            pass  # not a file of ours: train again and replace it
    state = train(text, records, training, seed, callback, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(state))
    return state


def train(
    text: Tensor,
    records: Batch,
    training: Training,
    seed: int,
    callback: Callback | None = None,
    config: LlamaConfig | None = None,
) -> dict[str, Tensor]:
    """Train on windows of ``text`` [N, WINDOW] mixed with a batch of ``records``; returns a state dict.

    ``callback(step, total, {"loss": ...})`` after every step. The same inputs give the same weights
    on the same machine. ``config``: of the model, by default ``architecture()``.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config or architecture())
    order = torch.Generator().manual_seed(seed)
    activations = []
    for ffn in find_ffns(model):
        ffn.down.register_forward_pre_hook(lambda module, args: activations.append(args[0].abs().mean()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, weight_decay=0.01)

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / training.lr_warmup)
        return warm * (0.05 + 0.95 * (1 - step / training.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    text_queue, record_queue = _shuffled(len(text), order), _shuffled(len(records["input_ids"]), order)
    width = records["input_ids"].shape[1]
    if width > text.shape[1]:
        raise ValueError(f"records must fit a window of {text.shape[1]} tokens, got {width}")
    for step in range(training.steps):
        rows = text[[next(text_queue) for _ in range(training.batch_size - training.records_per_batch)]]
        chosen = [next(record_queue) for _ in range(training.records_per_batch)]
        ids = torch.zeros(training.batch_size, text.shape[1], dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        ids[: len(rows)] = labels[: len(rows)] = rows
        ids[len(rows) :, :width] = records["input_ids"][chosen]
        labels[len(rows) :, :width] = records["labels"][chosen]
        activations.clear()
        # Padding on the right is harmless in a causal model.
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        penalty = training.activation_penalty * min(1.0, (step + 1) / training.penalty_warmup)
        optimizer.zero_grad()
        (loss + penalty * sum(activations)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if callback:
            callback(step + 1, training.steps, {"loss": loss.item()})
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _shuffled(count: int, generator: torch.Generator) -> Iterator[int]:
    """Endless indices below ``count``, in a new order every time round."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
