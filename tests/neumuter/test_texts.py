"""Reading texts and making batches of them."""

import codecs
import csv
import json
import os
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

import neumuter
from neumuter.cli.app import main
from neumuter.texts import collect_texts, encode, encode_forms, read_texts
from neumuter.texts.encoding import sample_rows, tokenize
from neumuter.texts.files import TextFile
from neumuter.texts.windows import cut_windows
from tests.models import build, llama_2_tokenizer, tokenizer


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_jsonl(tmp_path):
    rows = [
        {"text": "a\nb"},
        {"prompt": "p", "completion": "c"},
        {"text": "é", "prompt": "x", "completion": "y"},
    ]
    path = write(tmp_path, "t.jsonl", "\n\n".join(map(json.dumps, rows)))
    assert read_texts(path) == ["a\nb", ("p", "c"), "é"]
    assert read_texts(path, limit=2) == ["a\nb", ("p", "c")]
    assert read_texts(write(tmp_path, "u.jsonl", '{"body": "z", "text": "a"}'), column="body") == ["z"]


def test_csv(tmp_path):
    path = write(tmp_path, "t.csv", 'id,text\r\n1,"two\r\nlines, and ""quotes"""\r\n2,b\r\n')
    assert read_texts(str(path)) == ['two\r\nlines, and "quotes"', "b"]
    assert read_texts(path, column="id") == ["1", "2"]
    assert read_texts(write(tmp_path, "p.csv", "prompt,completion\np,c\n")) == [("p", "c")]


def test_plain_text(tmp_path):
    path = write(tmp_path, "t.txt", b"\xef\xbb\xbf\n one\r\ntwo\n \n\nthree")
    assert read_texts(path) == [" one\ntwo", "three"]
    with pytest.raises(ValueError, match="plain text, which has no column 'text'"):
        read_texts(path, column="text")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", '{"text": "a"}\n{"text"\n', "line 2: not JSON"),
        ("t.jsonl", '{"text": "a"}\n\n[1]\n', "line 3: must be a text, .*, got list"),
        ("t.jsonl", '{"prompt": "a", "body": "b"}', "line 1: no column 'text'.*; there are 'prompt', 'body'"),
        ("t.json", '{"text": "a"}\n{"text"\n', "line 2: not JSON"),
        ("t.json", '[{"text": "a"},\n{"text"]', "line 2: not JSON"),
        ("t.json", '[{"text": "a"}, {"text": 3}]', "item 2: column 'text' must hold a text, got 3"),
        ("t.json", "[" * 100_000, "line 1: not JSON"),
        ("t.json", "[]", "holds no text"),
        ("t.json", " \n", "holds no text"),
        ("t.csv", "text\nHello, world\n", "line 2: there are more fields than in the header"),
        ("t.csv", "text,id,text\na,1,b\n", "line 1: the header names 'text' twice"),
        ("t.txt", "a".encode("utf-16-le"), "lacks a byte order mark"),
        ("t.txt", "abc".encode("utf-16")[:-1], "is not utf-16"),
        ("t.parquet", "PAR1 PAR1", "is not a parquet file"),
        ("t.pdf", "%PDF-1.7", "files of kind '.pdf' are not read, only .csv, .json, .jsonl"),
        ("t.txt.gz", "x", "files of kind '.gz' are not read"),
        (
            "t.jsonl",
            '{"messages": [{"role": "user", "content": "a"}]}',
            "line 1: a conversation must have two",
        ),
        ("t.jsonl", '{"messages": ["a", "b"]}', "line 1: column 'messages' must hold a text, got"),
        (
            "t.jsonl",
            '[{"role": "user", "content": null}, {"role": "assistant"}]',
            "line 1: a chat message needs",
        ),
        ("t.jsonl", '{"text": 3}', "line 1: column 'text' must hold a text, got 3"),
        ("t.jsonl", '{"text": ""}', "line 1: column 'text' must hold a text, got ''"),
        ("t.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("t.csv", "id,text\n1\n", "line 2: column 'text' must hold a text, got None"),
        ("t.csv", 'text\nb\n"a', "line 2: not CSV"),
        ("t.csv", "text\n", "holds no text"),
        ("t.txt", " \n\n", "holds no text"),
        ("t.txt", b"\xff\xff", "is not utf-8"),
    ],
)
def test_errors_name_the_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read_texts(write(tmp_path, name, content))
    assert name in str(error.value)


ROWS = [{"prompt": f"p{i}", "completion": " c"} for i in range(3)]
LINES = "\n".join(map(json.dumps, ROWS))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", LINES),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.JSONL", LINES),
        ("a.ndjson", LINES.encode("utf-16")),
        ("a.CSV", "prompt,completion\n" + "".join(f"p{i}, c\n" for i in range(3))),
        ("a.tsv", "n\tprompt\tcompletion\n" + "".join(f"{i}\tp{i}\t c\n" for i in range(3))),
    ],
)
def test_every_format_gives_the_same(tmp_path, name, content):
    path = write(tmp_path, name, content)
    assert read_texts(path) == [(f"p{i}", " c") for i in range(3)]
    assert len(read_texts(path, limit=2)) == 2


def test_parquet(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*ROWS, {"prompt": "x"}]), tmp_path / "t.parquet")
    assert read_texts(tmp_path / "t.parquet", limit=3) == [(f"p{i}", " c") for i in range(3)]
    with pytest.raises(ValueError, match=r"t.parquet, row 4: column 'completion' must hold a text, got None"):
        read_texts(tmp_path / "t.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="needs pyarrow, which is not installed"):
        read_texts(tmp_path / "t.parquet")


def test_other_encodings(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert read_texts(write(tmp_path, "t.txt", "é\n\n\u2028b".encode(encoding))) == ["é", "\u2028b"]
    marked = codecs.BOM_UTF16_BE + "é".encode("utf-16-be")
    assert read_texts(write(tmp_path, "t.txt", marked)) == ["é"]


def test_a_pipe_is_read_from_its_start(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("one\n\ntwo"))
    writer.start()
    assert read_texts(tmp_path / "pipe") == ["one", "two"]
    writer.join()


def test_what_may_be_read_again_is_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        # It is refused before anything waits for a writer.
        with pytest.raises(ValueError, match=rf"^{path} is not a regular file: .* Write them to a file"):
            iter(TextFile(path))
        with pytest.raises(ValueError, match="not a regular file"):
            neumuter.unlearn(build("llama"), tokenizer(), path)
    with pytest.raises(FileNotFoundError):
        list(TextFile(tmp_path / "nothing"))


def test_the_command_refuses_a_pipe_before_it_loads_the_model(tmp_path, capsys):
    build("llama").config.save_pretrained(tmp_path)
    reading, writing = os.pipe()
    os.write(writing, b"one\n\ntwo")
    os.close(writing)
    with pytest.raises(SystemExit) as stop:
        main(["unlearn", str(tmp_path), "--forget", f"/dev/fd/{reading}", "--out", str(tmp_path / "out")])
    os.close(reading)
    assert stop.value.code == 1
    assert f"/dev/fd/{reading} is not a regular file" in " ".join(capsys.readouterr().err.split())


CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Jo."}]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("Who?", "Who?"),
        ({"question": "Who?", "answer": "Jo."}, ("Who?\n", "Jo.")),
        ({"question": "Who? ", "answer": "Jo."}, ("Who? ", "Jo.")),
        ({"question": "Who?", "answer": " Jo."}, ("Who?", " Jo.")),
        ({"prompt": "Who?", "completion": "Jo."}, ("Who?", "Jo.")),
        (
            {"instruction": "Say who.", "input": "Jo bakes.", "output": "Jo."},
            ("Say who.\n\nJo bakes.\n", "Jo."),
        ),
        ({"instruction": "Say who.", "input": "", "output": "Jo."}, ("Say who.\n", "Jo.")),
        ({"messages": CHAT}, CHAT),
        (CHAT, CHAT),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, CHAT),
        ({"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Jo."}]}, CHAT),
        ({"messages": [{**CHAT[0], "name": "a"}, CHAT[1]], "id": 7}, CHAT),
    ],
)
def test_columns_of_other_formats_are_recognised(tmp_path, row, text):
    assert read_texts(write(tmp_path, "t.jsonl", json.dumps(row))) == [text]
    assert collect_texts("forget", [row]) == [text]


def test_two_columns_can_be_named(tmp_path):
    path = write(tmp_path, "t.csv", "text,ask,reply\nx,Who?,Jo.\n")
    assert read_texts(path, column=("ask", "reply")) == [("Who?\n", "Jo.")]
    with pytest.raises(ValueError, match="line 2: no column 'ask' and 'answer'; there are 'text', 'ask'"):
        read_texts(path, column=("ask", "answer"))


def test_what_is_no_list_of_texts_is_refused():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match=r"forget must be a path, .*, got DataFrame"):
        collect_texts("forget", pandas.DataFrame([{"text": "a"}]))
    for single in ("a text", {"text": "a"}):
        with pytest.raises(TypeError, match="texts must be a list of texts, got one"):
            encode(single, tokenizer(), 8)
    with pytest.raises(TypeError, match="text 2: must be a text"):
        encode(["a", 7], tokenizer(), 8)
    with pytest.raises(ValueError, match="texts holds no text"):
        encode([], tokenizer(), 8)
    assert encode([{"text": "ab"}], tokenizer(), 8)["input_ids"].shape == (1, 3)


@pytest.mark.parametrize("value", ["5", "NaN", "[1]"])
def test_an_input_that_is_no_text_is_refused_by_line(tmp_path, value):
    path = write(tmp_path, "t.jsonl", f'{{"instruction": "a", "input": {value}, "output": "b"}}')
    with pytest.raises(ValueError, match="line 1: column 'input' must hold a text, got"):
        read_texts(path)


def test_missing_file_and_bad_limit(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_texts(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match="limit must be"):
        read_texts(tmp_path / "absent.txt", limit=0)


def test_encode():
    t = tokenizer()
    start, ids = 1, t("abc")["input_ids"][1:]
    batch = encode(["abc", ("a", "b"), "ab"], t, max_length=9)
    a, b, c = ids
    assert batch["input_ids"].tolist() == [[start, a, b, c], [start, a, b, 0], [start, a, b, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, a, b, c], [-100, -100, b, -100], [-100, a, b, -100]]


@pytest.mark.parametrize("text", [("abcd", ""), ("ab", ""), ""])
def test_encode_names_a_text_without_a_token_to_predict(text):
    with pytest.raises(ValueError, match="text 2 has no token to predict within max_length=4"):
        encode(["fine", text], tokenizer(), max_length=4)


def test_windows_of_a_long_text(caplog):
    t = tokenizer()
    start, *ids = t("abcdefghij")["input_ids"]
    rows = encode(["abcdefghij", "ab"], t, max_length=5)
    assert rows["input_ids"].tolist() == [
        *([start, *ids[first : first + 4]] for first in (0, 2, 4, 6)),
        [start, *ids[:2], 0, 0],
    ]
    counted = rows["labels"] != -100
    assert counted.sum(1).tolist() == [4, 2, 2, 2, 2]
    assert rows["labels"][:4][counted[:4]].tolist() == ids
    assert "1 of 2 texts do not fit into 5 tokens" in caplog.text
    assert "lose" not in caplog.text


def test_a_long_pair_loses_the_start_of_its_prompt_and_nothing_of_its_completion(caplog):
    t = tokenizer()
    (row,) = encode([("abcdef", "gh")], t, max_length=5)["input_ids"].tolist()
    assert t.decode(row) == "<s>efgh"
    assert "1 of 1 prompts do not fit into 5 tokens: they lose their start" in caplog.text
    assert "texts do not fit" not in caplog.text
    batch = encode([("abcdef", "ghijk")], t, max_length=5)
    assert "".join(t.decode(row[row != -100]) for row in batch["labels"]) == "ghijk"


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 2), st.integers(2, 20))
def test_each_token_counts_in_one_window_behind_enough_of_the_text(count, prompt, head, length):
    ids = list(range(head + count))
    start = min(head + prompt, len(ids) - 1) if count > 1 else head
    windows = cut_windows(ids, start, head, length)
    if length <= head:
        assert windows == []
        return
    assert [i for window, first in windows for i in window[first:]] == ids[start:]
    for window, first in windows:
        assert window[:head] == ids[:head]
        begins_the_text = window == ids[: len(window)]
        assert len(window) == min(length, len(ids))
        assert 0 < len(window) <= length
        assert begins_the_text or first >= min(length - 1, (length + head) // 2) or length - head == 1


def test_forms_number_the_rows_of_a_text():
    t = tokenizer()
    (form,) = encode_forms(["abcdefghij", "ab"], t, 5)
    assert form["texts"].tolist() == [0, 0, 0, 0, 1]
    assert sample_rows(form, 5, 0) is form
    drawn = sample_rows(form, 3, 0)["input_ids"]
    assert len(drawn) == 3
    assert all(any(torch.equal(row, other) for other in form["input_ids"]) for row in drawn)


def with_end_token():
    """Some tokenizers append an end token."""
    ends = tokenizer()
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return ends


def test_an_appended_end_token_is_no_part_of_a_text():
    ends = with_end_token()
    batch = encode([("ab", "cd"), "abcd"], ends, 16)
    assert [ends.decode(ids) for ids in batch["input_ids"]] == ["<s>abcd", "<s>abcd"]
    assert (batch["labels"] != -100).sum(1).tolist() == [2, 4]
    a, b = tokenizer()("ab", add_special_tokens=False)["input_ids"]
    # The text's own are part of it.
    assert tokenize("</s>ab</s>", ends) == ([1, 2, a, b, 2], 1)


@pytest.mark.parametrize(
    ("prompt", "completion", "counted"),
    [
        ("mail", " qi7whj,", "▁qi7whj,"),
        ("Who is", " Jo?\nJo bakes", "▁Jo?\nJo▁bakes"),
        # The token holds characters of both.
        ("Who is Jo?\n", "Jo bakes bread.", "▁Jo?\nJo▁bakes▁bread."),
        ("ma", "il", "▁mail"),
    ],
)
@pytest.mark.parametrize("fast", [True, False])
def test_prompt_and_completion_are_the_tokens_that_the_model_says(
    prompt, completion, counted, fast, monkeypatch
):
    """Tokenised apart, the completion would begin with a space of its own."""
    words = llama_2_tokenizer()
    # A tokenizer without offsets, whose prompt is cut where its own tokens end.
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", fast)
    batch = encode([("mail", " 4000348"), (prompt, completion)], words, 64)
    ids, labels = batch["input_ids"][1], batch["labels"][1]
    assert ids[batch["attention_mask"][1] == 1].tolist() == words(prompt + completion)["input_ids"]
    assert "".join(words.convert_ids_to_tokens(labels[labels != -100])) == counted


def test_half_a_surrogate_pair_is_refused_by_its_place(tmp_path):
    path = write(tmp_path, "t.jsonl", '{"text": "fine"}\n{"text": "half an emoji \\ud83d"}')
    with pytest.raises(ValueError, match=r"t.jsonl, line 2: character 15, '\\ud83d', is half a surrogate"):
        read_texts(path)
    for text in ("a\ud83d", ("a", "\ud83d"), ("\ud83d", "a")):
        with pytest.raises(ValueError, match=r"text 2: character .* is half a surrogate pair"):
            encode(["fine", text], tokenizer(), 9)
    assert read_texts(write(tmp_path, "u.jsonl", '{"text": "\\ud83d\\ude00"}')) == ["😀"]


def test_a_csv_field_may_be_long(tmp_path):
    """Python's csv module stops at 131,072 characters."""
    former = csv.field_size_limit()
    path = write(tmp_path, "t.csv", 'text\nshort\n"' + "word " * 40_000 + '"\n')
    assert [len(text) for text in read_texts(path)] == [5, 200_000]
    assert read_texts(path, limit=1) == ["short"]
    assert csv.field_size_limit() == former
