"""The front door, and wrong kinds of arguments: each function says what it wants instead."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import neumuter
from neumuter.training.weights import tune_weights
from tests.models import build, tokenizer

SCRIPT = """
import neumuter
assert [name for name in dir(neumuter) if not name.startswith("__")] == sorted(
    [*neumuter.__all__, "evaluation", "recipes", "texts", "training"]
)
neumuter.recipes.mute_random, neumuter.texts.encode
neumuter.evaluation.METRICS, neumuter.training.tune_weights
print([name for name in dir(neumuter) if name in ("importlib", "TYPE_CHECKING", "files", "_HOMES")])
"""


def test_the_front_door_shows_its_tools_and_nothing_else():
    """In a process where nothing is imported yet."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'recipe'"):
        neumuter.recipe  # noqa: B018


@pytest.fixture(scope="module")
def of():
    """A model, a handle of another one, a tokenizer, a batch, and what recipes take."""
    words = tokenizer()
    batch = neumuter.texts.encode(["some text", "another"], words, 16)
    masked = neumuter.attach(build("llama"), start_layer=0)
    pair = neumuter.training.PairedBatches(masked, batch, batch)
    return SimpleNamespace(model=build("llama"), masked=masked, words=words, batch=batch, pair=pair)


MODEL = "model must be a model of transformers, not its name; of a handle, handle.model, got "
BATCH = (
    "must be a batch of input_ids, attention_mask, labels, as neumuter.texts.encode makes it of texts, got "
)
HANDLE = "masked must be the handle that neumuter.attach(model) returns, got LlamaForCausalLM"
PAIR = "pair must be PairedBatches(masked, forget_batch, retain_batch), got Masked"
MUTES = "mutes must be a MuteSet or the path of a mute file, got "
TOKENIZER = "tokenizer must be a tokenizer of transformers"
WRONG = {
    "strings to measure": (
        lambda o: neumuter.evaluation.extraction_rate(o.model, ["a"]), "batch " + BATCH + "list"
    ),
    "a string": (lambda o: neumuter.evaluation.perplexity(o.model, "a"), "batch " + BATCH + "str"),
    "half a batch": (
        lambda o: neumuter.evaluation.perplexity(o.model, {"input_ids": o.batch["input_ids"]}),
        "got dict, which lacks attention_mask, labels",
    ),
    "strings to continue": (
        lambda o: neumuter.evaluation.continue_texts(o.model, o.words, ["a"], 1), "batch " + BATCH + "list"
    ),
    "a handle to measure": (lambda o: neumuter.evaluation.perplexity(o.masked, o.batch), MODEL + "Masked"),
    "a name to measure": (lambda o: neumuter.evaluation.perplexity("gpt2", o.batch), MODEL + "str"),
    "a model for random": (lambda o: neumuter.recipes.mute_random(o.model, 0.1), HANDLE),
    "a model for attribution": (
        lambda o: neumuter.recipes.mute_by_attribution(o.model, o.batch, 0.1), HANDLE
    ),
    "a model for activation": (
        lambda o: neumuter.recipes.mute_by_activation(o.model, o.batch, o.batch, 0.1), HANDLE
    ),
    "a model to pair": (lambda o: neumuter.training.PairedBatches(o.model, o.batch, o.batch), HANDLE),
    "strings for attribution": (
        lambda o: neumuter.recipes.mute_by_attribution(o.masked, ["a"], 0.1), "forget_batch " + BATCH + "list"
    ),
    "strings to pair": (
        lambda o: neumuter.training.PairedBatches(o.masked, ["a"], o.batch), "forget_batch " + BATCH + "list"
    ),
    "strings to tune": (lambda o: tune_weights(o.model, ["a"], o.batch), "forget_batch " + BATCH + "list"),
    "a handle to tune": (lambda o: tune_weights(o.masked, o.batch, o.batch), MODEL + "Masked"),
    "a handle to fit": (lambda o: neumuter.recipes.fit_mutes(o.masked, 0.1), PAIR),
    "a handle to fit gains": (lambda o: neumuter.recipes.fit_gains(o.masked, None), PAIR),
    "a handle to find support": (lambda o: neumuter.recipes.find_support(o.masked, 0.1), PAIR),
    "a handle to propose": (lambda o: neumuter.recipes.propose_by_fisher(o.masked, 0.1), PAIR),
    "a handle to search": (lambda o: neumuter.recipes.search_budget(o.masked, None), PAIR),
    "a handle to train": (lambda o: neumuter.recipes.train_gates(o.masked), PAIR),
    "a number to mute": (lambda o: neumuter.mute(o.model, 0), MUTES + "int"),
    "a model to mute by": (lambda o: neumuter.mute(o.model, o.model), MUTES + "LlamaForCausalLM"),
    "a name to attach": (lambda o: neumuter.attach("gpt2"), MODEL + "str"),
    "a handle to attach": (lambda o: neumuter.attach(o.masked), MODEL + "Masked"),
    "a name for a bank": (lambda o: neumuter.MuteBank("gpt2"), MODEL + "str"),
    "sets before the model": (lambda o: neumuter.combine([], o.model), MODEL + "list"),
    "a name as tokenizer": (lambda o: neumuter.texts.encode(["ab"], "gpt2", 16), TOKENIZER + ", got str"),
    "the tokenizer first": (
        lambda o: neumuter.texts.encode(o.words, ["ab"], 16), TOKENIZER + ", got list"
    ),
    "one text": (lambda o: neumuter.texts.encode("a text", o.words, 16), "texts must be a list of texts"),
    "one row": (lambda o: neumuter.texts.encode({"text": "ab"}, o.words, 16), "put it into a list"),
    "batches in a list": (lambda o: neumuter.texts.join_batches([o.batch]), "batch 1 " + BATCH + "list"),
    "a number to unlearn with": (
        lambda o: neumuter.unlearn(o.model, 7, ["ab"]), TOKENIZER + ", its folder or name, or None, got int"
    ),
    "no model to unlearn": (lambda o: neumuter.unlearn(None, o.words, ["ab"]), MODEL + "NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kinds_of_arguments_say_what_is_expected(of, name):
    call, message = WRONG[name]
    with pytest.raises(TypeError, match=re.escape(message)):
        call(of)


def test_rows_are_texts(of):
    encoded = neumuter.texts.encode([{"text": "ab"}, {"prompt": "a", "completion": "b"}], of.words, 16)
    assert encoded["labels"].shape == (2, 3)
