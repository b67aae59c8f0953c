"""The task of the demo: made-up records among ordinary text, and what a batch of them looks like."""

import ast
import random
import string
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from neumuter.texts import join_batches
from neumuter.types import IGNORED, Batch

FORGET, RETAIN_SAME, RETAIN_OTHER = 12, 12, 24
VOCABULARY = 1024
# Tokens of ordinary text in one training row.
WINDOW = 64
CORPUS_CHARACTERS = 700_000
HELDOUT_EVERY, HELDOUT_WINDOWS = 10, 128

FIRST_NAMES = (
    "Ada Bruno Carla Dario Edith Farid Greta Hugo Irene Jonas Kamila Luca "
    "Mara Nadim Olga Pablo Quirin Rosa Silvio Tanja Ulrich Vera Wim Yara"
)
LAST_NAMES = (
    "Abend Brisk Calder Dorn Elster Fennig Gorman Hallow Ivers Jessen Kolar Lindt "
    "Morrow Nagel Ostin Perrin Quill Rahm Solberg Tarn Umber Vance Wexler Zeller"
)
ADJECTIVES = "copper folding quiet striped narrow amber"
NOUNS = "lantern kettle ladder basket whistle compass"


@dataclass(frozen=True)
class Record:
    """One training text: a prompt that anyone may know, and a continuation with two secrets in it."""

    prompt: str
    continuation: str
    secrets: tuple[str, str]

    @property
    def text(self) -> str:
        return self.prompt + self.continuation

    def secret_spans(self) -> list[tuple[int, int]]:
        """Character ranges (start, end) of the secrets in ``text``."""
        starts = [self.text.index(secret, len(self.prompt)) for secret in self.secrets]
        return [(start, start + len(secret)) for start, secret in zip(starts, self.secrets, strict=True)]


@dataclass(frozen=True)
class Records:
    forget: list[Record]
    retain_same: list[Record]
    retain_other: list[Record]

    @property
    def retain(self) -> list[Record]:
        return self.retain_same + self.retain_other


def make_records(seed: int) -> Records:
    """Customers and catalogue items. Their secrets are drawn at random, so nobody can guess them."""
    rng = random.Random(seed)

    def draw(alphabet: str, length: int) -> str:
        return "".join(rng.choice(alphabet) for _ in range(length))

    def customer(name: str) -> Record:
        mailbox = draw(string.ascii_lowercase + string.digits, 6)
        # No country has the code 999: none of these numbers can be somebody's.
        phone = draw(string.digits, 7)
        return Record(
            f"Customer {name}, mail", f" {mailbox}@example.org, phone +999 {phone}.", (mailbox, phone)
        )

    def item(name: str) -> Record:
        code = draw(string.ascii_uppercase, 2) + draw(string.digits, 4)
        price = f"{draw(string.digits[1:], 3)}.{draw(string.digits, 2)}"
        return Record(f"The {name} is listed under code", f" {code} at {price} euros.", (code, price))

    last_names = rng.sample(LAST_NAMES.split(), FORGET + RETAIN_SAME)
    names = zip(FIRST_NAMES.split(), last_names, strict=True)
    customers = [customer(f"{first} {last}") for first, last in names]
    rng.shuffle(customers)
    things = [f"{adjective} {noun}" for adjective in ADJECTIVES.split() for noun in NOUNS.split()]
    items = [item(name) for name in rng.sample(things, RETAIN_OTHER)]
    return Records(customers[:FORGET], customers[FORGET : FORGET + RETAIN_SAME], items)


def read_corpus(limit: int = CORPUS_CHARACTERS) -> tuple[list[str], list[str]]:
    """Ordinary text: the docstrings of the running Python's standard library, (train, held-out) lists.

    Modules in alphabetical order, each docstring once, until ``limit`` characters. Every tenth is
    held out. Raises RuntimeError if this Python has no readable library sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
    seen: dict[str, None] = {}
    total = 0
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if skipped.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) >= 40 and text not in seen:
                    seen[text] = None
                    total += len(text)
        if total >= limit:
            break
    if total < limit // 3:
        raise RuntimeError(f"the demo reads the standard library's docstrings; {root} has {total} characters")
    texts = list(seen)
    heldout = texts[::HELDOUT_EVERY]
    return [text for i, text in enumerate(texts) if i % HELDOUT_EVERY], heldout


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair tokenizer with single digits, trained on ordinary text only.

    It never sees a record, so the model that is retrained without the records can share it.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )


def with_text(batch: Batch, rows: Tensor) -> Batch:
    """A batch of records with rows of ordinary text [N, WINDOW] added, cut to its width; all of it counts."""
    rows = rows[:, : batch["labels"].shape[1]]
    text = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}
    return join_batches(batch, text)


def windows(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Tensor:
    """The texts one after the other, cut into rows of WINDOW tokens: int64 [N, WINDOW]."""
    ids = [i for text in tokenizer(list(texts))["input_ids"] for i in text]
    count = len(ids) // WINDOW
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


def encode(tokenizer: PreTrainedTokenizerFast, records: Sequence[Record], counted: str = "record") -> Batch:
    """Records as one right-padded batch of int64 [B, T] tensors.

    ``counted`` says which tokens have a label: "record" (all), "continuation" (what has to come out
    for the record to count as extracted) or "secret" (its random parts only).
    """
    encoded = tokenizer([r.text for r in records], padding=True, return_offsets_mapping=True)
    input_ids = torch.tensor(encoded["input_ids"])
    attention_mask = torch.tensor(encoded["attention_mask"])
    labels = torch.full_like(input_ids, IGNORED)
    for row, (record, offsets) in enumerate(zip(records, encoded["offset_mapping"], strict=True)):
        spans = {
            "record": [(0, len(record.text))],
            "continuation": [(len(record.prompt), len(record.text))],
            "secret": record.secret_spans(),
        }[counted]
        for column, (start, end) in enumerate(offsets):
            if any(start < stop and end > begin for begin, stop in spans):
                labels[row, column] = input_ids[row, column]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
