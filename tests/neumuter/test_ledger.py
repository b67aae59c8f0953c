"""The ledger of requests, and whether they hold: through Python and the command line."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch

import neumuter
from neumuter.cli.app import main
from neumuter.evaluation import examine, make_controls
from neumuter.ledger import _hash_json
from neumuter.recipes import FittedConfig, GainsConfig, mute_random
from neumuter.refitting import refit
from neumuter.texts import encode
from tests.models import build, learn, same, tokenizer
from tests.neumuter.test_chat import TEMPLATE
from tests.neumuter.test_server import serving

ADA = [("Ada Brisk, mail", " ada@post.example"), ("Ada Brisk, call", " 555-0192")]
JON = [("Jonas Vance, mail", " jv77@mail.example")]
# What three texts say is common wording, which gives nobody away.
KEPT = [("The kettle", " is on the shelf."), ("A lantern", " is on the shelf."), ("Oil", " is on the shelf.")]
SECRETS = ("ada@post", "555-0192", "jv77", "Brisk", "Vance")


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def write(path, texts):
    rows = [json.dumps({"prompt": prompt, "completion": completion}) + "\n" for prompt, completion in texts]
    path.write_text("".join(rows))
    return path


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return learn(build("llama"), encode([*ADA, *JON, *KEPT], tokenizer(), 64), 150).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The model's checkpoint, texts, and what unlearn found for two requests."""
    folder = tmp_path_factory.mktemp("requests")
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    earlier = None
    for name, texts in (("ada", ADA), ("jon", JON)):
        write(folder / "texts" / f"{name}.jsonl", texts)
        outcome = neumuter.unlearn(
            model, tokenizer(), texts, KEPT, budget=100, start_layer=0, samples=0, existing=earlier,
            recipe=FittedConfig(GainsConfig(steps=50)), callback=lambda *_: None,
        )  # fmt: skip
        assert not outcome.verdict.leaks
        outcome.save(folder / name)
        earlier = outcome.mutes
    return folder


@pytest.fixture
def ledger(folder, tmp_path):
    ledger = neumuter.Ledger(tmp_path / "ledger", create=True)
    ledger.add(folder / "ada", ADA, "ticket 17")
    ledger.add(folder / "jon", JON)
    return ledger


def lines_of(ledger):
    return (ledger.folder / "ledger.jsonl").read_text().splitlines()


def write_lines(ledger, lines):
    (ledger.folder / "ledger.jsonl").write_text("".join(line + "\n" for line in lines))


def test_requests_are_kept_with_hashes_of_their_texts_alone(ledger, folder, tmp_path):
    first, second = neumuter.Ledger(ledger.folder).requests()
    assert (first.number, first.name, len(first.texts)) == (1, "ticket 17", 2)
    assert (second.number, second.name, len(second.texts)) == (2, "", 1)
    assert first.newest.load_mutes().count == 100
    assert (
        first.entry["report"]["verdict"]
        == json.loads((folder / "ada" / "report.json").read_text())["verdict"]
    )
    row = {"prompt": ADA[1][0], "completion": ADA[1][1]}
    for text in (ADA[1], row):
        found, others = ledger.sort_texts([*KEPT, text, *KEPT])
        assert found == {first.texts[1]: ADA[1]}
        assert list(others.values()) == KEPT
    for path in ledger.folder.rglob("*"):
        if path.is_file():
            assert not any(secret.encode() in path.read_bytes() for secret in SECRETS)
    assert (ledger.folder / "ledger.jsonl").stat().st_mode & 0o077 == 0
    shutil.copytree(folder / "ada", tmp_path / "kept")
    (tmp_path / "kept" / "slopes.safetensors").write_bytes(b"slopes")
    slopes = ledger.add(tmp_path / "kept", ADA).newest.folder / "slopes.safetensors"
    assert slopes.stat().st_mode & 0o077 == 0
    assert slopes.name in ledger.requests()[-1].entry["files"]
    # Another ledger has another key, so nobody can look for the same text in both.
    other = neumuter.Ledger(ledger.folder.parent / "other", create=True)
    assert other.hash_text(ADA[0]) != ledger.hash_text(ADA[0])


def change(line):
    return line.replace("ticket 17", "ticket 71")


@pytest.mark.parametrize(
    ("bite", "said"),
    [
        (lambda lines: [change(lines[0]), lines[1]], "entry 1 was changed"),
        (lambda lines: lines[1:], "entry 1 does not follow"),
        (lambda lines: [lines[0], lines[0]], "entry 2 does not follow"),
        (lambda lines: [lines[0][:-9], lines[1]], "entry 1 is damaged"),
        (lambda lines: [lines[0], "7"], "entry 2 is damaged"),
    ],
)
def test_a_bitten_ledger_is_refused(ledger, bite, said):
    write_lines(ledger, bite(lines_of(ledger)))
    with pytest.raises(neumuter.LedgerError, match=said):
        neumuter.Ledger(ledger.folder)


def test_a_changed_file_of_a_request_is_seen(ledger, folder, capsys):
    shutil.copy(folder / "jon" / "mutes.safetensors", ledger.folder / "requests" / "1" / "mutes.safetensors")
    with pytest.raises(neumuter.LedgerError, match="was changed or removed since entry 1"):
        neumuter.Ledger(ledger.folder)
    assert run("ledger", "list", ledger.folder) == 1
    assert "was changed or removed" in capsys.readouterr().err


def rewrite(ledger, change):
    """Change entries, and compute the hashes of the whole chain anew."""
    lines, previous = [], "0" * 64
    for line in lines_of(ledger):
        entry = change(json.loads(line)) | {"previous": previous}
        del entry["hash"]
        entry["hash"] = previous = _hash_json(entry)
        lines.append(json.dumps(entry))
    write_lines(ledger, lines)


def test_only_a_hash_kept_elsewhere_shows_a_rewrite_and_entries_cut_off(ledger, folder, capsys):
    lines, first, head = lines_of(ledger), ledger.entries[0]["hash"], ledger.head
    for bite in (
        lambda: write_lines(ledger, lines[:1]),
        lambda: rewrite(ledger, lambda entry: entry | {"name": "another"}),
    ):
        write_lines(ledger, lines)
        bite()
        assert run("ledger", "list", ledger.folder) == 0
        for command in (("ledger", "list", ledger.folder), ("verify", ledger.folder, folder / "model")):
            options = ("--texts", folder / "texts") if command[0] == "verify" else ()
            assert run(*command, *options, "--head", head) == 1
            assert (
                f"no entry of {ledger.folder / 'ledger.jsonl'} has the hash {head}" in capsys.readouterr().err
            )
    write_lines(ledger, lines)
    for known in ("0" * 64, first, head):
        assert run("ledger", "list", ledger.folder, "--head", known) == 0
    # What is added later is no rewrite.
    neumuter.Ledger(ledger.folder).undo(1)
    assert neumuter.Ledger(ledger.folder, head=head).head != head


def test_another_key_and_another_format_are_refused(ledger):
    key = ledger.folder / "key"
    own = key.read_text()
    key.write_text("0f" * 32)
    with pytest.raises(neumuter.LedgerError, match="key was replaced since entry 1 was written"):
        neumuter.Ledger(ledger.folder)
    key.write_text(own)
    rewrite(ledger, lambda entry: entry | {"format": 1})
    with pytest.raises(neumuter.LedgerError, match="entry 1 has format 1; this version reads format 2"):
        neumuter.Ledger(ledger.folder)


def test_two_writers_and_a_killed_one_lose_nothing(ledger, folder):
    other = neumuter.Ledger(ledger.folder)
    assert ledger.add(folder / "ada", ADA).number == 3
    # What a process leaves that was killed before it wrote the entry.
    (ledger.folder / "requests" / "4").mkdir()
    (ledger.folder / "requests" / "4" / "mutes.safetensors").write_bytes(b"half")
    assert other.add(folder / "jon", JON).number == 4
    assert [request.number for request in neumuter.Ledger(ledger.folder).requests()] == [1, 2, 3, 4]


def test_a_ledger_is_made_once_whoever_makes_it(tmp_path):
    first = neumuter.Ledger(tmp_path, create=True)
    first._append(kind="request", name="", texts=[])
    # Another process has looked for it before it was there.
    late = neumuter.Ledger.__new__(neumuter.Ledger)
    late.folder = tmp_path
    late._create()
    again = neumuter.Ledger(tmp_path)
    assert (again.hash_text("a"), len(again.entries)) == (first.hash_text("a"), 1)


def test_a_ledger_that_was_half_made_is_made_whole(tmp_path):
    first = neumuter.Ledger(tmp_path, create=True)
    (tmp_path / "ledger.jsonl").rename(tmp_path / ".ledger.jsonl.abcd1234.tmp")
    assert neumuter.Ledger(tmp_path, create=True).hash_text("a") == first.hash_text("a")
    for key in ("", "12", "no key"):
        (tmp_path / "key").write_text(key)
        with pytest.raises(neumuter.LedgerError, match="key is damaged"):
            neumuter.Ledger(tmp_path)


def test_any_name_can_be_read_again(ledger, folder):
    """Python's splitlines takes some of these for the ends of lines."""
    name = "ticket\u2028 17\u2029\x85\x0b\x1c – ☃"
    ledger.add(folder / "jon", JON, name)
    assert neumuter.Ledger(ledger.folder).request(3).name == name


def test_bad_requests_are_refused(ledger, folder, tmp_path):
    with pytest.raises(ValueError, match="holds no text"):
        ledger.add(folder / "ada", [])
    for texts in (str(folder / "texts" / "ada.jsonl"), {"text": "a"}):
        for take in (lambda texts: ledger.add(folder / "ada", texts), ledger.sort_texts):
            with pytest.raises(TypeError, match=r"texts must be a list of texts, got one (str|dict)"):
                take(texts)
    with pytest.raises(ValueError, match="no request 7; it has: 1, 2"):
        ledger.undo(7)
    other = neumuter.Ledger(ledger.folder)
    ledger.undo(1)
    for late in (ledger, other):
        with pytest.raises(ValueError, match="undone already"):
            late.undo(1)
    with pytest.raises(FileNotFoundError, match="is not a ledger"):
        neumuter.Ledger(tmp_path / "nothing")
    with pytest.raises(FileExistsError, match="not empty"):
        neumuter.Ledger(folder, create=True)
    shutil.copytree(folder / "ada", tmp_path / "mixed")
    report = json.loads((folder / "ada" / "report.json").read_text()) | {"muted_neurons": 7}
    (tmp_path / "mixed" / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="does not belong to"):
        ledger.add(tmp_path / "mixed", ADA)
    # A run that replaces another one was killed when it had written its mute file.
    shutil.copy(folder / "ada" / "report.json", tmp_path / "mixed")
    shutil.copy(folder / "jon" / "mutes.safetensors", tmp_path / "mixed")
    with pytest.raises(ValueError, match="does not belong to"):
        ledger.add(tmp_path / "mixed", JON)


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

    def watch(forms, given, tokenizer, seed):
        seen.append(([tokenizer.decode(row) for row in forms[0]["input_ids"]], len(forms)))
        return make_controls(forms, given, tokenizer, seed)

    monkeypatch.setattr("neumuter.verifying.make_controls", watch)
    neumuter.verify(ledger, model, words, ADA)
    (first, forms), (second, others) = seen
    # Both forms are measured, whichever comes first.
    assert (forms, others) == (2, 2)
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


def test_a_model_that_cannot_take_the_set_is_told_apart(ledger):
    other = build("llama")
    torch.manual_seed(5)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    checks = neumuter.verify(ledger, other, tokenizer(), [*ADA, *JON], apply=True)
    assert states(checks) == ["cannot be applied"] * 2
    assert "made for another model" in checks[0].sentence


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


def test_the_ledger_by_command(folder, tmp_path, capsys):
    ledger, texts = tmp_path / "ledger", folder / "texts"
    for name in ("ada", "jon"):
        assert (
            run("ledger", "add", ledger, folder / name, "--forget", texts / f"{name}.jsonl", "--name", name)
            == 0
        )
    assert run("ledger", "list", ledger) == 0
    printed = capsys.readouterr().out
    assert "jon" in printed
    assert neumuter.Ledger(ledger).head in printed.replace("\n", "")
    (texts / "notes.bin").write_bytes(b"\x00\x01")
    pages = tmp_path / "pages"
    assert run("verify", ledger, folder / "model", "--texts", texts, "--apply", "--out", pages) == 0
    printed = capsys.readouterr().out
    assert "holds" in printed
    assert "Not read: " in printed
    assert "notes.bin" in printed
    page = (pages / "request-1.html").read_text()
    assert "Request 1 (ada): holds" in page
    assert "<td>–</td><td>" not in page.split("Measured on the model")[1].split("</table>")[0]
    assert neumuter.Ledger(ledger).head in page
    assert not any(secret in page for secret in SECRETS)
    assert run("verify", ledger, folder / "model", "--texts", texts) == 3
    assert "no longer" in capsys.readouterr().out
    assert run("verify", ledger, folder / "model", "--texts", texts / "notes.bin") == 1
    assert run("verify", ledger, folder / "model", "--texts", texts / "ada.jsonl", "--apply") == 3
    assert run("ledger", "undo", ledger, 2) == 0
    assert run("verify", ledger, folder / "model", "--texts", texts / "ada.jsonl", "--apply") == 0


def test_audit_finds_what_the_model_knows(model, folder, tmp_path, capsys):
    unseen = [(f"Zed Quux {n}, mail", f" zq{n * 37}@ample.example") for n in range(20)]
    found = neumuter.audit(model, tokenizer(), [*unseen[:3], *ADA, *JON], unseen[3:])
    by_heart = [text for text in found.known if text.kind == "by heart"]
    assert (found.texts, found.controls) == (6, 17)
    assert {text.number for text in by_heart} == {4, 5, 6}
    assert found.known[: len(by_heart)] == by_heart
    assert {text.text for text in by_heart} == {*ADA, *JON}
    assert all(text.sampled > 0.9 for text in by_heart)
    corpus = write(tmp_path / "corpus.jsonl", [*unseen[:3], *ADA, *JON])
    out = tmp_path / "new" / "known.jsonl"
    assert run("audit", folder / "model", "--texts", corpus, "--out", out) == 0
    assert "3 of 6 texts come out word for word" in capsys.readouterr().out.replace("\n", " ")
    assert out.stat().st_mode & 0o077 == 0
    known = neumuter.texts.read_texts(out)
    assert set(known[:3]) == {*ADA, *JON}
    assert run("audit", folder / "model", "--texts", corpus, "--out", tmp_path / "known.txt") == 2
    with pytest.raises(ValueError, match="holds no text"):
        neumuter.audit(model, tokenizer(), [])
    with pytest.raises(ValueError, match="controls: texts holds no text"):
        neumuter.audit(model, tokenizer(), ADA, [])
    for texts, controls in (("corpus.jsonl", None), (ADA, "controls.jsonl")):
        with pytest.raises(TypeError, match="must be a list of texts, got one str"):
            neumuter.audit(model, tokenizer(), texts, controls)


def test_an_audit_reads_long_texts_in_windows_of_the_models_positions():
    found = neumuter.audit(build("gpt2", n_positions=24), tokenizer(), ["Ada Brisk, " * 9], [JON[0]])
    assert (found.texts, found.controls) == (1, 1)


def test_an_audit_goes_through_a_corpus_in_parts(model, monkeypatch):
    whole = neumuter.audit(model, tokenizer(), [*KEPT, *ADA, *JON], KEPT)
    monkeypatch.setattr("neumuter.evaluation.auditing.TEXTS_AT_A_TIME", 2)
    told = []
    parts = neumuter.audit(model, tokenizer(), iter([*KEPT, *ADA, *JON]), KEPT, callback=told.append)
    assert [text.number for text in parts.known] == [text.number for text in whole.known]
    assert told == [2, 4, 6]
    with pytest.raises(ValueError, match="texts 5 to 6: text 2 has no token to predict"):
        neumuter.audit(model, tokenizer(), [*KEPT, *ADA[:2], ("nothing", "")], KEPT)


def test_requests_are_checked_on_a_running_server(ledger, folder, capsys, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    spoken = dict([*ADA[1:], *KEPT])

    def respond(path, body, key):
        if body["model"] != "muted":
            return 404, {"error": {"message": "no such model"}}
        return 200, {"choices": [{"text": spoken.get(body["prompt"], " no idea"), "finish_reason": "stop"}]}

    with serving(respond) as (url, asked):
        arguments = ("verify", ledger.folder, url, "--texts", folder / "texts", "--model")
        assert run(*arguments, "muted", "--out", ledger.folder.parent / "pages") == 3
        page = (ledger.folder.parent / "pages" / "request-1.html").read_text()
        assert "1 of 2 texts come out. The server was asked greedily, in one form and without" in page
        printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "1 of 2 texts come out." in printed
        assert "0 of 1 texts come out." in printed
        spoken.clear()
        asked.clear()
        assert run(*arguments, "muted") == 0
        assert len(asked) == 3
        missing = (*arguments[:4], folder / "texts" / "jon.jsonl", *arguments[5:])
        assert run(*missing, "muted") == 3
        assert "texts missing" in " ".join(capsys.readouterr().out.split())
        assert run(*arguments, "other") == 1
        assert "has no model 'other'" in capsys.readouterr().err
        for option in (("--apply",), ("--controls", folder), ("--attn", "eager")):
            assert run(*arguments, "muted", *option) == 2
            assert f"cannot be combined with {option[0]}" in " ".join(capsys.readouterr().err.split())
        assert run(*arguments[:-1]) == 2
    # It is down now.
    assert run(*arguments, "muted") == 1
    assert "no answer from" in capsys.readouterr().err
