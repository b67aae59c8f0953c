"""What README.md and the reference pages assume: a model and files, for tests/repo/test_docs.py."""

import json
from pathlib import Path

import torch

import neumuter
from neumuter.texts import encode, read_texts
from tests.gguf_files import write_gguf
from tests.models import build, tokenizer

TEXTS = {
    "alice": [("Ada Brisk,", " ada@post.example"), ("Ada Brisk, call", " 555-0192")],
    "bob": [("Jonas Vance,", " jv77@mail.example")],
    "others": [("The kettle", " is on the shelf."), ("A lantern", " costs 12.40 in the shop.")],
}
PROMPTS = ["Ada Brisk,", "The kettle", "Mia Santos"]  # of one length, for a batch


def stage():
    """Train a small model that knows some texts by heart; return it and its tokenizer.

    Writes into the current folder: ``MODEL``, its checkpoint, and ``model.Q8_0.gguf``; ``alice.jsonl``,
    ``bob.jsonl`` and ``others.jsonl``, texts; ``alice.safetensors``, ``bob.safetensors``,
    ``mutes.safetensors`` and ``FILE``, mute files.
    """
    torch.manual_seed(0)
    for name, texts in TEXTS.items():
        rows = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in texts]
        with open(f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.write("\n".join(rows))
    model, words = build("llama"), tokenizer()
    known = encode([text for name in TEXTS for text in read_texts(f"{name}.jsonl")], words, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        model(**known).loss.backward()
        optimizer.step()
    model.save_pretrained("MODEL")
    words.save_pretrained("MODEL")
    write_gguf(Path("model.Q8_0.gguf"), "llama", model, up="Q8_0")
    with neumuter.attach(model, start_layer=0) as masked:
        for first, name in enumerate(("alice.safetensors", "bob.safetensors", "mutes.safetensors", "FILE")):
            neurons = {path: (range(first, first + 4), torch.zeros(4)) for path in masked.scores}
            masked.mute_set(neurons).save(name)
    return model, words


def batch(words):
    """Encode three prompts of one length as a batch."""
    return words(PROMPTS, return_tensors="pt")
