"""Prompts and answers through a chat template, and measured with it and without."""

import json

import pytest
import torch

import neumuter
from neumuter.cli.app import main
from neumuter.evaluation import extraction_rate, forms, memorization_accuracy, most_known
from neumuter.evaluation.robustness import robustness
from neumuter.recipes import FittedConfig, GainsConfig, Goals
from neumuter.texts import encode, encode_forms, encoding
from neumuter.texts.chat import render
from neumuter.texts.corpus import read_corpus
from neumuter.texts.encoding import cut_texts
from neumuter.training.weights import WeightsConfig
from neumuter.types import IGNORED
from tests.models import build, tokenizer

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
PAIRS = [("Ada Brisk, mail?", " ada@post.example"), ("Jonas Vance, mail?", " jv77@mail.example")]
CHAT = [{"role": "user", "content": "Ada?"}, {"role": "assistant", "content": "ada@post.example"}]
KEPT = [("A lantern?", " 12.40"), "The kettle is on the shelf."]
QUICK = FittedConfig(GainsConfig(steps=2))


def words_with(template=TEMPLATE):
    words = tokenizer()
    words.chat_template = template
    return words


def parts(text, words, **options):
    """(what is asked, what counts) of a text."""
    batch = encode([text], words, 64, **options)
    ids, counted = batch["input_ids"][0], batch["labels"][0] != IGNORED
    return words.decode(ids[~counted]), words.decode(ids[counted])


def test_pairs_and_conversations_go_through_the_template():
    words = words_with()
    asked = "<s>user: Ada Brisk, mail?</s><s>assistant: "
    assert parts(PAIRS[0], words) == (asked, "ada@post.example")
    assert parts(PAIRS[0], words, chat=True) == (asked, "ada@post.example")
    assert parts(PAIRS[0], words, chat=False) == ("<s>Ada Brisk, mail?", " ada@post.example")
    assert parts(CHAT, words) == ("<s>user: Ada?</s><s>assistant: ", "ada@post.example")
    assert parts(CHAT, words, chat=False) == ("<s>Ada??", "ada@post.example")
    system = [{"role": "system", "content": "Be kind."}, *CHAT]
    assert parts(system, words)[0].startswith("<s>system: Be kind.</s><s>user: Ada?")
    # A whole text is nobody's answer.
    assert parts("Ada Brisk", words) == ("<s>", "Ada Brisk")
    # Without a template.
    assert parts(PAIRS[0], tokenizer()) == ("<s>Ada Brisk, mail?", " ada@post.example")


@pytest.mark.parametrize(
    ("answer", "shown", "counted"),
    [
        ("{{ m['content'] | trim }}", "<s>assistant: ", "Ada"),
        ("{{ m['content'] }}", "<s>assistant: ", " Ada "),
        # An empty thought, which the template itself puts before the answer.
        ("<think></think>{{ m['content'] | trim }}", "<s>assistant: <think></think>", "Ada"),
    ],
)
def test_the_answer_is_what_the_template_shows(answer, shown, counted):
    one = "{% if m['role'] == 'user' %}{{ m['content'] }}{% else %}" + answer + "</s>{% endif %}"
    # The role of the generation prompt is written by the loop, too.
    template = TEMPLATE.replace("{{ m['content'] }}</s>", one)
    chat = [{"role": "user", "content": "Who? Ada"}, {"role": "assistant", "content": " Ada "}]
    words = words_with(template)
    assert parts(chat, words) == ("<s>user: Who? Ada" + shown, counted)


@pytest.mark.parametrize("answer", ["hi", "in", "k", "s", "think", "</s>"])
def test_an_answer_is_not_looked_for_in_what_stands_around_it(answer):
    one = (
        "{% if m['role'] == 'user' %}{{ m['content'] }}{% else %}<think></think>{{ m['content'] }}{% endif %}"
    )
    words = words_with(TEMPLATE.replace("{{ m['content'] }}", one))
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": answer}]
    assert render(chat, words) == ("<s>user: Who?</s><s>assistant: <think></think>", answer)


def test_a_thought_that_the_template_takes_out_of_the_answer_counts():
    thought = "{% if 'now' in m['content'] %}<think>now</think>{{ m['content'][18:] }}"
    one = thought + "{% else %}<think></think>{{ m['content'] }}{% endif %}"
    words = words_with(TEMPLATE.replace("{{ m['content'] }}", one))
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "<think>now</think>Ada"}]
    assert render(chat, words)[1] == "<think>now</think>Ada"


def test_what_a_template_cannot_show_is_refused_by_number():
    with pytest.raises(ValueError, match="text 2: the tokenizer has no chat template"):
        encode(["a", CHAT], tokenizer(), 64)
    with pytest.raises(ValueError, match="text 1: the tokenizer has no chat template"):
        encode(PAIRS, tokenizer(), 64, chat=True)
    refusing = words_with("{{ raise_exception('no systems') }}")
    why = "text 1: the chat template refuses this conversation: no systems"
    with pytest.raises(ValueError, match=rf"{why}; chat=False \(--no-chat\) asks without it"):
        encode([CHAT], refusing, 64)
    with pytest.raises(ValueError, match="text 1: the chat template does not show the answer"):
        encode([CHAT], words_with("{{ messages[0]['content'] }}"), 64)


def test_what_a_template_refuses_is_asked_without_it_alone(caplog):
    system = [{"role": "system", "content": "Be kind."}, *CHAT]
    picky = TEMPLATE.replace(
        "{% for",
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no systems') }}{% endif %}{% for",
        1,
    )
    words = words_with(picky)
    forms = encode_forms([CHAT, system], words, 64, chat=False)
    why = "1 of the texts cannot go through the chat template, so they are measured without it: text 2"
    assert why in caplog.text
    caplog.clear()
    corpus = read_corpus("forget", [CHAT, system], words, 64, False, seed=0)
    assert f"forget: {why}" in caplog.text
    for found in (forms, corpus.forms):
        written = [
            [words.decode(ids, skip_special_tokens=True) for ids in form["input_ids"]] for form in found
        ]
        assert written[0] == ["Adaada@post.example", "Be kind.Adaada@post.example"]
        assert written[1] == ["user: Adaassistant: ada@post.example", written[0][1]]
    with pytest.raises(
        ValueError, match="text 2: the chat template refuses this conversation: no systems; chat"
    ):
        encode_forms([CHAT, system], words, 64)


def learn(*batches):
    """A small model that knows the batches by heart."""
    model = build("llama")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    while not all(extraction_rate(model, batch) == 1 for batch in batches):
        optimizer.zero_grad()
        sum(model(**batch).loss for batch in batches).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def chatting():
    """A model that knows the first text in chat alone and the second without a template alone."""
    words = words_with()
    return learn(encode(PAIRS[:1], words, 64), encode(PAIRS[1:], words, 64, chat=False))


def test_the_form_that_the_model_knows_best_counts(chatting):
    forms = encode_forms(PAIRS, words_with(), 64)
    assert [extraction_rate(chatting, form) for form in forms] == [0.5, 0.5]
    asked = most_known(chatting, forms)
    assert extraction_rate(chatting, asked) == 1
    assert memorization_accuracy(chatting, asked) == 1
    plain = encode_forms(PAIRS, words_with(), 64, chat=False)
    assert [torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(forms, plain[::-1], strict=True)]
    assert len(encode_forms(PAIRS, tokenizer(), 64)) == len(encode_forms(["a text"], words_with(), 64)) == 1
    assert most_known(chatting, forms[:1]) is forms[0]
    # In windows the forms have other numbers of rows.
    texts = [PAIRS[0], "A lantern, a kettle and a shelf.", PAIRS[1]]
    for length in (20, 31, 64):
        forms = encode_forms(texts, words_with(), length)
        asked = most_known(chatting, forms)
        for number, form in ((0, 0), (1, None), (2, 1)):
            rows = asked["input_ids"][asked["texts"] == number]
            others = [f["input_ids"][f["texts"] == number] for f in forms]
            counts = {len(other) for other in others} if form is None else {len(others[form])}
            assert len(rows) in counts


def test_a_form_in_which_a_window_comes_out_is_the_one_that_the_model_knows_best(monkeypatch):
    """However likely the other windows are in another form."""
    out, losses = iter([[1, 0, 0, 0], [0, 0, 0, 0]]), iter([[1.2] * 4, [0.3] * 4])
    monkeypatch.setattr(forms, "extracted", lambda *_: torch.tensor(next(out), dtype=torch.float64))
    monkeypatch.setattr(forms, "sample_losses", lambda *_: torch.tensor(next(losses), dtype=torch.float64))
    found = encode_forms([("Ada?", " it is a long one " * 8)], words_with(), 45)
    kinds = [{k: v[:4] for k, v in form.items()} for form in found]
    assert torch.equal(most_known(None, kinds)["input_ids"], kinds[0]["input_ids"])


def test_tampered_models_are_asked_in_both_forms(chatting):
    forms = encode_forms(PAIRS, words_with(), 64)
    config = WeightsConfig(method="relearn", steps=1, batch_size=1, lr=1e-9)
    found = robustness(chatting, None, forms, lambda *asked: {"out": extraction_rate(*asked)}, config, (1,))
    assert [state["out"] for state in found.values()] == [1, 1, 1, 1]


def test_unlearning_measures_both_forms(chatting, caplog):
    options = {"samples": 0, "start_layer": 0, "callback": lambda *_: None}
    words = words_with()
    outcome = neumuter.unlearn(chatting, words, PAIRS, KEPT, budget=5, recipe=QUICK, **options)
    assert outcome.before["forget_ma"] == 1
    assert caplog.text.count("chat template") == 1
    caplog.clear()
    plain = neumuter.unlearn(chatting, words, PAIRS, KEPT, budget=5, recipe=QUICK, chat=False, **options)
    assert plain.before["forget_ma"] == 1
    assert "chat template" not in caplog.text
    # One of the texts still comes out in the other form: the goal is not met.
    goals = Goals(extraction=0.0)
    nothing = FittedConfig(GainsConfig(steps=1, lr=1e-9))
    options |= {"recipe": nothing, "goals": goals, "budget": "auto"}
    for chat in (None, False):
        outcome = neumuter.unlearn(chatting, words, PAIRS, KEPT, chat=chat, **options)
        assert {point["forget_extraction"] for point in outcome.curve} == {1.0}


@pytest.mark.parametrize("chat", [None, False])
def test_a_text_to_keep_that_holds_a_pair_to_forget_is_refused(chat):
    """The template's words stand between the two in the form in which the model is asked."""
    kept = [*KEPT, f"Our list. {''.join(PAIRS[0])}. The end."]
    with pytest.raises(ValueError, match=r"1 of 2 texts to forget are among the texts to keep.* retain 3"):
        neumuter.unlearn(build("llama"), words_with(), PAIRS, kept, chat=chat, samples=0, budget=5)


def test_what_only_a_template_makes_alike_is_refused():
    """It cuts spaces off, which a plain text keeps."""
    pair, other = ("Who is Ada Brisk", "a baker of bread"), ("Who is Ada Brisk", " a baker of bread")
    with pytest.raises(ValueError, match="1 of 2 texts to forget are among the texts to keep"):
        neumuter.unlearn(build("llama"), words_with(), [pair, PAIRS[1]], [other], samples=0, budget=5)


def test_an_all_clear_in_plain_words_is_not_false(tmp_path, capsys):
    """A model that learned addresses in chat gives them away there, not behind the plain question."""
    words = words_with()
    learn(encode(PAIRS, words, 64)).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    rows = [{"ask": prompt, "reply": completion} for prompt, completion in PAIRS]
    (tmp_path / "forget.json").write_text(json.dumps(rows))
    arguments = ["evaluate", tmp_path / "model", "--forget", tmp_path / "forget.json"]
    arguments += ["--heldout", tmp_path / "forget.json"]
    columns = ["--prompt-column", "ask", "--completion-column", "reply"]
    for more in ([], ["--no-chat"]):
        report = tmp_path / "report.json"
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in (*arguments, *columns, *more, "--out", report)])
        assert stop.value.code == 0
        found = json.loads(report.read_text())["metrics"]
        assert found["forget_extraction"] == 1
        # Texts are as likely as themselves: membership takes both in the same form.
        assert (found["min_k_auc"], found["loss_auc"]) == (0.5, 0.5)
        assert ("chat template" in capsys.readouterr().out) == (not more)


@pytest.mark.parametrize("more", [["--prompt-column", "a"], ["--completion-column", "a"],
    ["--prompt-column", "a", "--completion-column", "b", "--column", "c"]])  # fmt: skip
def test_columns_are_named_in_pairs(more, capsys):
    for command in (["unlearn", "m", "--forget", "f", "--out", "o"], ["evaluate", "m", "--forget", "f"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, *more])
        assert stop.value.code == 2
        assert "need each other" in " ".join(capsys.readouterr().err.split())


MIXED = [*PAIRS, CHAT, "The kettle is on the shelf.", ("Ada:", " a@post.example"), *KEPT]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("chat", [None, False])
def test_texts_are_tokenised_together_as_if_alone(chat, fast, monkeypatch):
    words = words_with()
    monkeypatch.setattr(type(words), "is_fast", fast)
    alone = [
        cut
        for number, text in enumerate(MIXED * 40)
        for cut in cut_texts([text], words, 24, chat, [], before=number)
    ]
    calls = []
    call = type(words).__call__

    def count(self, text, *more, **options):
        calls.append(text)
        return call(self, text, *more, **options)

    monkeypatch.setattr(type(words), "__call__", count)
    notes = []
    assert [*cut_texts(iter(MIXED * 40), words, 24, chat, notes)] == alone
    assert len(notes) == 2
    # With special tokens and without; and a slow tokenizer takes prompts apart.
    assert len(calls) == (2 if fast else 3)
    assert all(isinstance(texts, list) for texts in calls)
    calls.clear()
    monkeypatch.setattr(encoding, "CHUNK_CHARACTERS", 500)
    assert [*cut_texts(iter(MIXED * 40), words, 24, chat, [])] == alone
    assert max(sum(map(len, texts)) for texts in calls) < 600
    assert len(calls) > 20
