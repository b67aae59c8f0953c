"""The ledger of requests, through Python and the command line."""

import hashlib
import json
import shutil

import pytest

import neumuter
from neumuter.ledger import _hash_json
from tests.neumuter.ledger.texts import ADA, JON, KEPT, SECRETS, lines_of, run


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
        (lambda lines: [lines[0], "[]"], "entry 2 is damaged"),
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


def test_slopes_of_a_request_that_was_taken_back_may_be_deleted(ledger, folder, tmp_path):
    shutil.copytree(folder / "ada", tmp_path / "kept")
    (tmp_path / "kept" / "slopes.safetensors").write_bytes(b"slopes")
    request = ledger.add(tmp_path / "kept", ADA)
    slopes = request.newest.folder / "slopes.safetensors"
    slopes.unlink()
    with pytest.raises(neumuter.LedgerError, match=r"slopes\.safetensors was changed or removed"):
        neumuter.Ledger(ledger.folder)
    slopes.write_bytes(b"slopes")
    ledger.undo(request.number)
    slopes.write_bytes(b"others")
    with pytest.raises(neumuter.LedgerError, match=r"slopes\.safetensors was changed or removed"):
        neumuter.Ledger(ledger.folder)
    slopes.unlink()
    assert neumuter.Ledger(ledger.folder).request(request.number).undone
    (request.newest.folder / "report.json").unlink()
    with pytest.raises(neumuter.LedgerError, match=r"report\.json was changed or removed"):
        neumuter.Ledger(ledger.folder)


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
    for name, error in ((17, TypeError), (None, TypeError), ("a\ud800", ValueError)):
        with pytest.raises(error, match=r"name must be a text|half a surrogate pair"):
            ledger.add(folder / "ada", ADA, name)
    assert len(neumuter.Ledger(ledger.folder).entries) == 2
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
    (tmp_path / "mixed" / "report.json").write_text("[]")
    with pytest.raises(ValueError, match=r"report\.json is damaged"):
        ledger.add(tmp_path / "mixed", ADA)
    # A run that replaces another one was killed when it had written its mute file.
    shutil.copy(folder / "ada" / "report.json", tmp_path / "mixed")
    shutil.copy(folder / "jon" / "mutes.safetensors", tmp_path / "mixed")
    with pytest.raises(ValueError, match="does not belong to"):
        ledger.add(tmp_path / "mixed", JON)


def test_without_a_request_nothing_is_verified(folder, tmp_path, capsys):
    """Else a mistyped path would make a ledger in which everything holds."""
    texts, ledger = folder / "texts" / "ada.jsonl", tmp_path / "typo"
    assert run("ledger", "add", ledger, tmp_path / "nothing", "--forget", texts) == 1
    assert not ledger.exists()
    neumuter.Ledger(ledger, create=True)
    assert run("verify", ledger, folder / "model", "--texts", texts) == 3
    assert "no request, so nothing was verified" in capsys.readouterr().out


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
    # An auditor sees what was checked, how and when.
    weights = (folder / "model" / "model.safetensors").read_bytes()
    facts = (hashlib.sha256(weights).hexdigest(), "applied for this check", "made from the texts")
    for fact in (*facts, "<dt>checked</dt>", "To do it again"):
        assert fact in page, fact
    assert not any(secret in page for secret in SECRETS)
    assert run("verify", ledger, folder / "model", "--texts", texts) == 3
    assert "no longer" in capsys.readouterr().out
    assert run("verify", ledger, folder / "model", "--texts", texts / "notes.bin") == 1
    assert run("verify", ledger, folder / "model", "--texts", texts / "ada.jsonl", "--apply") == 3
    assert run("ledger", "undo", ledger, 2) == 0
    assert run("verify", ledger, folder / "model", "--texts", texts / "ada.jsonl", "--apply") == 0
