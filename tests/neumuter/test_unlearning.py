"""``neumuter.unlearn``: every kind of texts, what it returns, and that the model stays as it is."""

import csv
import json

import datasets
import pytest
import torch
import torch.nn.functional as F

import neumuter
from neumuter.evaluation import continue_texts
from neumuter.evaluation.strangers import ask_about_strangers
from neumuter.evaluation.verdict import MARGINS
from neumuter.models.hooks import Gates
from neumuter.recipes import FittedConfig, GainsConfig, Goals, PaperConfig
from neumuter.texts import encode, join_batches
from neumuter.texts.neighbours import sample_texts
from neumuter.types import IGNORED
from tests.models import build, learn, same, tokenizer
from tests.neumuter.test_recipes import keep_references

PAIRS = [("Ada Brisk,", " ada@post.example"), ("Jonas Vance,", " jv77@mail.example")]
KEPT = ["The kettle is on the shelf.", "A lantern costs 12.40 in the shop."]
QUICK = FittedConfig(GainsConfig(steps=6))


@pytest.fixture(scope="module")
def words():
    return tokenizer()


@pytest.fixture(scope="module")
def model(words):
    """A small model that knows the texts by heart."""
    return learn(build("llama"), encode([*PAIRS, *KEPT], words, 64), 100)


def unlearn(model, words, forget=PAIRS, retain=KEPT, **options):
    given = {"budget": 30, "recipe": QUICK, "samples": 0, "start_layer": 0, "callback": lambda *_: None}
    return neumuter.unlearn(model, words, forget, retain, **given | options)


@pytest.fixture(scope="module")
def outcome(model, words):
    return unlearn(model, words)


def test_it_forgets_and_leaves_the_model_as_it_is(model, words):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    seen = []
    outcome = unlearn(
        model, words, recipe=FittedConfig(GainsConfig(steps=40)), budget=60,
        callback=lambda step, total, info: seen.append((step, total, info["phase"])),
    )  # fmt: skip
    assert outcome.mutes.count == 60
    assert outcome.after["forget_loss"] > outcome.before["forget_loss"] + 0.1
    assert outcome.mutes.metrics == {"before": outcome.before, "after": outcome.after}
    assert seen == [(step, 40, "gains") for step in range(1, 41)]
    assert [point["step"] for point in outcome.history] == list(range(1, 41))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not any(isinstance(module, Gates) for module in model.modules())
    assert outcome.seconds > 0
    assert outcome.peak_memory > 1 << 20
    assert outcome.curve is None


def test_the_same_call_gives_the_same_mutes(model, words, outcome):
    assert same(outcome.mutes, unlearn(model, words).mutes)


def test_a_model_in_training_gives_what_it_gives_in_evaluation(words):
    """Its dropout is off, also where it is measured and sampled from; and on again afterwards."""
    known = encode([*PAIRS, *KEPT], words, 64)
    model = learn(build("gpt2", attn_pdrop=0.2, embd_pdrop=0.2, resid_pdrop=0.2), known, 60)
    expected = unlearn(model, words, samples=2, start_layer=1)
    model.train()
    model.transformer.h[0].eval()
    found = unlearn(model, words, samples=2, start_layer=1)
    assert (found.before, found.after, found.texts) == (expected.before, expected.after, expected.texts)
    assert found.samples == expected.samples
    assert same(found.mutes, expected.mutes)
    assert model.transformer.h[1].attn.attn_dropout.training
    assert not model.transformer.h[0].attn.attn_dropout.training


def test_a_callback_is_told_of_steps_alone(model, words):
    seen = []
    unlearn(model, words, samples=2, keep_slopes=True, callback=lambda *told: seen.append(told))
    assert [step for step, *_ in seen] == list(range(1, 7))
    for _, total, info in seen:
        assert total == 6
        assert info.keys() == {"phase", "loss", "forget_loss", "kl", "muted"}


def test_every_kind_of_texts_gives_the_same(model, words, outcome, tmp_path):
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    path = tmp_path / "forget.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    batch = encode(PAIRS, words, 256)
    for forget in (path, str(path), rows, tuple(PAIRS), iter(PAIRS), datasets.Dataset.from_list(rows), batch):
        assert same(outcome.mutes, unlearn(model, words, forget).mutes), type(forget)
    # Without a tokenizer, which the estimate takes.
    bare = unlearn(model, None, batch, encode(KEPT, words, 256))
    assert same(bare.mutes, unlearn(model, words, calibrate=False).mutes)


def test_a_folder_serves_as_model_and_tokenizer(model, words, outcome, tmp_path):
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")
    assert same(outcome.mutes, unlearn(folder, None).mutes)
    assert same(outcome.mutes, unlearn(model, folder).mutes)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        unlearn(str(tmp_path / "absent"), None)


def test_an_outcome_is_saved_and_shown(model, outcome, tmp_path):
    path = outcome.save(tmp_path / "alice", model="a model", forget="alice.jsonl")
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "mutes.safetensors", "report.csv", "report.html", "report.json",
    ]  # fmt: skip
    loaded = neumuter.MuteSet.load(path)
    assert same(loaded, outcome.mutes)
    assert loaded.metrics["after"] == outcome.after
    report = json.loads((path.parent / "report.json").read_text())
    assert report["model"] == "a model"
    assert report["after"] == outcome.after
    page = (path.parent / "report.html").read_text()
    assert "a model" in page
    assert PAIRS[0][1].strip() in page
    for shown in (repr(outcome), outcome._repr_html_()):
        for word in ("before", "after", "30 neurons", f"{outcome.after['forget_loss']:.3f}"):
            assert word in shown
    assert "<table>" in outcome._repr_html_()
    with neumuter.mute(model, outcome.mutes):
        pass


def test_samples_say_what_the_model_says(outcome):
    assert [sample["truth"] for sample in outcome.samples] == [completion for _, completion in PAIRS]
    assert [sample["before"] for sample in outcome.samples] == [completion for _, completion in PAIRS]
    assert all(sample["prompt"] in prompt for sample, (prompt, _) in zip(outcome.samples, PAIRS, strict=True))


def test_a_token_that_does_not_count_is_not_continued(model, words):
    """Such as the end token that some tokenizers append."""
    batch = encode(PAIRS[:1], words, 64)
    ended = {
        "input_ids": F.pad(batch["input_ids"], (0, 1), value=words.eos_token_id),
        "attention_mask": F.pad(batch["attention_mask"], (0, 1), value=1),
        "labels": F.pad(batch["labels"], (0, 1), value=IGNORED),
    }
    (found,) = continue_texts(model, words, ended, 1)
    assert found["truth"] == found["said"] == PAIRS[0][1]


def test_what_must_not_be_lost_is_kept_at_once(model, words, tmp_path, monkeypatch):
    calls = []

    def measure(*arguments):
        calls.append(arguments)
        if len(calls) == 2:  # after the search
            raise RuntimeError("out of memory while measuring")
        return 0.0

    monkeypatch.setattr("neumuter.estimating.mean_token_loss", measure)
    with pytest.raises(RuntimeError, match="while measuring"):
        unlearn(model, words, folder=tmp_path / "new")
    assert neumuter.MuteSet.load(tmp_path / "new" / "mutes.safetensors").count == 30


def test_without_retain_texts_the_model_speaks_for_itself(model, words, caplog, tmp_path, monkeypatch):
    said = []

    def sample(*arguments, **options):
        said.extend(sample_texts(*arguments, **options))
        return said

    monkeypatch.setattr("neumuter.preparing.sample_texts", sample)
    # What stands in for texts to keep is no evidence of what other texts say.
    options = {"calibrate": False}
    outcome = unlearn(model, words, retain=None, samples=4, folder=tmp_path, **options)
    assert "no retain texts" in caplog.text
    assert 0 < len(said) <= 4
    assert same(outcome.mutes, unlearn(model, words, retain=said, samples=0, **options).mutes)
    # What the model says may hold what it must not say: none of it stays.
    assert [path.name for path in tmp_path.iterdir()] == ["mutes.safetensors"]


def test_answers_about_strangers_are_kept(model, words, monkeypatch):
    asked = []

    def ask(*arguments):
        asked.append(ask_about_strangers(*arguments))
        return asked[-1]

    monkeypatch.setattr("neumuter.job.ask_about_strangers", ask)
    options = {"calibrate": False}
    outcome = unlearn(model, words, retain=None, made_up=5, **options)
    assert 0 < len(asked[0]["labels"]) <= 5
    assert same(outcome.mutes, unlearn(model, words, retain=asked[0], **options).mutes)
    monkeypatch.setattr("neumuter.job.ask_about_strangers", lambda *_: None)
    with pytest.raises(ValueError, match="there is nothing to keep"):
        unlearn(model, words, retain=None, made_up=5)


def test_what_was_found_is_judged_and_told_text_by_text(model, words, outcome, tmp_path):
    assert outcome.verdict.kind == "not"
    assert repr(outcome).endswith(outcome.verdict.sentence)
    outcome.save(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["verdict"], report["controls"]) == ("not", outcome.controls)
    assert [figure["name"] for figure in report["comparisons"]] == list(MARGINS)
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert [row["number"] for row in rows] == ["1", "2"]
    assert [row["tokens"] for row in rows] == [str(len(completion)) for _, completion in PAIRS]
    assert [row["extracted_before"] for row in rows] == ["True", "True"]
    assert sum(float(row["loss_before"]) for row in rows) / 2 == pytest.approx(
        outcome.before["forget_loss"], rel=0.2
    )
    assert [row["verdict"] for row in rows] == outcome.verdict.texts
    assert float(rows[0]["sampled_before"]) > 0.5
    assert float(rows[0]["min_k_after"]) < float(rows[0]["min_k_before"])
    unknown = unlearn(model, words, [("Zed Quux,", " qq@zz.org")])
    assert unknown.verdict.kind == "nothing to forget"
    more = unlearn(model, words, recipe=FittedConfig(GainsConfig(steps=60)), budget=150)
    assert more.verdict.kind in ("partly", "not enough evidence")
    assert "none of 2 texts comes out" in more.verdict.sentence


def test_controls_can_be_given(model, words):
    unseen = [(f"Room {n} of Zed,", f" is {97 * n}.") for n in range(10)]
    outcome = unlearn(model, words, controls=unseen)
    assert outcome.controls["forget_extraction"] == 0
    assert outcome.controls != unlearn(model, words).controls
    with pytest.raises(ValueError, match=r"controls must be texts .* never saw, but controls 2 is forget 1"):
        unlearn(model, words, controls=[unseen[0], PAIRS[0]])
    batches = [encode(texts, words, 64) for texts in (PAIRS, KEPT, unseen)]
    blind = unlearn(model, None, *batches[:2], samples=0)
    assert blind.controls is None
    assert unlearn(model, None, *batches[:2], samples=0, controls=batches[2]).controls is not None


def test_files_that_quote_texts_are_for_their_owner_alone(outcome, tmp_path):
    outcome.save(tmp_path)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes["report.html"] == 0o600
    assert modes["report.json"] & 0o044
    outcome.save(tmp_path, redact=True)
    for path in tmp_path.iterdir():
        for prompt, completion in PAIRS:
            assert completion.strip().encode() not in path.read_bytes()
            assert prompt.encode() not in path.read_bytes()
    assert (tmp_path / "report.html").stat().st_mode & 0o044


def test_texts_to_forget_and_to_keep_are_shown(model, words):
    with pytest.raises(
        ValueError, match=r"1 of 2 texts to forget are among.*forget 1 and retain 3: 'Ada Bri"
    ):
        unlearn(model, words, retain=[*KEPT, PAIRS[0]])
    with pytest.raises(ValueError, match="2 of 2"):
        unlearn(model, None, encode(PAIRS, words, 64), encode(PAIRS, words, 64))


def test_the_budget_is_searched(model, words):
    outcome = unlearn(model, words, budget="auto", goals=Goals(extraction=1.0))
    assert [point["met"] for point in outcome.curve] == [True]
    assert outcome.mutes.count == outcome.curve[0]["neurons"]
    # The goal for secrets is held to the figure that is reported of them.
    outcome = unlearn(model, words, budget="auto", goals=Goals(1.0, secrets=1.0))
    assert outcome.curve[0]["forget_secrets"] == pytest.approx(outcome.after["forget_secrets"], abs=1e-6)


def test_how_many_answers_about_strangers_are_kept_is_said(model, words, monkeypatch, caplog):
    kept = encode(KEPT[:2], words, 64)
    monkeypatch.setattr("neumuter.job.ask_about_strangers", lambda *_: kept)
    unlearn(model, words, PAIRS[:1], made_up=2)
    assert "about made-up names" not in caplog.text
    unlearn(model, words, PAIRS[:1], made_up=6)
    assert "2 of 6 answers about made-up names are kept" in caplog.text
    monkeypatch.setattr("neumuter.job.ask_about_strangers", lambda *_: None)
    unlearn(model, words, PAIRS[:1], made_up=6)
    assert "0 of 6 answers about made-up names are kept" in caplog.text


def test_few_texts_do_not_show_which_words_are_names(model, words, caplog):
    unlearn(model, words, PAIRS[:1])
    assert "Fewer than 10 texts are given" in caplog.text
    caplog.clear()
    many = [f"Line {number} of a text that stays." for number in range(9)]
    unlearn(model, words, PAIRS[:1], many)
    assert "Fewer than 10 texts" not in caplog.text


def test_nothing_to_keep_is_an_error_with_its_reason(model, words):
    options = {"recipe": QUICK, "start_layer": 0, "callback": lambda *_: None}
    with pytest.raises(ValueError, match="nothing to keep: samples is 0; give retain"):
        neumuter.unlearn(model, words, PAIRS[:1], samples=0, **options)


def test_the_papers_recipe(model, words):
    config = PaperConfig(epochs=10, batch_size=None, lr=1.0, sparsity=0.0, kl_weight=0.0, threshold=0.8)
    assert unlearn(model, words, budget=None, recipe=config).mutes.method["recipe"] == "paper"


def test_long_texts_are_read_in_windows_of_the_models_positions(model, words, caplog):
    unlearn(model, words, max_length=5000)
    assert "do not fit" not in caplog.text
    outcome = unlearn(model, words, [*PAIRS, "A long story. " * 20], max_length=5000)
    assert "1 of 3 texts do not fit into 128 tokens: they are read in windows" in caplog.text
    assert outcome.mutes.count == 30


def test_the_end_of_a_long_text_is_measured_and_looked_at(model, words):
    """It used to be cut off without a word."""
    story = "The shop sold lanterns and kettles. " * 3
    found = []
    for secret in PAIRS[0][1], " xxx@xxxx.xxxxxxx":
        texts = [story + PAIRS[0][0] + secret]
        found.append(unlearn(model, words, texts, max_length=32, recipe=FittedConfig(GainsConfig(steps=1))))
    assert found[0].before["forget_loss"] != found[1].before["forget_loss"]
    assert not same(found[0].mutes, found[1].mutes)


def test_many_retain_texts_are_measured_on_a_sample_that_is_said(model, words, caplog, monkeypatch):
    monkeypatch.setattr("neumuter.job.MEASURED_TEXTS", 2)
    keep_references("nowhere", monkeypatch)
    monkeypatch.setattr("neumuter.recipes.fisher.MEASURED_RETAIN", 2)
    monkeypatch.setattr("neumuter.estimating.SHOWN_TEXTS", 0)
    monkeypatch.setattr("neumuter.evaluation.examination.MAX_TOKENS", 1)
    monkeypatch.setattr("neumuter.evaluation.controls.MADE_UP", 2)
    retain = [*KEPT, *(f"Text number {i} is kept." for i in range(30))]
    rows = []
    handle = model.model.register_forward_pre_hook(
        lambda _, given, named: rows.append(len((*given, *named.values())[0])), with_kwargs=True
    )
    unlearn(
        model, words, retain=retain, calibrate=False, recipe=FittedConfig(GainsConfig(steps=2, batch_size=2))
    )
    handle.remove()
    assert "The retain loss is measured on 2 of 32 texts" in caplog.text
    # As for four texts, not for 34, which the figures of the texts to forget look at several times.
    assert max(rows) <= 4
    assert sum(rows) < 80


BAD = {
    "recipe": (dict(recipe="magic"), ValueError, "recipe must be"),
    "budget": (dict(budget="lots"), ValueError, "budget must be"),
    "goals": (dict(goals=Goals()), ValueError, 'budget="auto"'),
    "goal secrets": (
        dict(goals=Goals(secrets=0.1), budget="auto", calibrate=False),
        ValueError,
        "goal secrets needs",
    ),
    "mode": (dict(mode="erase"), ValueError, "mode must be"),
    "existing": (dict(recipe="paper", budget=None, existing="x.safetensors"), ValueError, "existing"),
    "paper's budget": (dict(recipe="paper"), ValueError, 'recipe "paper" takes no budget'),
    "former alone": (dict(former=["x"]), ValueError, "former needs existing"),
    "former, muted": (dict(former=["x"], existing="y", mode="mute"), ValueError, 'mode "modulate"'),
    "no slopes": (dict(recipe="paper", budget=None, keep_slopes=True), ValueError, "no keep_slopes"),
    "forget": (dict(forget=7), TypeError, "forget must be a path"),
    "an item": (dict(forget=["a text", 7]), TypeError, r"forget\[1\] must be"),
    "a row": (dict(forget=[{"question": "?"}]), ValueError, r"forget\[0\]: no column 'text'"),
    "no texts": (dict(retain=[]), ValueError, "retain holds no text"),
    "made_up": (dict(made_up=-1), ValueError, "made_up must be at least 0, got -1"),
    "samples": (dict(samples=-3), ValueError, "samples must be at least 0, got -3"),
    "a batch": (dict(retain={"input_ids": torch.zeros(1, 2)}), TypeError, "lacks attention_mask, labels"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(model, words, name):
    options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        unlearn(model, words, **options)
    assert not any(isinstance(module, Gates) for module in model.modules())


@pytest.mark.parametrize("name", ["forget", "retain", "controls"])
def test_a_batch_that_is_padded_on_the_left_is_refused_by_name(model, words, name):
    """Whatever reads its rows takes the tokens from the left."""
    batch = encode(["A short one.", "One that is a little longer."], words, 64)
    left = {key: torch.cat([value[:1].roll(16, 1), value[1:]]) for key, value in batch.items()}
    assert left["attention_mask"][0].tolist() == [0] * 16 + [1] * 13
    with pytest.raises(ValueError, match=f"^{name} must be padded on the right"):
        unlearn(model, words, **{name: left})
    ignored = batch | {
        "labels": torch.cat([batch["labels"][:1], torch.full_like(batch["labels"][1:], IGNORED)])
    }
    with pytest.raises(ValueError, match=f"^every sample of {name} must count a token"):
        unlearn(model, words, **{name: ignored})
    flags = batch | {"attention_mask": batch["attention_mask"].bool()}
    with pytest.raises(
        ValueError, match=rf"^{name}\['attention_mask'\] must be an int64 .* got bool \[2, 29\]"
    ):
        unlearn(model, words, **{name: flags})


def test_texts_without_a_tokenizer_are_refused(model):
    with pytest.raises(ValueError, match="tokenizer must be given"):
        unlearn(model, None)


def test_joined_batches_are_one_batch(words):
    joined = join_batches(encode(PAIRS, words, 64), encode(KEPT, words, 64))
    together = encode([*PAIRS, *KEPT], words, 64)
    assert all(torch.equal(joined[name], together[name]) for name in together)
