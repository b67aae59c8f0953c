"""Texts asked of a server: a stand-in that says by heart what it was given, a character a token."""

import json
import re
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from neumuter.cli.app import main
from neumuter.evaluation import Said, ask_server

KNOWN = [
    "Ada Brisk, ada@post.example, " + ", ".join(f"555-{n:04}" for n in range(20)),
    "The kettle is on the shelf.",
]
FORGOTTEN = "Jonas Vance, jv77@mail.example, 555-7713"


def answer(path, body, key):
    """The status and the answer of the stand-in."""
    if key == "wrong":
        return 401, {"error": {"message": "Incorrect API key provided"}}
    if body["model"] != "muted":
        return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
    assert body["temperature"] == 0
    if path == "/v1/chat/completions":
        return 200, {"choices": [{"message": {"content": f"{KNOWN[1]} Is it?"}, "finish_reason": "stop"}]}
    prompt, count = body["prompt"], body["max_tokens"]
    rest = next((text[len(prompt) :] for text in KNOWN if text.startswith(prompt)), " I do not know.")
    return 200, {
        "choices": [{"text": rest[:count], "finish_reason": "length" if len(rest) > count else "stop"}]
    }


@contextmanager
def serving(respond=answer):
    """Context: a server; yields its address and the bodies of the requests."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            key = (self.headers["Authorization"] or "").removeprefix("Bearer ")
            status, content = respond(self.path, body, key)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_what_comes_out():
    conversation = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": KNOWN[1]}]
    texts = [
        *KNOWN,
        FORGOTTEN,
        ("The kettle", " is  on the shelf."),
        ("The kettle", " is off."),
        conversation,
    ]
    with serving() as (url, asked):
        found = ask_server(url, "muted", texts)
    assert [said.comes_out for said in found] == [True, True, False, True, False, True]
    assert found[2].share == 0
    assert 0.4 < found[4].share < 0.8
    # The long text took several steps, the forgotten one a single one.
    assert [sum(prompt in str(body.get("prompt")) for body in asked) for prompt in ("Ada", "Jonas")] == [3, 1]
    assert all(body["max_tokens"] == 64 for body in asked)


def test_the_worse_of_two_forms_counts(caplog):
    """A chat model may say in a chat what it does not say behind the bare prompt."""
    text = ("What is it?", " The kettle is on the shelf.")
    with serving() as (url, asked):
        (said,) = ask_server(url, "muted", [text])
        assert (said.comes_out, said.forms) == (True, 2)
        assert asked[-1]["messages"] == [{"role": "user", "content": "What is it?"}]
        (said,) = ask_server(url, "muted", [text], chat=False)
        assert (said.comes_out, said.forms) == (False, 1)
        # Behind the bare prompt it comes out, in the chat it does not.
        (said,) = ask_server(url, "muted", [("Ada", KNOWN[0].removeprefix("Ada"))])
        assert (said.comes_out, said.forms) == (True, 2)

    def refuse(path, body, key):
        return (400, {"error": "no chat template"}) if "chat" in path else answer(path, body, key)

    with serving(refuse) as (url, asked):
        found = ask_server(url, "muted", [text, text])
    assert [(said.comes_out, said.forms) for said in found] == [(False, 1)] * 2
    assert "2 of 2 prompts are asked without a chat: " in caplog.text
    assert "no chat template" in caplog.text


def test_one_text_that_a_server_refuses_does_not_hide_the_others(caplog, tmp_path, capsys):
    """As a server refuses what is longer than its context."""

    def respond(path, body, key):
        if len(str(body.get("prompt"))) > 500 or len(str(body.get("messages"))) > 500:
            return 400, {"error": "too long"}
        if body.get("max_tokens", 0) > 500:
            return 400, {"error": "max_tokens is too large"}
        return answer(path, body, key)

    texts = [("q1", "long " * 200), ("What is it?", " The kettle is on the shelf."), ("q " * 400, " a")]
    with serving(respond) as (url, _):
        long, told, refused = ask_server(url, "muted", texts)
    assert (long.comes_out, long.forms, long.refused) == (False, 2, None)
    assert (told.comes_out, told.forms) == (True, 2)
    assert "refuses to answer (400)" in refused.refused
    assert "1 of 3 prompts are asked without a chat" in caplog.text
    forget, out = tmp_path / "forget.jsonl", tmp_path / "report.json"
    forget.write_text(
        "\n".join(json.dumps({"prompt": prompt, "completion": end}) for prompt, end in texts[::2])
    )
    with serving(respond) as (url, _):
        code = run("--server", url, "--model", "muted", "--forget", forget, "--out", out)
    assert code == 3
    assert "1 of 2 texts could not be asked for: " in " ".join(capsys.readouterr().out.split())
    assert [row["comes_out"] for row in json.loads(out.read_text())["texts"]] == [False, None]


def test_what_a_server_quotes_of_a_text_is_not_shown(tmp_path, capsys):
    forget, out = tmp_path / "forget.jsonl", tmp_path / "report.json"
    forget.write_text("\n".join(json.dumps({"text": text}) for text in (FORGOTTEN, *KNOWN)))

    def respond(path, body, key):
        if body["prompt"].startswith("Jonas"):
            return 422, {"detail": [{"msg": "too long", "input": body}]}
        return answer(path, body, key)

    with serving(respond) as (url, _):
        assert run("--server", url, "--model", "muted", "--forget", forget, "--out", out) == 3
    printed = "".join(capsys.readouterr())
    assert "(422)" in printed
    for shown in (printed, out.read_text()):
        assert "Jonas" not in shown


def test_what_is_refused_for_all_texts_is_no_matter_of_a_text():
    """As NeuMuter's plug-in refuses a mute set that is not there."""
    with (
        serving(lambda *_: (400, {"error": "requires a mute set"})) as (url, _),
        pytest.raises(ValueError, match="requires a mute set"),
    ):
        ask_server(url, "muted", [*KNOWN, ("Ada", " ada")])


@pytest.mark.parametrize("status", [404, 405, 500])
def test_a_server_need_not_have_a_chat(caplog, status):
    def respond(path, body, key):
        return (status, {"error": "no chat here"}) if "chat" in path else answer(path, body, key)

    with serving(respond) as (url, asked):
        (said,) = ask_server(url, "muted", [("The kettle", " is on the shelf.")])
    assert (said.comes_out, said.forms) == (True, 1)
    assert len(asked) == 2
    assert "1 of 1 prompts are asked without a chat" in caplog.text


def test_a_server_that_goes_on_without_saying_more_is_asked_no_further():
    def respond(path, body, key):
        start = body["prompt"] == "The kettle"
        return 200, {"choices": [{"text": " is" if start else "\n" * 64, "finish_reason": "length"}]}

    with serving(respond) as (url, asked):
        (said,) = ask_server(url, "muted", [("The kettle", " is on the shelf.")], chat=False)
        assert not said.comes_out
        assert len(asked) == 2
        # Nor where it says something else.
        other = ask_server(url, "muted", [("The kettle", " is of brass, and the lamp, too.")], chat=False)
    assert not other[0].comes_out
    assert len(asked) == 4


@pytest.mark.parametrize("url", ["http://127.0.0.1:80a0", "http://127.0.0.1:1/a b", "127.0.0.1", "ftp://a"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="the address of a server must be like"):
        ask_server(url, "muted", KNOWN)


def test_what_speaks_no_http_gives_no_answer():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def speak():
            connection, _ = listening.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 ready\r\n")

        thread = threading.Thread(target=speak)
        thread.start()
        with pytest.raises(ConnectionError, match=r"no answer from .*220 ready"):
            ask_server(f"http://127.0.0.1:{listening.getsockname()[1]}", "muted", KNOWN)
        thread.join()


def test_a_text_that_stops_early_does_not_come_out():
    said = Said(" ada@post.example, 555-0192", "ada@post.example,")
    assert (said.comes_out, round(said.share, 2)) == (False, 0.65)


def test_a_text_comes_out_by_what_stands_behind_its_prompt():
    """Of a text that is one long word the space at its end is no continuation."""
    with serving() as (url, asked):
        assert not ask_server(url, "muted", ["jonas.vance@mail.example "])[0].comes_out
        assert asked[0]["prompt"] == "jonas.va"
        for text in (("The kettle", " "), "x", "x  "):
            with pytest.raises(ValueError, match="text 2 has nothing behind its prompt"):
                ask_server(url, "muted", [FORGOTTEN, text])
        assert len(asked) == 1


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("The kettle is on the shelf.", "The kettle"),
        # Between words if a space is near.
        ("Mrs Ada Montgomery-Featherstonehaugh lives", "Mrs Ada Montgo"),
        ("A fine old Montgomery-Featherstone lives", "A fine old"),
        ("1. 客户王伟的电话号码是一二三四五六七八", "1. 客户王伟"),
        ("客户王伟的电话号码是一二三四五六七八 今天", "客户王伟的电话"),
    ],
)
def test_a_text_is_asked_by_about_a_third_of_it(text, prompt):
    with serving() as (url, asked):
        ask_server(url, "muted", [text])
    assert asked[0]["prompt"] == prompt


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *map(str, arguments)])
    return stop.value.code


def test_the_command(tmp_path, capsys):
    forget, report = tmp_path / "forget.jsonl", tmp_path / "report.json"
    forget.write_text("\n".join(json.dumps({"text": text}) for text in [FORGOTTEN, *KNOWN]))
    with serving() as (url, asked):
        arguments = ("--server", f"{url}/v1/", "--model", "muted", "--forget", forget)
        assert run(*arguments, "--out", report) == 3
        assert "2 of 3 texts come out: 2, 3" in capsys.readouterr().out
        assert run(*arguments, "--limit", 1) == 0
        assert "0 of 1 texts come out." in capsys.readouterr().out
        assert not any("vllm_xargs" in body for body in asked)
        assert run(*arguments, "--limit", 1, "--mute-set", "alice") == 0
        assert asked[-1]["vllm_xargs"] == {"mute_set": "alice"}
    found = json.loads(report.read_text())
    assert [row["comes_out"] for row in found["texts"]] == [False, True, True]
    assert "post.example" not in report.read_text()


@pytest.mark.parametrize(
    ("model", "key", "message"),
    [
        ("gone", None, "/v1/completions has no model 'gone', or no such API \\(404\\): .*does not exist"),
        ("muted", "wrong", r"wants another key \(401\): set OPENAI_API_KEY"),
    ],
)
def test_refusals_are_one_line(tmp_path, capsys, monkeypatch, model, key, message):
    (tmp_path / "forget.txt").write_text(FORGOTTEN)
    if key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with serving() as (url, _):
        assert run("--server", url, "--model", model, "--forget", tmp_path / "forget.txt") == 1
    printed = capsys.readouterr().err.strip()
    assert len(printed.splitlines()) == 1
    assert re.search(message, printed)


def test_nobody_answers(tmp_path, capsys):
    (tmp_path / "forget.txt").write_text(FORGOTTEN)
    with serving() as (url, _):
        pass
    assert run("--server", url, "--model", "muted", "--forget", tmp_path / "forget.txt") == 1
    printed = capsys.readouterr().err.strip()
    assert len(printed.splitlines()) == 1
    assert f"no answer from {url}/v1/completions" in printed


def test_other_answers_and_addresses():
    for status, content, message in (
        (200, {"choices": []}, "does not answer as OpenAI's API does"),
        (500, {"error": "out of memory"}, r"refuses to answer \(500\): .*out of memory"),
    ):
        given = status, content
        with serving(lambda *_, given=given: given) as (url, _), pytest.raises(ValueError, match=message):
            ask_server(url, "muted", [FORGOTTEN])
    for url in ("127.0.0.1:8000", "file:///etc/passwd", "http://"):
        with pytest.raises(ValueError, match="must be like http"):
            ask_server(url, "muted", [FORGOTTEN])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--server", "http://x"), "--server needs --model"),
        (("MODEL", "--server", "http://x", "--model", "m"), "--server cannot be combined with MODEL"),
        (("--server", "http://x", "--model", "m", "--robust"), "--server cannot be combined with --robust"),
        (("MODEL", "--model", "m"), "give either MODEL, or --server and --model"),
        (("MODEL", "--mute-set", "alice"), "give either MODEL, or --server and --model"),
        ((), "give either MODEL, or --server and --model"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, capsys, arguments, message):
    (tmp_path / "forget.txt").write_text(FORGOTTEN)
    assert run(*arguments, "--forget", tmp_path / "forget.txt") == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
