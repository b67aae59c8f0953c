"""The demo's model and records as files, for the examples of the documentation."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging

from neumuter.demo import task
from neumuter.demo.model import Training, build, load_or_train
from neumuter.files import new_folder

SEED = 0
# Customers who ask to be forgotten; each has a file.
ASKING = 2
HELDOUT_TEXTS = 64


def write_tutorial(folder: str | os.PathLike[str], callback: Callable[..., None] | None = None) -> list[str]:
    """Write what the documentation's examples work on into ``folder``, which must not exist or be empty.

    ``small-model``: a Hugging Face checkpoint of the demo's model, which knows 48 made-up records by heart;
    it is trained if it is not in the cache (``callback(step, total, {"loss": ...})`` after every step).
    ``forget.jsonl``: 12 customers, a "prompt" and a "completion" each; ``retain.jsonl``: the other 36.
    ``mara.jsonl``, ``tanja.jsonl``: one of the customers each, with a line per secret, whose "prompt" is the
    text before it; ``others.jsonl``: the other 46 records, alike. ``heldout.jsonl``: ordinary texts that the
    model never saw, under "text". Returns the names of these.

    Raises FileExistsError if something is in the folder, ValueError if it is a link or the current folder,
    and OSError if it cannot be written.
    """
    with new_folder(folder) as made:
        records, (texts, heldout) = task.make_records(SEED), task.read_corpus()
        tokenizer = task.train_tokenizer(texts)
        batch = task.encode(tokenizer, records.forget + records.retain)
        state = load_or_train(task.windows(tokenizer, texts), batch, Training(), SEED, callback=callback)
        logging.disable_progress_bar()
        build(state).save_pretrained(made / "small-model")
        tokenizer.save_pretrained(made / "small-model")
        for name, kind in (("forget", records.forget), ("retain", records.retain)):
            _write(made / f"{name}.jsonl", [{"prompt": r.prompt, "completion": r.continuation} for r in kind])
        asking, others = records.forget[:ASKING], records.forget[ASKING:] + records.retain
        for record in asking:
            first_name = record.prompt.split()[1].lower()
            _write(made / f"{first_name}.jsonl", _questions(record))
        _write(made / "others.jsonl", [row for record in others for row in _questions(record)])
        _write(made / "heldout.jsonl", [{"text": text} for text in heldout[:HELDOUT_TEXTS]])
        return sorted(path.name for path in made.iterdir())


def _questions(record: task.Record) -> list[dict[str, str]]:
    """The space before a secret belongs to its first token."""
    starts = [record.text[:start].rstrip(" ") for start, _ in record.secret_spans()]
    ends = [record.text[:end] for _, end in record.secret_spans()]
    return [{"prompt": a, "completion": b[len(a) :]} for a, b in zip(starts, ends, strict=True)]


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
