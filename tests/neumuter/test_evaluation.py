"""Each metric against a hand-computed example, or against its definition written out."""

import math

import pytest
import torch

from neumuter import evaluation
from neumuter.evaluation import tofu
from neumuter.evaluation.others import STRETCH
from neumuter.evaluation.passes import find_hits
from neumuter.texts import encode_forms
from neumuter.types import IGNORED
from tests import models


@pytest.fixture(scope="module")
def model():
    return models.build("llama")


def with_labels(ids, prompt):
    labels = ids.clone()
    labels[:, :prompt] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def generated(model, prompts, new):
    return model.generate(prompts, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)


class Scripted(torch.nn.Module):
    """A model whose next token after a prefix is looked up: {prefix: token}, else 0."""

    device = torch.device("cpu")

    def __init__(self, script, vocabulary=10):
        super().__init__()
        self.script, self.vocabulary = script, vocabulary

    def forward(self, input_ids, attention_mask, use_cache):
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for row, (ids, shown) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            for t in range(len(ids)):
                prefix = tuple(i for i, s in zip(ids[: t + 1], shown[: t + 1], strict=True) if s)
                logits[row, t, self.script.get(prefix, 0)] = 1.0
        return type("Output", (), {"logits": logits})

    def generate(self, input_ids, attention_mask, max_new_tokens, **_):
        ids, shown = input_ids, attention_mask
        for _ in range(max_new_tokens):
            new = self.forward(ids, shown, False).logits[:, -1].argmax(-1, keepdim=True)
            ids, shown = torch.cat([ids, new], 1), torch.cat([shown, torch.ones_like(new)], 1)
        return ids


def test_the_rest_of_a_long_text_is_no_whole_completion():
    """It can be a full stop, which many answers have."""
    words = models.tokenizer()
    for limit, label in ((12, None), (64, "retain 1")):
        asked, kept = (
            evaluation.list_given({name: encode_forms([text], words, limit)[0]}, words)
            for name, text in (("forget", ("Ada,", " x7")), ("retain", ("A lantern", " costs 12.40.")))
        )
        given = [*asked, *kept]
        assert (len(given) > 2) == (label is None)
        said = given[-1].pieces[-1]
        assert len(said) < STRETCH or label
        (other,) = evaluation.find_others(asked, [said], given, words)
        assert (other and other.label) == label


# --- Memory ----------------------------------------------------------------------------------


def test_a_sample_is_extracted_exactly_if_generation_reproduces_it(model):
    ids = generated(model, models.batch(samples=4, tokens=5), 6)
    changed = ids.clone()
    changed[1, -1] = (changed[1, -1] + 1) % models.VOCABULARY
    changed[2, 5] = (changed[2, 5] + 1) % models.VOCABULARY
    assert evaluation.extracted(model, with_labels(ids, 5)).tolist() == [True] * 4
    assert evaluation.extracted(model, with_labels(changed, 5)).tolist() == [True, False, False, True]
    assert evaluation.extraction_rate(model, with_labels(changed, 5)) == 0.5


def test_a_sample_without_counted_tokens_is_not_extracted(model):
    batch = with_labels(models.batch(samples=2, tokens=5), prompt=5)
    assert evaluation.extraction_rate(model, batch) == 0


def test_memorization_accuracy_is_the_mean_over_samples(model):
    ids = generated(model, models.batch(samples=2, tokens=4), 4)
    batch = with_labels(ids, 4)
    batch["labels"][0, 4:6] = (ids[0, 4:6] + 1) % models.VOCABULARY  # two of four missed
    batch["labels"][1, 5:] = IGNORED  # one of one hit
    assert evaluation.memorization_accuracy(model, batch) == pytest.approx((0.5 + 1.0) / 2)


def test_a_secret_is_a_run_of_counted_tokens_with_the_true_words_before_it(model):
    ids = generated(model, models.batch(samples=3, tokens=4), 6)
    batch = with_labels(ids, 4)
    # Two secrets in each of the first texts, of three tokens and of one, and one of six in the last.
    batch["labels"][:2, 7:9] = IGNORED
    batch["input_ids"][0, 7] = (ids[0, 7] + 1) % models.VOCABULARY
    last = ids.shape[1] - 1
    batch["labels"][0, last] = (ids[0, last] + 1) % models.VOCABULARY
    batch["labels"][2, 6] = (ids[2, 6] + 1) % models.VOCABULARY
    counted, right = find_hits(model, batch)
    hits = [bool(right[row, at].all()) for row, at in ((0, slice(3, 6)), (0, 8), (1, slice(3, 6)), (1, 8))]
    assert hits == [True, False, True, True]
    assert counted[:2].sum() == 8
    assert evaluation.secret_extraction(model, batch) == 3 / 5
    assert evaluation.extraction_rate(model, batch) == pytest.approx(1 / 3)
    assert math.isnan(evaluation.secret_extraction(model, with_labels(ids, 10)))


def test_extraction_strength_by_hand(model):
    ids = generated(model, models.batch(samples=3, tokens=4), 5)
    batch = with_labels(ids, 4)
    batch["labels"][0, 5] = (ids[0, 5] + 1) % models.VOCABULARY  # the second of five: k = 2
    batch["labels"][1, 8] = (ids[1, 8] + 1) % models.VOCABULARY  # the last: k = 5
    assert evaluation.extraction_strength(model, batch) == pytest.approx((3 / 5 + 0 + 1) / 3)


def test_extraction_likelihood_by_hand():
    """n = 2, x = 1 2 3 4 5: after 1 the model goes 2 9 9 9, after 1 2 it goes 9 9 9, after 1 2 3: 4 5."""
    script = {(1,): 2, (1, 2): 9, (1, 2, 9): 9, (1, 2, 9, 9): 9, (1, 2, 3): 4, (1, 2, 3, 4): 5}
    batch = with_labels(torch.tensor([[1, 2, 3, 4, 5]]), 0)
    # Prefix lengths 1, 2, 3: bigrams {29, 99, 99} against {23, 34, 45}: 0; {99, 99}: 0; {45}: 1.
    assert evaluation.extraction_likelihood(Scripted(script), batch, n=2) == pytest.approx(1 / 3)
    script |= {(1, 2, 9): 3, (1, 2, 9, 3): 4}  # after 1: 2 9 3 4, one of three; after 1 2: 9 3 4, one of two
    expected = (1 / 3 + 1 / 2 + 1) / 3
    assert evaluation.extraction_likelihood(Scripted(script), batch, n=2) == pytest.approx(expected)


def by_definition(model, ids, n, first=1):
    total = 0.0
    for i in range(first, len(ids) - n + 1):
        made = generated(model, torch.tensor([ids[:i]]), len(ids) - i)[0, i:].tolist()
        grams = [tuple(made[k : k + n]) for k in range(len(made) - n + 1)]
        true = {tuple(ids[k : k + n]) for k in range(i, len(ids) - n + 1)}
        total += sum(g in true for g in grams) / len(grams)
    return total / (len(ids) - n - first + 1)


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_extraction_likelihood_is_its_definition(name, rows):
    model = models.build(name)
    texts = [
        generated(model, models.batch(1, 3, seed), n)[0].tolist() for seed, n in ((1, 9), (2, 14), (3, 6))
    ]
    for text, place in zip(texts, (5, 8, 4), strict=True):
        text[place] = (text[place] + 1) % models.VOCABULARY
    longest = max(map(len, texts))
    ids = torch.tensor([t + [0] * (longest - len(t)) for t in texts])
    shown = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in texts])
    batch = {"input_ids": ids, "attention_mask": shown, "labels": torch.where(shown.bool(), ids, IGNORED)}
    expected = sum(by_definition(model, text, 3) for text in texts) / 3
    assert 0 < expected < 1
    assert evaluation.extraction_likelihood(model, batch, n=3, rows=rows) == pytest.approx(expected)
    batch["labels"][:, :4] = IGNORED
    expected = sum(by_definition(model, text, 3, first=4) for text in texts) / 3
    found = evaluation.extraction_likelihood(model, batch, n=3, rows=rows, answers=True)
    assert found == pytest.approx(expected)
    batch["labels"][:, :7] = IGNORED
    with pytest.raises(ValueError, match="EL_3 needs answers of 3 tokens or more, got one of 2"):
        evaluation.extraction_likelihood(model, batch, n=3, answers=True)


def test_extraction_likelihood_of_a_text_that_takes_all_positions():
    model = models.build("gpt2", n_positions=20)
    batch = with_labels(models.batch(2, 20), 0)
    batch["attention_mask"][1, 12:] = 0
    rows = [batch["input_ids"][0].tolist(), batch["input_ids"][1, :12].tolist()]
    expected = sum(by_definition(model, ids, 2) for ids in rows) / 2
    assert evaluation.extraction_likelihood(model, batch, n=2) == pytest.approx(expected)


def test_a_text_known_by_heart_is_extracted_without_generating(model, monkeypatch):
    ids = generated(model, models.batch(1, 1), 12)
    monkeypatch.setattr(type(model), "generate", None)
    assert evaluation.extraction_likelihood(model, with_labels(ids, 0), n=4) == 1.0
    with pytest.raises(ValueError, match="more than 13 tokens, got one of 13"):
        evaluation.extraction_likelihood(model, with_labels(ids, 0), n=13)


# --- Language --------------------------------------------------------------------------------


def test_losses_and_perplexity_do_not_depend_on_the_padding_or_on_the_batch_split(model):
    ids = models.batch(samples=5, tokens=6)
    batch = with_labels(ids, 0)
    padded = {
        key: torch.nn.functional.pad(value, (0, 3), value=IGNORED if key == "labels" else 0)
        for key, value in batch.items()
    }
    logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    losses = -logits.gather(-1, ids[:, 1:, None])[:, :, 0]
    expected = losses.mean().item()
    for given in (batch, padded):
        torch.testing.assert_close(
            evaluation.sample_losses(model, given, 2), losses.mean(1).double(), rtol=1e-5, atol=1e-6
        )
        for rows in (1, 2, 32):
            assert evaluation.mean_token_loss(model, given, rows) == pytest.approx(expected, rel=1e-5)
            assert evaluation.perplexity(model, given, rows) == pytest.approx(math.exp(expected), rel=1e-5)


def test_kl_to_the_original(model):
    batch = with_labels(models.batch(samples=3, tokens=6), 2)
    other = models.build("llama", seed=1)
    p, q = (m(batch["input_ids"]).logits[:, 1:-1].log_softmax(-1).double() for m in (other, model))
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert evaluation.kl_to_original(model, other, batch, rows=2) == pytest.approx(expected, rel=1e-4)
    assert evaluation.kl_to_original(model, model, batch) == pytest.approx(0, abs=1e-5)


def test_kl_of_a_muted_model_to_itself_without_mutes(model):
    import neumuter

    batch = with_labels(models.batch(samples=3, tokens=6), 2)
    with neumuter.attach(model) as masked:
        path = next(iter(masked.scores))
        mutes = masked.mute_set({path: ([1, 5], [0.0, 0.0])})
    other = models.build("llama")
    with neumuter.mute(model, mutes) as muted:
        found = evaluation.kl_to_original(model, muted.off, batch)
        assert found == pytest.approx(evaluation.kl_to_original(model, other, batch), rel=1e-4)
        assert found > 1e-5


# --- Membership ------------------------------------------------------------------------------


def test_min_k_by_hand(model):
    ids = models.batch(samples=2, tokens=6)
    batch = with_labels(ids, 0)
    batch["labels"][1, 4:] = IGNORED
    log_p = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[:, :, 0].double()
    lowest = [log_p[0].sort().values[:2].mean(), log_p[1, :3].sort().values[:2].mean()]  # ⌈0.4·5⌉, ⌈0.4·3⌉
    torch.testing.assert_close(
        evaluation.min_k_scores(model, batch), torch.stack(lowest), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        evaluation.min_k_scores(model, batch, 1.0), -evaluation.sample_losses(model, batch)
    )
    with pytest.raises(ValueError, match="k must lie in"):
        evaluation.min_k_scores(model, batch, 0)


def test_auc_by_hand():
    members, others = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0, 0.0])
    assert evaluation.auc(members, others) == pytest.approx((3 + 1 + 0.5) / 6)
    assert evaluation.auc(others + 9, members) == 1.0
    with pytest.raises(ValueError, match="at least one score"):
        evaluation.auc(members, others[:0])


def test_privacy_leakage_by_hand():
    assert evaluation.privacy_leakage(0.5) == 0
    assert evaluation.privacy_leakage(0.9) == pytest.approx(-80)
    assert evaluation.privacy_leakage(0.3, retrained_auc=0.6) == pytest.approx((0.7 - 0.4) / 0.4 * 100)
    assert evaluation.privacy_leakage(0.3, retrained_auc=1.0) == math.inf


# --- TOFU ------------------------------------------------------------------------------------


@pytest.fixture
def answers(monkeypatch):
    table = {"right": 0.5, "said again": 0.7, "wrong 1": 1.5, "wrong 2": 2.5}
    monkeypatch.setattr(
        tofu, "_losses", lambda model, tok, pairs: torch.tensor([table[a] for _, a in pairs]).double()
    )
    return [tofu.Question("q", "right", "said again", ("wrong 1", "wrong 2"))]


def test_tofu_numbers_by_hand(answers):
    right, wrong = math.exp(-0.5), math.exp(-1.5) + math.exp(-2.5)
    assert tofu.probabilities(None, None, answers).item() == pytest.approx(right)
    assert tofu.option_probabilities(None, None, answers).item() == pytest.approx(right / (right + wrong))
    assert tofu.truth_ratios(None, None, answers).item() == pytest.approx(math.exp(-2.0) / math.exp(-0.7))
    assert tofu.model_utility([0.5, 1.0]) == pytest.approx(2 / 3)
    assert tofu.model_utility([0.5, 0.0]) == 0
    with pytest.raises(ValueError, match="the same number of wrong answers"):
        tofu.truth_ratios(None, None, [*answers, tofu.Question("q", "right", "right", ())])


def test_tofu_losses_are_of_the_answer_alone():
    model, tokenizer = models.build("llama"), models.tokenizer()
    question = tofu.Question("Who?", "Ada", "Ada", ())
    prompt = tokenizer("Question: Who?\nAnswer:")["input_ids"]
    answer = tokenizer(" Ada", add_special_tokens=False)["input_ids"]
    logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    mean = sum(logits[len(prompt) - 1 + k, token].item() for k, token in enumerate(answer)) / len(answer)
    assert tofu.probabilities(model, tokenizer, [question]).item() == pytest.approx(math.exp(mean), rel=1e-4)


def test_an_answer_longer_than_a_window_has_one_probability(monkeypatch):
    model, tokenizer = models.build("llama"), models.tokenizer()
    questions = [tofu.Question("Who?", "Ada of the long name", "", ()), tofu.Question("Who?", "Bo", "", ())]
    whole = tofu.probabilities(model, tokenizer, questions)
    monkeypatch.setattr(tofu, "MAX_LENGTH", 27)
    found = tofu.probabilities(model, tokenizer, questions)
    assert found.shape == (2,)
    assert found[1] == pytest.approx(whole[1].item())
    assert found[0] != whole[0]
    assert found[0] == pytest.approx(whole[0].item(), rel=0.5)


def test_rouge_recall_is_of_the_greedy_answer(monkeypatch):
    pytest.importorskip("rouge_score")
    model, tokenizer = models.build("llama"), models.tokenizer()
    monkeypatch.setattr(tofu, "MAX_NEW_TOKENS", 12)
    prompts = torch.tensor([tokenizer("Question: Who?\nAnswer:")["input_ids"]])
    text = tokenizer.decode(generated(model, prompts, 12)[0, prompts.shape[1] :], skip_special_tokens=True)
    monkeypatch.setattr(type(tokenizer), "batch_decode", lambda self, ids, **_: ["a running dog"] * len(ids))
    found = tofu.rouge_recalls(model, tokenizer, [tofu.Question("Who?", "the dogs run away", "", ())])
    assert found.tolist() == [0.25]  # stems: run dog; the longest common subsequence has one of four words
    assert isinstance(text, str)


def test_forget_quality():
    pytest.importorskip("scipy")
    ratios = torch.linspace(0, 1, 40)
    assert tofu.forget_quality(ratios, ratios) == 1.0
    assert tofu.forget_quality(ratios, ratios + 2) < 1e-10


def test_reading_questions(tmp_path):
    file = tmp_path / "forget.json"
    file.write_text(
        '{"question": "q", "answer": "a", "perturbed_answer": ["b", "c"]}\n\n{"question": "r", "answer": "s"}'
    )
    first, second = tofu.read_questions(file)
    assert first == tofu.Question("q", "a", "a", ("b", "c"))
    assert second.wrong == ()
    assert len(tofu.read_questions(file, limit=1)) == 1
    for text, message in (
        ('{"question": "q"}', "item 1: an object with question and answer"),
        ("[7]", "item 1: an object"),
        ("{}\n{}", "line 1: an object"),
        ('{"question": "q", "answer": 3}', "item 1: questions and answers must be texts"),
        ("", "holds no question"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            tofu.read_questions(file)
