"""Figures by generation do not depend on what the checkpoint's generation_config prefers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from neumuter.evaluation import continue_texts, examination, extraction_likelihood, tofu
from neumuter.evaluation.examination import continue_prompts
from neumuter.generation import find_end_tokens, generate
from neumuter.texts import encode
from neumuter.texts.neighbours import sample_texts
from tests import models
from tests.neumuter.test_texts import with_end_token

PREFERENCES = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "guidance_scale": 1.5,
    "begin_suppress_tokens": list(range(3, 50)),
    "suppress_tokens": list(range(3, 50)),
    "min_p": 0.5,
    "return_dict_in_generate": True,
    "stop_strings": ["a"],
    "num_beams": 3,
    "do_sample": True,
    "max_length": 5,
}
TEXTS = [("Who is Jo?", " Jo bakes bread."), "Nobody else in town does so."]


def figures(model):
    words = models.tokenizer()
    batch = encode(TEXTS, words, 64)
    return (
        extraction_likelihood(model, batch, n=3),
        continue_texts(model, words, batch, 2),
        sample_texts(model, words, 2, 6),
    )


@pytest.fixture(scope="module")
def expected():
    return figures(models.build("llama"))


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_checkpoints_preferences_do_not_change_figures(name, expected):
    model = models.build("llama")
    setattr(model.generation_config, name, PREFERENCES[name])
    former = model.generation_config
    assert figures(model) == expected
    assert model.generation_config is former
    assert getattr(former, name) == PREFERENCES[name]


def test_nor_do_they_through_peft(expected):
    model = models.build("llama")
    model.generation_config.repetition_penalty = 1.3
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert figures(adapted) == expected
    assert model.generation_config.repetition_penalty == 1.3
    assert adapted.generation_config is model.generation_config


def test_rouge_answers_by_its_own_settings(monkeypatch):
    pytest.importorskip("rouge_score")
    monkeypatch.setattr(tofu, "MAX_NEW_TOKENS", 8)
    model, words = models.build("llama"), models.tokenizer()
    seen = []
    monkeypatch.setattr(
        type(words), "batch_decode", lambda _, ids, **__: seen.append(ids) or ["a"] * len(ids)
    )
    for penalty in (1.0, 1.5):
        model.generation_config.repetition_penalty = penalty
        tofu.rouge_recalls(model, words, [tofu.Question("Who?", "Jo.", "Jo.", ())])
    assert seen[0] == seen[1]


def test_prompts_do_not_end_in_an_appended_end_token(monkeypatch):
    pytest.importorskip("rouge_score")
    model, words, seen = models.build("llama"), with_end_token(), []
    real = model.generate

    def spy(ids, **options):
        seen.append(ids[0].tolist())
        return real(ids, **options)

    monkeypatch.setattr(model, "generate", spy)
    monkeypatch.setattr(tofu, "MAX_NEW_TOKENS", 2)
    tofu.rouge_recalls(model, words, [tofu.Question("Who?", "Jo.", "Jo.", ())])
    continue_texts(model, words, encode(TEXTS, words, 64), 2)
    assert [words.decode(ids) for ids in seen] == [
        "<s>Question: Who??Answer:", "<s>Who is Jo?", "<s>Nobody e",
    ]  # fmt: skip


def test_the_checkpoints_end_tokens_stay():
    model, words = models.build("llama"), models.tokenizer()
    ids = torch.tensor([[1, 5]])
    first = generate(model, ids, torch.ones_like(ids), max_new_tokens=3)[0, 2].item()
    model.generation_config.eos_token_id = [first, 96]
    assert generate(model, ids, torch.ones_like(ids), max_new_tokens=3).tolist() == [[1, 5, first]]
    assert find_end_tokens(model, words) == sorted({2, first, 96})
    model.generation_config.eos_token_id = None
    assert find_end_tokens(model, words) == [2]


def test_what_fills_up_a_row_that_has_ended_is_not_said(monkeypatch):
    """Without a pad token it is token 0, which in many vocabularies is a character."""
    model, words = models.build("llama"), models.tokenizer()
    words.pad_token = None
    asked = encode([("Who is Jo?", " A baker."), ("Where?", " Here.")], words, 64)
    said = torch.tensor([[9, 2, 0, 0], [7, 8, 9, 2]])
    for module in (examination, tofu):
        monkeypatch.setattr(module, "generate", lambda model, ids, *_, **__: torch.cat([ids, said], 1))
    # The shorter prompt comes first.
    assert continue_prompts(model, words, asked, 4) == [[7, 8, 9, 2], [9, 2]]
    pytest.importorskip("rouge_score")
    read = []
    monkeypatch.setattr(type(words), "batch_decode", lambda _, ids, **__: read.extend(ids) or ["a", "a"])
    tofu.rouge_recalls(model, words, [tofu.Question("Who?", "Jo.", "Jo.", ())] * 2)
    assert read == [[9, 2], [7, 8, 9, 2]]


def test_generation_ends_where_positions_do():
    """Near the end there is room for fewer tokens; a shorter prompt is continued as far as ever."""
    model, words = models.build("gpt2", n_positions=40), models.tokenizer()
    model.generation_config.eos_token_id = None
    words.eos_token = None
    texts = [("a" * 36, "b"), ("a" * 30, "b"), ("c" * 9, "b")]
    found = continue_prompts(model, words, encode(texts, words, 40), 20)
    assert [len(line) for line in found] == [3, 9, 20]
    assert found == [continue_prompts(model, words, encode([text], words, 40), 20)[0] for text in texts]
