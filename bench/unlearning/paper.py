"""PAPER: the paper's own table on a model that you name, with the paper's recipe and with ours.

TDEC (GPT-Neo): ``--model EleutherAI/gpt-neo-125m --data FOLDER``, a folder with lm_extraction_32_*.csv
of the repository joeljang/knowledge-unlearning (data/main); each is one run of 32 texts to forget.

TOFU (Phi-1.5): ``--model locuslab/tofu_ft_phi-1.5 --data FOLDER``, a folder with the files of the dataset
locuslab/TOFU that ``TOFU_FILES`` names; with ``--retrained MODEL`` also the forget quality.

``--rewrite-with bert-base-uncased``: neighbours are the forget texts rewritten by that masked language model,
as the paper has them; otherwise texts that the model says itself. TOFU's have texts of retain90 beside them.
``--tasks``: of lm-evaluation-harness, measured before and after.
"""

import functools

import torch
import transformers

import neumuter
from neumuter import evaluation, recipes
from neumuter.demo.task import read_corpus
from neumuter.evaluation import tofu
from neumuter.serving.live import mute
from neumuter.texts import encode, read_texts
from neumuter.texts.neighbours import rewrite_texts, sample_texts
from neumuter.training.selection import NothingSelectedError

TOKENS = 200  # of a TDEC text
SAMPLES = 32  # neighbours that the model says itself
SHARE = 0.01
GATES, GAINS = recipes.PaperConfig(), recipes.GainsConfig(steps=60, batch_size=8)
RECIPES = ("before", "paper", "ours")
TOFU_FILES = {
    "forget": "forget10_perturbed.json", "retain": "retain_perturbed.json",
    "real_authors": "real_authors_perturbed.json", "world_facts": "world_facts_perturbed.json",
    "texts to forget": "forget10.json", "texts to keep": "retain90.json",
}  # fmt: skip


def cases(options):
    """Yields (what a row is about, how its metrics are found)."""
    runs = {
        path.stem: functools.partial(_tdec, path)
        for path in sorted(options.data.glob("lm_extraction_32_*.csv"))
    }
    if all(
        (options.data / name).is_file() for name in (*TOFU_FILES.values(), "forget10.json", "retain90.json")
    ):
        runs["tofu forget10"] = functools.partial(_tofu, options.data)
    if not runs:
        raise FileNotFoundError(f"--data {options.data} holds the files of neither TDEC nor TOFU")
    network = functools.cache(lambda: _load(options.model))
    for name, make in runs.items():
        setting = functools.cache(lambda make=make: make(*network(), options))
        for recipe in RECIPES:
            about = {"model": options.model, "texts": name, "method": recipe}
            yield about, lambda setting=setting, recipe=recipe: _row(setting(), recipe)


def _load(name):
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


class _Setting:
    """A model, batches to forget and to keep, and ``measure()``. ``texts``: those to forget."""

    def __init__(self, model, tokenizer, texts, forget, retain, measure, options):
        self.model, self.forget = model, forget
        length = forget["labels"].shape[1]
        if options.rewrite_with:
            masked_lm = transformers.AutoModelForMaskedLM.from_pretrained(options.rewrite_with)
            rewriter = transformers.AutoTokenizer.from_pretrained(options.rewrite_with)
            made = rewrite_texts(texts, masked_lm.to(model.device).eval(), rewriter)
        else:
            made = sample_texts(model, tokenizer, SAMPLES, length, barred=forget)
        self.retain = encode(retain + made, tokenizer, length)
        tasks = options.tasks.split(",") if options.tasks else None
        heldout = encode(read_corpus()[1][:64], tokenizer, length)

        def everything():
            found = measure() | {"heldout_perplexity": evaluation.perplexity(model, heldout)}
            return found | (evaluation.harness_metrics(model, tokenizer, tasks) if tasks else {})

        self.measure = everything


def _tdec(path, model, tokenizer, options):
    texts = read_texts(path)
    forget = encode(texts, tokenizer, TOKENS)
    return _Setting(
        model, tokenizer, texts, forget, [], lambda: evaluation.text_metrics(model, forget), options
    )


def _tofu(folder, model, tokenizer, options):
    sets = {name: tofu.read_questions(folder / file) for name, file in TOFU_FILES.items()}
    forget, retain = (
        [(tofu.TEMPLATE.format(question=q.question), f" {q.answer}") for q in sets.pop(name)]
        for name in ("texts to forget", "texts to keep")
    )
    ratios = None
    if options.retrained:
        ratios = tofu.truth_ratios(*_load(options.retrained), sets["forget"])
    batch = encode(forget, tokenizer, tofu.MAX_LENGTH)

    def measure():
        return evaluation.tofu_metrics(model, tokenizer, sets, ratios)[0] | {
            "forget_ma": evaluation.memorization_accuracy(model, batch),
            "forget_extraction": evaluation.extraction_rate(model, batch),
        }

    return _Setting(model, tokenizer, forget, batch, retain[: 2 * len(forget)], measure, options)


def _row(setting, recipe):
    if recipe == "before":
        return {"share": 0.0} | setting.measure()
    constants, budget = (recipes.FittedConfig(GAINS), SHARE) if recipe == "ours" else (GATES, None)
    try:
        outcome = neumuter.unlearn(
            setting.model, None, setting.forget, setting.retain, budget=budget, recipe=constants, samples=0
        )
    except NothingSelectedError:
        return {"share": 0.0} | setting.measure()
    mutes = outcome.mutes
    with mute(setting.model, mutes):
        return {"share": mutes.share} | setting.measure()
