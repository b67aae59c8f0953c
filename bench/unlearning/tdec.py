"""REAL on the texts of the Training Data Extraction Challenge, as the paper's first benchmark has them.

``--data``: a folder with lm_extraction_32_0.csv and lm_extraction_32_1.csv of the repository
joeljang/knowledge-unlearning (data/main). None of it is copied here.
"""

import csv
import functools

import torch

from bench.unlearning.methods import CONTROLS, run
from bench.unlearning.pretrained import SMOLLM2, tokenizer
from bench.unlearning.real import OURS, RECIPE, SEEDS, Setting
from neumuter import evaluation
from neumuter.types import IGNORED

FILES = ("lm_extraction_32_0.csv", "lm_extraction_32_1.csv")  # to forget, to stay
TEXTS, TOKENS, PROMPT = 8, 128, 32
METHODS = ("random", "paper", OURS, *CONTROLS)


class Texts(Setting):
    """The first 128 tokens of eight texts each; the 32 first are the prompt that extraction starts from."""

    recipe = RECIPE | {"batch_size": 4}

    def __init__(self, seed, folder):
        super().__init__(seed, *(_texts(folder / name, seed) for name in FILES))

    def measure(self, model, forget=None):
        forget = self.forget if forget is None else forget
        whole = forget | {"labels": forget["input_ids"]}
        return super().measure(model, forget) | {
            "forget_ma": evaluation.memorization_accuracy(model, whole),
            "forget_el": evaluation.extraction_likelihood(model, whole),
        }


def _texts(path, seed):
    with open(path, encoding="utf-8", newline="") as file:
        found = [tokenizer()(row["text"])["input_ids"] for row in csv.DictReader(file)]
    long = [ids[:TOKENS] for ids in found if len(ids) >= TOKENS]
    if len(long) < TEXTS:
        raise ValueError(f"{path} has {len(long)} texts of {TOKENS} tokens, {TEXTS} are needed")
    order = torch.randperm(len(long), generator=torch.Generator().manual_seed(seed))[:TEXTS]
    ids = torch.tensor([long[i] for i in order])
    labels = ids.clone()
    labels[:, :PROMPT] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def cases(folder, quick=False):
    """Yields (what a row is about, how its metrics are found); ``quick``: one seed, few methods."""
    if not all((folder / name).is_file() for name in FILES):
        raise FileNotFoundError(f"--data must hold {' and '.join(FILES)}: {folder} does not")
    for seed in SEEDS[:1] if quick else SEEDS:
        yield from _cases(seed, folder, METHODS[:3:2] if quick else METHODS)


def _cases(seed, folder, methods):
    setting = functools.cache(lambda: Texts(seed, folder))
    about = {"model": SMOLLM2, "seed": seed, "forget": TEXTS}

    def case(method):
        return about | {"budget": 0.01, "method": method}, lambda: run(setting().job(0.01), method)

    yield about | {"method": "before"}, lambda: {"share": 0.0} | setting().measure(setting().full)
    yield about | {"method": "retrained"}, lambda: {"share": 0.0} | setting().measure(setting().retrained())
    for method in methods:
        yield case(method)
