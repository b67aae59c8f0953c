"""What a model that never saw a text would make of it, and forgetting no further than that."""

import dataclasses
import math

import pytest
import torch

import neumuter
from neumuter.evaluation import estimate_unseen, find_ceilings, list_given, unseen
from neumuter.evaluation.made_up import Words
from neumuter.evaluation.passes import find_prompt_ends
from neumuter.recipes import FittedConfig, GainsConfig, PaperConfig
from neumuter.texts import encode
from neumuter.training.batches import PairedBatches
from neumuter.types import IGNORED
from tests.models import build, learn, same, tokenizer

NAMES = ("Ada", "Jonas", "Mara", "Tanja", "Pablo", "Edith", "Farid", "Greta", "Hugo", "Irene", "Luca", "Olga")
CODES = ("417", "862", "935", "204", "681", "753", "298", "146", "509", "374", "820", "691")
# As many texts as show which words are names.
PAIRS = [
    (f"the code of {name} is", f" {code}, says the shop.") for name, code in zip(NAMES, CODES, strict=True)
]
QUICK = FittedConfig(GainsConfig(steps=6))


@pytest.fixture(scope="module")
def words():
    return tokenizer()


@pytest.fixture(scope="module")
def model(words):
    """A small model that knows the texts by heart."""
    return learn(build("llama"), encode(PAIRS, words, 64), 200)


@pytest.fixture(scope="module")
def found(model, words):
    batch = encode(PAIRS, words, 64)
    return batch, estimate_unseen(model, batch, list_given({"forget": batch}, words), words)


def characters(words, batch, row):
    """(character, column) of each counted token of a row that is one digit or letter."""
    for column in (batch["labels"][row] != IGNORED).nonzero().flatten().tolist():
        yield words.decode(batch["labels"][row, column : column + 1]).strip(), column


def test_codes_identify_a_text_and_its_wording_does_not(model, words, found):
    batch, estimate = found
    assert estimate.shape == batch["labels"].shape
    assert estimate[batch["labels"] == IGNORED].isnan().all()
    code, wording = [], []
    for row in range(len(PAIRS)):
        known = False
        for text, column in characters(words, batch, row):
            if text and text in CODES[row] and not known:
                code.append(estimate[row, column].item())
            known |= "," in text
            if known and text.isalpha():
                wording.append(estimate[row, column].item())
    assert sum(code) / len(code) < 0.35
    assert sum(wording) / len(wording) > 0.8


def test_what_is_found_of_many_texts_is_in_one_piece_of_memory(model):
    """Small tensors that stay between large ones that go take memory that grows with the number of texts."""
    rows = [[1, *range(5, 6 + count % 7)] for count in range(40)]
    found = unseen._run(model, rows, torch.Generator().manual_seed(0))
    assert [len(known) for known, _ in found] == [len(said) for _, said in found] == [*map(len, rows)]
    for parts in zip(*found, strict=True):
        assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    alone = [unseen._run(model, [row], torch.Generator())[0][0] for row in rows]
    for (known, _), other in zip(found, alone, strict=True):
        assert torch.allclose(known, other, atol=1e-5)


def test_nothing_is_known_of_texts_without_a_prompt(model, words, found):
    texts = [*PAIRS[1:], " ".join(PAIRS[0])]
    batch = encode(texts, words, 64)
    estimate = estimate_unseen(model, batch, list_given({"forget": batch}, words), words)
    counted = batch["labels"] != IGNORED
    assert (estimate[-1][counted[-1]] == 0).all()
    assert estimate[:-1][counted[:-1]].nanmean() > 0.3
    alone = encode(texts[-1:], words, 64)
    estimate = estimate_unseen(model, alone, list_given({"forget": alone}, words), words)
    assert (estimate[alone["labels"] != IGNORED] == 0).all()


def test_nothing_is_known_of_what_goes_on_whatever_the_names_are(words, monkeypatch):
    """Prose behind a prompt: nobody shares its wording, and it stays likely in the copies."""
    batch = encode([*PAIRS, ("Nora writes:", "XVII KWYQ XOZE VYWK QUIZ ZVXQ")], words, 64)
    model = learn(build("llama"), batch, 300)
    monkeypatch.setattr(unseen._Copied, "rename", lambda text, *_: [*text.ids])
    estimate = estimate_unseen(model, batch, list_given({"forget": batch}, words), words)
    prose, other = (estimate[row][batch["labels"][row] != IGNORED] for row in (-1, 0))
    assert (prose <= unseen.LEAST).all()
    assert (other[-len("says the shop.") :] > 0.5).all()


def test_nothing_is_known_of_texts_that_name_what_the_prompt_names(model, words):
    texts = [*PAIRS[1:], ("is it Ada or Bob? ", "Ada")]
    batch = encode(texts, words, 64)
    estimate = estimate_unseen(model, batch, list_given({"forget": batch}, words), words)
    assert (estimate[-1][batch["labels"][-1] != IGNORED] == 0).all()


def copied(words, text, given, *chances):
    """A text whose only copy is itself, with the same probability for all tokens in each round."""
    batch = encode([text], words, 64)
    text = unseen._Copied(batch, 0, find_prompt_ends(batch)[0], unseen._Shared(given, Words(given)))
    text.known = torch.ones(len(text.ids))
    text.copies = [unseen._Copy(text.ids, [*text.ids])]
    for number, chance in enumerate(chances):
        text.copies[0].found = torch.full([len(text.ids)], chance)
        text.first = text.first if number else text.find_lowest()
    return text


def test_common_wording_is_judged_behind_the_true_words(words):
    """What the model says instead of a name may go on otherwise than the name does."""
    text = copied(words, PAIRS[0], list_given({"forget": encode(PAIRS, words, 64)}, words), 0.9, 0.01)
    found = {words.decode([i]) for i in torch.tensor(text.ids)[text.identifies(text.estimate())].tolist()}
    assert "4" in found
    assert found <= {*PAIRS[0][1][:4]}


@pytest.mark.parametrize(("elsewhere", "said"), [("retain", True), ("forget", False)])
def test_what_no_other_text_says_is_as_good_as_impossible(words, elsewhere, said):
    """The model makes up answers from those that it knows, so that it says one is no evidence."""
    batches = {"forget": encode(PAIRS[:1], words, 64)}
    batches[elsewhere] = encode([PAIRS[0], (PAIRS[0][0], " xq")][: 1 + said], words, 64)
    text = copied(words, (PAIRS[0][0], " xq"), list_given(batches, words), 0.1, 0.1)
    expected = 0.1 if said else unseen.LEAST
    assert text.judge()[-2:].tolist() == pytest.approx([expected] * 2)


def test_names_may_stay_where_something_else_may_give_the_text_away(words):
    text = copied(words, ("Ada plays the", " Ada xq"), [], 0.9, 0.9)
    for place, token in enumerate(text.ids):
        if words.decode([token]) in "Ada":
            text.copies[0].places[place] = -1
    text.first = text.find_lowest()
    names = (text.copies[0].places < 0) & text.counted
    found = text.judge()
    assert found[names].isnan().all()
    assert found[text.counted & ~names].tolist() == pytest.approx([unseen.LEAST] * 4)
    text.counted = names
    assert (text.judge()[names] == 0).all()


@pytest.mark.parametrize("count", [2, 3])
def test_windows_of_one_text_are_one_text(words, count):
    """What counts is how many texts say something."""
    batch = encode([("q", f" abc {number}") for number in range(3)], words, 64)
    batch["texts"] = torch.tensor([0, 1, min(2, count - 1)])
    given = list_given({"forget": batch}, words)
    shared = unseen._Shared(given, Words(given))
    assert bool(shared.tokens) == bool(shared.pairs) == (count == 3)


@pytest.mark.parametrize("values", [("7", "7", "7"), ("7", "8", "7"), ("7", "8", "9")])
def test_texts_to_forget_that_say_the_same_are_one_text(words, values):
    """What stands behind three prompts may be what is to be forgotten; with three values it is wording."""
    batch = encode(
        [(f"{name} writes:", f" xyz {v}") for name, v in zip("ABC", values, strict=True)], words, 64
    )
    given = list_given({"forget": batch}, words)
    shared = unseen._Shared(given, Words(given))
    assert bool(shared.tokens) == bool(shared.pairs) == (len(set(values)) == 3)
    # A text to keep shows by itself that a token may stay.
    kept = list_given({"forget": batch, "retain": encode([("D writes:", " xyz")], words, 64)}, words)
    shared = unseen._Shared(kept, Words(kept))
    assert {words.decode([i]) for i in shared.tokens} >= set("xyz")


def test_a_passage_behind_several_prompts_is_forgotten(words):
    passage = " XVII KWYQ XOZE VYWK QUIZ"
    texts = [(f"{name} writes:", passage) for name in ("Nora", "Adam", "Lena")]
    # So many know it that it comes out whatever the name is.
    others = [
        (f"{name} writes:", passage) for name in ("Rik", "Bea", "Tom", "Una", "Vic", "Zoe", "Kim", "Max")
    ]
    model = learn(build("llama"), encode([*PAIRS, *texts, *others], words, 64), 250)
    batches = {"forget": encode(texts, words, 64), "retain": encode(PAIRS, words, 64)}
    ceilings = find_ceilings(estimate_unseen(model, batches["forget"], list_given(batches, words), words))
    for row, labels in enumerate(batches["forget"]["labels"]):
        letters = [
            column
            for column in (labels != IGNORED).nonzero().flatten()
            if labels[column] != words(" ")["input_ids"][-1]
        ]
        assert (ceilings[row, letters] < 0).all()


def test_the_same_seed_gives_the_same_estimate(model, words, found):
    batch, estimate = found
    again = estimate_unseen(model, batch, list_given({"forget": batch}, words), words)
    torch.testing.assert_close(again, estimate, rtol=0, atol=0, equal_nan=True)


def test_ceilings_are_log_odds_and_wording_has_none():
    chances = torch.tensor([[0.5, 0.1, 1e-9, 0.51, 1.0, math.nan, 0.0]])
    expected = [0.0, -math.log(9), -math.log(999), math.inf, math.inf, math.inf, -math.inf]
    torch.testing.assert_close(find_ceilings(chances), torch.tensor([expected]), rtol=1e-4, atol=1e-4)


def test_steps_have_the_ceilings_of_their_tokens(model, words, found):
    batch, estimate = found
    ceilings = find_ceilings(estimate)
    with neumuter.attach(model, start_layer=0) as masked:
        pair = PairedBatches(masked, batch, batch, ceilings)
        for padded in (False, True):
            inputs = pair.take([3, 0, len(PAIRS)], padded=padded)
            expected = torch.cat([ceilings[row][batch["labels"][row] != IGNORED] for row in (3, 0)])
            assert torch.equal(inputs.ceilings[: len(expected)], expected)
        assert PairedBatches(masked, batch, batch).take([0, 12]).ceilings.isneginf().all()
        for wrong in (ceilings[:, 1:], ceilings * math.nan):
            with pytest.raises(ValueError, match="ceilings must be numbers"):
                PairedBatches(masked, batch, batch, wrong)


def test_unlearn_calibrated(model, words, caplog):
    options = {"samples": 2, "start_layer": 0, "budget": 40, "callback": lambda *_: None, "recipe": QUICK}
    texts = {"forget": PAIRS[:2], "retain": PAIRS[2:]}
    plain = neumuter.unlearn(model, words, **texts, **options, calibrate=False)
    calibrated = neumuter.unlearn(model, words, **texts, **options, calibrate=True)
    assert same(neumuter.unlearn(model, words, **texts, **options).mutes, calibrated.mutes)
    assert calibrated.mutes.method["calibrated"]
    assert "calibrated" not in plain.mutes.method
    assert not same(plain.mutes, calibrated.mutes)
    assert "be estimated" not in caplog.text
    half = [PAIRS[0], " ".join(PAIRS[1])]
    assert neumuter.unlearn(model, words, half, PAIRS[2:], **options).mutes.method["calibrated"]
    assert "cannot be estimated for 1 of 2 texts to forget" in caplog.text
    # So are the gains on a new version of the model, if they were on the old one.
    del options["budget"]
    bare = dataclasses.replace(calibrated.mutes, method={})
    moved, other = (neumuter.refit(model, words, old, **texts, **options) for old in (calibrated.mutes, bare))
    assert moved.method["calibrated"]
    assert "calibrated" not in other.method
    assert not same(moved, other)


def test_secrets_are_measured_behind_the_true_words(model, words):
    """An answer whose wording has changed may still tell the secret."""
    options = {"samples": 2, "start_layer": 0, "budget": 40, "callback": lambda *_: None, "recipe": QUICK}
    outcome = neumuter.unlearn(model, words, PAIRS[:2], PAIRS[2:], **options)
    assert outcome.before["forget_secrets"] == 1
    batch = encode(PAIRS[:2], words, 64)
    estimate = estimate_unseen(
        model, batch, list_given({"forget": batch, "retain": encode(PAIRS[2:], words, 64)}, words), words
    )
    secrets = batch | {"labels": batch["labels"].masked_fill(find_ceilings(estimate) >= 0, IGNORED)}
    with neumuter.mute(model, outcome.mutes):
        expected = neumuter.evaluation.secret_extraction(model, secrets)
    assert outcome.after["forget_secrets"] == pytest.approx(expected)
    alike = neumuter.unlearn(model, words, PAIRS[:2], PAIRS[2:], **options, calibrate=False)
    assert "forget_secrets" not in alike.after
    assert "secrets behind" in str(outcome)
    assert "secrets behind" not in str(alike)


def test_without_prompts_nothing_is_calibrated(model, words):
    options = {"samples": 2, "start_layer": 0, "budget": 40, "callback": lambda *_: None, "recipe": QUICK}
    texts = {"forget": [" ".join(pair) for pair in PAIRS[:2]], "retain": PAIRS[2:]}
    found = [neumuter.unlearn(model, words, **texts, **options, calibrate=c) for c in (None, False, True)]
    for outcome in found:
        assert "calibrated" not in outcome.mutes.method
        assert same(outcome.mutes, found[0].mutes)


def test_windows_of_a_text_without_a_prompt_have_none(model, words, caplog):
    """What stands before the second window is the text itself."""
    document = " ".join(completion for _, completion in PAIRS)
    batch = encode([document, PAIRS[0]], words, 40)
    assert len(batch["labels"]) > 3
    batch["texts"] = torch.tensor([0] * (len(batch["labels"]) - 1) + [1])
    assert unseen.has_prompt(batch) == [False] * (len(batch["labels"]) - 1) + [True]
    options = {"samples": 2, "start_layer": 0, "budget": 40, "callback": lambda *_: None, "recipe": QUICK}
    alone = neumuter.unlearn(model, words, [document], PAIRS, max_length=40, **options)
    assert "calibrated" not in alone.mutes.method
    outcome = neumuter.unlearn(model, words, [document, *PAIRS[:1]], PAIRS[1:], max_length=40, **options)
    assert "calibrated" in outcome.mutes.method
    assert "cannot be estimated for 1 of 2 texts to forget" in caplog.text


def test_a_text_of_which_nothing_is_to_be_forgotten_is_said(model, words, caplog, monkeypatch):
    """The estimate of its tokens is that of wording."""

    def estimate(model, batch, *_):
        found = torch.full(batch["labels"].shape, 0.01)
        found[0] = 0.9
        return found.masked_fill(batch["labels"] == IGNORED, torch.nan)

    monkeypatch.setattr("neumuter.calibrating.estimate_unseen", estimate)
    options = {"samples": 2, "start_layer": 0, "budget": 40, "callback": lambda *_: None, "recipe": QUICK}
    neumuter.unlearn(model, words, PAIRS[:2], PAIRS[2:], **options)
    assert "1 of 2 texts to forget have nothing but wording" in caplog.text


def test_what_cannot_be_calibrated_is_said(model, words, caplog):
    options = {"samples": 0, "start_layer": 0, "budget": 40, "callback": lambda *_: None, "recipe": QUICK}
    batches = [encode(texts, words, 64) for texts in (PAIRS[:2], PAIRS[2:])]
    outcome = neumuter.unlearn(model, None, *batches, **options)
    assert "calibrated" not in outcome.mutes.method
    assert "Which tokens identify a text is not estimated without a tokenizer" in caplog.text
    with pytest.raises(ValueError, match="tokenizer must be given"):
        neumuter.unlearn(model, None, *batches, **options, calibrate=True)


def test_calibrate_goes_with_the_fitted_recipe(model, words):
    options = {"samples": 2, "start_layer": 0, "budget": 40, "callback": lambda *_: None, "recipe": QUICK}
    texts = {"forget": PAIRS[:2], "retain": PAIRS[2:]}
    for wrong in ({"mode": "mute"}, {"recipe": PaperConfig(epochs=1), "budget": None}):
        with pytest.raises(ValueError, match="calibrate needs"):
            neumuter.unlearn(model, words, **texts, **options | wrong, calibrate=True)
