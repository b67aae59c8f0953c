"""Neighbour texts by a masked language model, and the cache."""

import re

import pytest
import tokenizers
import torch
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import neumuter
from neumuter import unlearning
from neumuter.evaluation import mean_token_loss
from neumuter.preparing import count_samples
from neumuter.recipes import FittedConfig, GainsConfig
from neumuter.texts.neighbours import _fill, rewrite_texts, sample_texts
from neumuter.types import IGNORED
from tests import models

WORDS = [f"w{i}" for i in range(30)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=35, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=14,
    )  # fmt: skip
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]")
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )
    return BertForMaskedLM(config).eval(), PreTrainedTokenizerFast(tokenizer_object=fast, **names)


TEXTS = ["w1 w2 w3 w4 w5 w6 w7 w8", "w9 w10", ("w11 w12", "w13 w14 w15")] * 4


def test_a_share_of_each_text_is_replaced(bert):
    made = rewrite_texts(TEXTS, *bert, share=0.3, seed=1)
    assert len(made) == len(TEXTS)
    for text, new in zip(TEXTS, made, strict=True):
        if isinstance(text, tuple):
            assert new[0] == text[0]
            text, new = text[1], new[1]
        old, words = text.split(), new.split()
        assert len(old) == len(words)
        changed = sum(a != b for a, b in zip(old, words, strict=True))
        assert changed == -(-3 * len(old) // 10)
        assert not set(words) & set(SPECIAL)
    assert made == rewrite_texts(TEXTS, *bert, share=0.3, seed=1)
    assert made != rewrite_texts(TEXTS, *bert, share=0.3, seed=2)


def test_secrets_never_stay(bert):
    """Whatever the seed draws: their tokens are replaced in addition to the share."""

    def find_secrets(text):
        words = text if isinstance(text, str) else text[1]
        starts = [(words.find(secret), len(secret)) for secret in ("w10", "w14")]
        return [(start, start + length) for start, length in starts if start >= 0]

    for seed in range(5):
        made = rewrite_texts(TEXTS, *bert, seed=seed, find_secrets=find_secrets)
        for text, new in zip(TEXTS, made, strict=True):
            old, words = (part if isinstance(part, str) else part[1] for part in (text, new))
            for was, now in zip(old.split(), words.split(), strict=True):
                assert was not in ("w10", "w14") or was != now
    slow = type("Slow", (), {"is_fast": False, "mask_token_id": 4})()
    with pytest.raises(ValueError, match="needs a fast one"):
        rewrite_texts(TEXTS, bert[0], slow)


def test_what_is_not_replaced_stays_as_it_is_written(bert):
    """Spaces, line breaks and what the tokenizer does not know."""
    text = "  w1 w2\n\n\N{GRINNING FACE} w3\tw4  w5 w6 \n"
    for seed in range(5):
        (pair,) = rewrite_texts([("Say:", text)], *bert, share=0.2, seed=seed)
        assert pair[0] == "Say:"
        old, new = (re.split(r"(\s+)", part) for part in (text, pair[1]))
        assert old[1::2] == new[1::2]
        changed = [(a, b) for a, b in zip(old[::2], new[::2], strict=True) if a != b]
        assert len(changed) <= 2


@pytest.mark.parametrize(
    ("build", "words", "expected"),
    [
        (tokenizers.models.WordPiece, {"play": 1, "##ing": 2, "the": 3, "##s": 4}, ["play the", "plays"]),
        (tokenizers.models.BPE, {"▁play": 1, "ing": 2, "▁the": 3, "s": 4}, ["play the", "plays"]),
        (tokenizers.models.BPE, {"Ġplay": 1, "ing": 2, "Ġthe": 3, "s": 4}, ["play the", "plays"]),
    ],
)
def test_a_part_of_a_word_is_replaced(build, words, expected):
    """Whether a token begins a word is written in other ways by other tokenizers."""
    model = build(words | {"[UNK]": 0}, unk_token="[UNK]", **({"merges": []} if "BPE" in str(build) else {}))
    fast = tokenizers.Tokenizer(model)
    kinds = {"##": tokenizers.decoders.WordPiece(), "▁": tokenizers.decoders.Metaspace()}
    found = next((kind for mark, kind in kinds.items() if any(mark in word for word in words)), None)
    fast.decoder = found or tokenizers.decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="[UNK]")
    places = [(0, 5), (5, 8)]
    made = [_fill(" playing", places, [False, True], [1, new], wrapped) for new in (3, 4)]
    assert made == [f" {word}" for word in expected]
    # In the place of a word that has a space before it.
    assert _fill(" playing", places, [True, False], [3, 2], wrapped) == " theing"


def test_the_bytes_of_a_character_are_written_together():
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model = tokenizers.models.BPE({letter: number for number, letter in enumerate(sorted(letters))}, [])
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=fast)
    places = words("a中b", return_offsets_mapping=True)["offset_mapping"]
    other = words("a丰b")["input_ids"]
    for chosen in ([False, True, True, True, False], [False, False, False, True, False]):
        assert _fill("a中b", places, chosen, other, words) == "a丰b"
    broken = [*other[:3], other[0], other[4]]
    assert _fill("a中b", places, [False, False, False, True, False], broken, words) == "aab"


def test_secrets_that_the_tokenizer_does_not_know_do_not_stay(bert):
    text = "w1 w2 mail: qi7whj w3"
    for seed in range(3):
        (made,) = rewrite_texts([text], *bert, seed=seed, find_secrets=lambda _: [(12, 18)])
        assert "qi7whj" not in made


def test_what_is_rewritten_holds_no_value_of_a_text_to_forget(bert, tmp_path, monkeypatch):
    for part in bert:
        part.save_pretrained(tmp_path / "bert")
    seen = []

    def watch(*given, **options):
        seen.extend(rewrite_texts(*given, **options))
        return seen

    monkeypatch.setattr("neumuter.job.rewrite_texts", watch)
    # Of these words all are common but those of which every text has its own.
    texts = [(f"w1 w2 w{number}", f" w3 w4 w{number + 12} w5") for number in range(6, 18)]
    unlearning.unlearn(
        models.build("llama"),
        models.tokenizer(),
        texts,
        rewrite_with=str(tmp_path / "bert"),
        recipe=FittedConfig(GainsConfig(steps=1)),
        samples=0,
        callback=lambda *_: None,
    )
    for (prompt, old), (same, new) in zip(texts, seen, strict=True):
        assert same == prompt
        assert new.split()[2] != old.split()[2]


def test_a_text_that_is_too_long_is_cut(bert):
    (made,) = rewrite_texts([" ".join(WORDS)], *bert, share=1.0)
    assert len(made.split()) == 14 - 2 - 2  # positions, a margin, and the special tokens


def test_the_most_likely_other_token_is_taken(bert):
    model, tokenizer = bert
    (made,) = rewrite_texts(["w1"], model, tokenizer, share=1.0)
    ids = tokenizer("[MASK]", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[2, 4, 3]]
    order = model(ids).logits[0, 1].argsort(descending=True).tolist()
    best = next(i for i in order if i >= len(SPECIAL) and i != tokenizer.convert_tokens_to_ids("w1"))
    assert made == tokenizer.convert_ids_to_tokens(best)


def test_bad_arguments(bert):
    model, tokenizer = bert
    with pytest.raises(ValueError, match="share must lie in"):
        rewrite_texts(TEXTS, model, tokenizer, share=0)
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]")
    with pytest.raises(ValueError, match="no mask token"):
        rewrite_texts(TEXTS, model, plain)


def test_texts_of_an_iterator_are_rewritten_too(bert, tmp_path):
    for part in bert:
        part.save_pretrained(tmp_path / "bert")
    outcome = unlearning.unlearn(
        models.build("llama"),
        models.tokenizer(),
        iter(["w1 w2 w3"]),
        rewrite_with=str(tmp_path / "bert"),
        recipe=FittedConfig(GainsConfig(steps=2)),
        samples=0,
        callback=lambda *_: None,
    )
    assert outcome.mutes.count == 20


def test_barred_texts_are_never_recited():
    """A model that says one text only, and then says anything but that."""
    model, tokenizer = models.build("llama"), models.tokenizer()
    text = "the code is 4711"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    said = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        model(input_ids=said, labels=said).loss.backward()
        optimizer.step()
    counted = ids.clone()
    counted[:, :8] = IGNORED  # of the start token and "the cod", which is no secret
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": counted}
    assert all(made.startswith(text) for made in sample_texts(model, tokenizer, 4, 20))
    barred = sample_texts(model, tokenizer, 16, 20, barred=batch)
    assert barred == ["the cod"] * 16  # and no further


@pytest.mark.parametrize(("others", "count"), [(0, 32), (1, 16), (33, 16), (240, 120), (10**6, 256)])
def test_the_model_says_more_where_more_is_to_be_kept(others, count):
    assert count_samples(others) == count


def test_all_other_texts_to_keep_count(monkeypatch):
    asked = []
    monkeypatch.setattr("neumuter.preparing.sample_texts", lambda *given, **_: asked.append(given[2]) or [])
    retain = [f"w1 w{number % 20} w3" for number in range(40)]
    options = {"recipe": FittedConfig(GainsConfig(steps=1)), "callback": lambda *_: None}
    model, words = models.build("llama"), models.tokenizer()
    outcome = unlearning.unlearn(model, words, [("w1", " w2")], retain, keep_slopes=True, **options)
    neumuter.refit(
        model, words, outcome.mutes, undone=[outcome.slopes], retain=retain, samples=None, **options
    )
    assert asked == [20, 20]


def test_harm_is_measured_on_texts_that_no_search_sees(monkeypatch):
    """They are said once, before the search, and are others than those that are kept."""
    said, seen = [], []

    def sample(*given, **options):
        said.append(sample_texts(*given, **options))
        return said[-1]

    def read(model, batch):
        seen.append(batch["input_ids"].tolist())
        return mean_token_loss(model, batch)

    monkeypatch.setattr("neumuter.preparing.sample_texts", sample)
    monkeypatch.setattr("neumuter.job.sample_texts", sample)
    monkeypatch.setattr("neumuter.job.mean_token_loss", read)
    options = {"recipe": FittedConfig(GainsConfig(steps=4)), "callback": lambda *_: None, "budget": 0.5}
    given = models.build("llama"), models.tokenizer(), [("w1", " w2")], ["w1 w5 w3"]
    outcome = unlearning.unlearn(*given, **options)
    kept, checked = said
    assert len(checked) == 16
    assert not set(kept) & set(checked)
    assert seen[0] == seen[1]
    assert outcome.before["own_loss"] != outcome.after["own_loss"]
    assert outcome.mutes.metrics["after"]["own_loss"] == outcome.after["own_loss"]
    assert "own_loss" not in unlearning.unlearn(*given, samples=0, **options).after
    assert "texts of its own" in str(outcome)
