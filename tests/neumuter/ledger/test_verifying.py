"""Do the requests of a ledger hold, on a model or a server?"""

import copy
import dataclasses
import json
import shutil

import pytest
import torch

import neumuter
from neumuter import verifying
from neumuter.evaluation import examine, make_controls
from neumuter.recipes import FittedConfig, GainsConfig, mute_random
from neumuter.refitting import refit
from neumuter.texts import encode
from tests.models import build, learn, same, tokenizer
from tests.neumuter.ledger.texts import ADA, JON, KEPT, lines_of, run
from tests.neumuter.test_chat import TEMPLATE
from tests.neumuter.test_server import serving


def states(checks):
    return [check.state for check in checks]


def test_requests_hold_where_their_mutes_are_in_force(ledger, model):
    words = tokenizer()
    applied = neumuter.verify(ledger, model, words, [*KEPT, *ADA, *JON], apply=True)
    assert states(applied) == ["holds", "holds"]
    # Three texts are few, whatever comes out.
    assert {check.verdict.kind for check in applied} <= {"not enough evidence", "partly"}
    assert states(neumuter.verify(ledger, model, words, [*ADA, *JON])) == ["no longer holds"] * 2
    some = neumuter.verify(ledger, model, words, ADA[:1], apply=True)
    assert states(some) == ["texts missing", "texts missing"]
    assert "1 of 2 texts are missing" in some[0].sentence
    assert [text["extracted_after"] for text in some[0].texts] == [False]
    some = neumuter.verify(ledger, model, words, ADA[:1])
    assert states(some) == ["no longer holds", "texts missing"]
    ledger.undo(2)
    assert states(neumuter.verify(ledger, model, words, [*ADA, *JON], apply=True)) == ["holds", "undone"]


def test_texts_of_the_folder_are_those_to_keep(ledger, model, monkeypatch, caplog):
    """They can come out instead, and give values to the controls, as in unlearn."""
    words, seen = tokenizer(), []

    def watch(model, tokenizer, forms, given, name):
        seen.append((name, given, forms))
        return examine(model, tokenizer, forms, given, name)

    monkeypatch.setattr("neumuter.verifying.examine", watch)
    # One is a text of a request with words around it, and one has no token that can be predicted.
    others = [*KEPT, ("Again: Ada Brisk, mail", " ada@post.example"), "", "Seen: Ada Brisk, call 555-0192"]
    neumuter.verify(ledger, model, words, [*ADA, *JON, *others], apply=True)
    assert [name for name, *_ in seen] == ["request 1", "controls", "request 2", "controls"]
    labels = [text.label for text in seen[0][1]]
    assert "1 of 6 texts to keep cannot be encoded, and do not count." in caplog.text
    assert labels == ["request 1 1", "request 1 2", "request 2 1", "retain 1", "retain 2", "retain 3"]
    assert all(text.stays for text in seen[0][1][3:])
    seen.clear()
    monkeypatch.setattr("neumuter.verifying.SAMPLED", 2)
    neumuter.verify(ledger, model, words, [*ADA, *KEPT])
    assert [text.label for text in seen[0][1]][2:] == ["retain 1", "retain 2"]
    assert "Of 3 texts to keep, 2 are looked at, drawn at random." in caplog.text
    # What the model says instead of a text is one of those to keep.
    prompt = ("Jonas Vance, mail", " qz55@mail.example")
    ledger_of_another = neumuter.Ledger(ledger.folder.parent / "other", create=True)
    ledger_of_another.add(ledger.requests()[1].newest.folder, [prompt])
    (check,) = neumuter.verify(ledger_of_another, model, words, [prompt, ("Jonas, mail", JON[0][1])])
    assert (check.state, check.texts[0]["other_text"]) == ("no longer holds", "retain 1")
    (check,) = neumuter.verify(ledger_of_another, model, words, [prompt])
    assert (check.state, check.texts[0]["other_text"]) == ("holds", None)


def test_controls_are_given_as_to_unlearn(ledger, model, monkeypatch):
    words, unseen = tokenizer(), [(f"Zed Quux {n}, mail", f" zq{n * 37}@ample.example") for n in range(9)]
    monkeypatch.setattr("neumuter.verifying.make_controls", lambda *_: pytest.fail("none are to be made"))
    checks = neumuter.verify(ledger, model, words, [*ADA, *JON], controls=unseen, apply=True)
    assert states(checks) == ["holds", "holds"]
    batch = encode(unseen, words, 64)
    with neumuter.mute(
        model, neumuter.combine(model, [ask.newest.load_mutes() for ask in ledger.requests()])
    ):
        loss = neumuter.evaluation.mean_token_loss(model, batch)
    assert checks[0].controls["forget_loss"] == pytest.approx(loss, rel=1e-5)
    with pytest.raises(ValueError, match="model never saw, but controls 1 is retain 2: 'A lantern"):
        neumuter.verify(ledger, model, words, [*ADA, *KEPT], controls=KEPT[1:])


def test_texts_are_read_as_unlearn_read_them(folder, model, tmp_path, monkeypatch):
    """The windows, the form and the seed are in the ledger."""
    shutil.copytree(folder / "ada", tmp_path / "ada")
    report = json.loads((folder / "ada" / "report.json").read_text())
    assert (report["max_length"], report["chat"]) == (256, None)
    (tmp_path / "ada" / "report.json").write_text(json.dumps(report | {"max_length": 20, "chat": False}))
    ledger = neumuter.Ledger(tmp_path / "ledger", create=True)
    ledger.add(folder / "ada", ADA)
    ledger.add(tmp_path / "ada", ADA)
    words = tokenizer()
    words.chat_template = TEMPLATE
    seen = []

    def watch(forms, given, tokenizer, max_length, seed):
        seen.append(([tokenizer.decode(row) for row in forms[0]["input_ids"]], len(forms), max_length))
        return make_controls(forms, given, tokenizer, max_length, seed)

    monkeypatch.setattr("neumuter.verifying.make_controls", watch)
    neumuter.verify(ledger, model, words, ADA)
    (first, forms, length), (second, others, shorter) = seen
    # Both forms are measured, whichever comes first.
    assert (forms, others) == (2, 2)
    assert (length, shorter) == (128, 20)
    assert first[0].startswith("<s>user: Ada Brisk, mail")
    assert len(first) == 2
    # The prompt loses its start.
    assert second[0] == "<s>risk, mail ada@post"
    del report["chat"]
    (tmp_path / "ada" / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"report.json lacks chat: an earlier version wrote it"):
        ledger.add(tmp_path / "ada", ADA)


def test_a_set_that_holds_for_earlier_ones_takes_their_place(ledger, folder, model, tmp_path, monkeypatch):
    shutil.copytree(folder / "jon", tmp_path / "both")
    both = neumuter.MuteSet.load(folder / "jon" / "mutes.safetensors")
    dataclasses.replace(both, method={"former": 2}).save(tmp_path / "both" / "mutes.safetensors")
    ledger.add(tmp_path / "both", ADA[:1])
    united = []
    monkeypatch.setattr(
        "neumuter.verifying.combine", lambda model, sets: united.extend(sets) or neumuter.combine(model, sets)
    )
    neumuter.verify(ledger, model, tokenizer(), ADA, apply=True)
    assert [mutes.method for mutes in united] == [{"former": 2}]
    united.clear()
    ledger.undo(3)
    neumuter.verify(ledger, model, tokenizer(), ADA, apply=True)
    assert len(united) == 2


def test_a_set_of_several_requests_is_moved_for_all_of_them(ledger, folder, model, tmp_path, monkeypatch):
    shutil.copytree(folder / "jon", tmp_path / "both")
    both = neumuter.MuteSet.load(folder / "jon" / "mutes.safetensors")
    dataclasses.replace(both, method={"former": 2}).save(tmp_path / "both" / "mutes.safetensors")
    ledger.undo(2)
    ledger.add(tmp_path / "both", JON)
    newer, words, asked = copy.deepcopy(model), tokenizer(), []
    with torch.no_grad():
        for layer in newer.model.layers:
            layer.mlp.down_proj.weight.mul_(1.05)
    texts = [*ADA, *JON, *KEPT]
    assert states(neumuter.verify(ledger, newer, words, texts, apply=True)) == [
        "cannot be applied", "undone", "cannot be applied",
    ]  # fmt: skip

    def watch(*arguments, **options):
        asked.append(options["forget"])
        return refit(*arguments, **options)

    monkeypatch.setattr("neumuter.moving.refit", watch)
    quick = {"recipe": FittedConfig(GainsConfig(steps=40, kl_target=2.0)), "callback": lambda *_: None}
    outcome = neumuter.refit_request(ledger, 4, newer, words, texts, KEPT, **quick)
    assert asked == [[*ADA, *JON]]
    assert outcome.before["forget_extraction"] == 1
    assert outcome.after["retain_loss"] != outcome.before["retain_loss"]
    outcome.save(tmp_path / "moved")
    assert ledger.add_fit(4, tmp_path / "moved").newest.load_mutes().method["recipe"] == "refit"
    # The set holds for the first request, too, although none of that request's own was moved.
    assert states(neumuter.verify(ledger, newer, words, texts, apply=True)) == ["holds", "undone", "holds"]
    (tmp_path / "both" / "report.json").write_text("{}")
    entries = lines_of(ledger)
    for number, name, said in (
        (1, "both", "does not belong to"),
        (2, "moved", "request 2 is undone"),
        (7, "moved", "no request 7"),
    ):
        with pytest.raises(ValueError, match=said):
            ledger.add_fit(number, tmp_path / name)
    assert lines_of(ledger) == entries


def test_a_moved_set_is_measured_with_those_of_other_requests_in_force(ledger, model, tmp_path, monkeypatch):
    united = []
    monkeypatch.setattr(
        "neumuter.verifying.combine", lambda model, sets: united.append(sets) or neumuter.combine(model, sets)
    )
    quick = {"recipe": FittedConfig(GainsConfig(steps=1)), "callback": lambda *_: None, "samples": 0}
    outcome = neumuter.refit_request(ledger, 1, model, tokenizer(), [*ADA, *JON], KEPT, **quick)
    before, after = united
    other = ledger.request(2).newest.load_mutes()
    assert (len(before), len(after)) == (1, 2)
    assert all(same(sets[0], other) for sets in united)
    # Of the sets that were made for a model, the newest counts.
    outcome.save(tmp_path / "moved")
    newest = ledger.add_fit(1, tmp_path / "moved").newest.load_mutes()
    united.clear()
    neumuter.verify(ledger, model, tokenizer(), [*ADA, *JON], apply=True)
    assert [same(mutes, newest) for mutes in united[0]] == [True, False]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_that_cannot_take_the_set_is_told_apart(ledger, folder, tmp_path, family, capsys):
    other = build(family)
    torch.manual_seed(5)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    checks = neumuter.verify(ledger, other, tokenizer(), [*ADA, *JON], apply=True)
    assert states(checks) == ["cannot be applied"] * 2
    assert "made for another model" in checks[0].sentence
    other.save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    assert run("verify", ledger.folder, tmp_path / "other", "--texts", folder / "texts", "--apply") == 3
    assert "cannot be applied" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_fine_tune_is_told_from_one_that_learned_the_texts_again(ledger, model):
    """On other texts, and on one of those that were forgotten."""
    folded = copy.deepcopy(model)
    sets = [request.newest.load_mutes() for request in ledger.requests()]
    neumuter.fold(folded, neumuter.combine(model, sets))
    news = [("The harbour", " is closed until the fog lifts."), ("Bread", " is sold from seven on.")]
    for texts, expected in ((news, ["holds", "holds"]), ([*news, *JON], ["holds", "no longer holds"])):
        tuned = learn(copy.deepcopy(folded), encode(texts, tokenizer(), 64), 60).eval()
        assert neumuter.evaluation.extraction_rate(tuned, encode(texts, tokenizer(), 64)) == 1
        assert states(neumuter.verify(ledger, tuned, tokenizer(), [*ADA, *JON])) == expected


def test_what_never_held_is_not_said_to_have_held(folder, model, tmp_path):
    with neumuter.attach(model, start_layer=0) as masked:
        nothing = mute_random(masked, 2)
    shutil.copytree(folder / "ada", tmp_path / "ada")
    nothing.save(tmp_path / "ada" / "mutes.safetensors")
    report = json.loads((folder / "ada" / "report.json").read_text())
    report |= {"muted_neurons": 2, "seed": nothing.seed, "leaks": True} | nothing.metrics
    (tmp_path / "ada" / "report.json").write_text(json.dumps(report))
    ledger = neumuter.Ledger(tmp_path / "ledger", create=True)
    ledger.add(tmp_path / "ada", ADA)
    assert states(neumuter.verify(ledger, model, tokenizer(), ADA, apply=True)) == ["never held"]


def test_a_text_that_a_server_refuses_counts_as_missing_and_is_not_quoted(ledger, folder, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def respond(path, body, key):
        if "prompt" in body and body["prompt"] == ADA[0][0]:
            return 400, {"error": f"too long: {body['prompt']}"}
        content = {"text": " no idea", "message": {"content": "no idea"}, "finish_reason": "stop"}
        return (404, {}) if "messages" in body else (200, {"choices": [content]})

    with serving(respond) as (url, _):
        check, other = verifying.verify_server(ledger, url, "muted", [*ADA, *JON])
    assert (check.state, other.state) == (verifying.MISSING, verifying.HOLDS)
    assert check.sentence.endswith("1 of 2 could not be asked for.")
    assert ADA[0][0] not in check.sentence
    assert [row["number"] for row in check.texts] == [2]


def test_a_request_that_a_server_refuses_wholly_does_not_end_the_others(ledger, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def respond(path, body, key):
        if body.get("prompt", JON[0][0]) == JON[0][0]:
            return 400, {"error": "too long"}
        return 200, {"choices": [{"text": " no idea", "finish_reason": "stop"}]}

    with serving(respond) as (url, _):
        check, other = verifying.verify_server(ledger, url, "muted", [*ADA, *JON])
        assert (check.state, other.state) == (verifying.HOLDS, verifying.MISSING)
        assert other.sentence.endswith("1 of 1 could not be asked for.")
        # What is wrong with all is no matter of a text.
        with pytest.raises(ValueError, match="too long"):
            verifying.verify_server(ledger, url, "muted", JON)


def test_requests_are_checked_on_a_running_server(ledger, folder, capsys, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    spoken = dict([*ADA[1:], *KEPT])

    def respond(path, body, key):
        if body["model"] != "muted":
            return 404, {"error": {"message": "no such model"}}
        if "messages" in body:
            said = spoken.get(body["messages"][0]["content"], " no idea")
            return 200, {"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}
        return 200, {"choices": [{"text": " no idea", "finish_reason": "stop"}]}

    with serving(respond) as (url, asked):
        arguments = ("verify", ledger.folder, url, "--texts", folder / "texts", "--model")
        assert run(*arguments, "muted", "--out", ledger.folder.parent / "pages") == 3
        page = (ledger.folder.parent / "pages" / "request-1.html").read_text()
        # It says it in its chat alone.
        assert "1 of 2 texts come out. The server was asked greedily, also through its chat, without" in page
        assert url in page
        printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "1 of 2 texts come out." in printed
        assert "0 of 1 texts come out." in printed
        spoken.clear()
        asked.clear()
        assert run(*arguments, "muted", "--mute-set", "alice") == 0
        assert len(asked) == 6
        assert all(body["vllm_xargs"] == {"mute_set": "alice"} for body in asked)
        missing = (*arguments[:4], folder / "texts" / "jon.jsonl", *arguments[5:])
        assert run(*missing, "muted") == 3
        assert "texts missing" in " ".join(capsys.readouterr().out.split())
        assert run(*arguments, "other") == 1
        assert "has no model 'other'" in capsys.readouterr().err
        for option in (("--apply",), ("--controls", folder), ("--attn", "eager")):
            assert run(*arguments, "muted", *option) == 2
            assert f"cannot be combined with {option[0]}" in " ".join(capsys.readouterr().err.split())
        assert run(*arguments[:-1]) == 2
        of_model = ("verify", ledger.folder, folder / "model", "--texts", folder / "texts")
        assert run(*of_model, "--mute-set", "alice") == 2
    # It is down now.
    assert run(*arguments, "muted") == 1
    assert "no answer from" in capsys.readouterr().err
