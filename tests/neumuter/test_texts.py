"""Reading texts and making batches of them."""

import json

import pytest
from tokenizers import processors

from neumuter.texts import encode, read_texts
from tests.models import tokenizer


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
        ("t.jsonl", '{"text": "a"}\n\n[1]\n', "line 3: a JSON object is needed, got list"),
        ("t.jsonl", '{"prompt": "a", "body": "b"}', "line 1: no column 'text'; there are 'prompt', 'body'"),
        ("t.jsonl", '{"text": 3}', "line 1: column 'text' must hold a text, got 3"),
        ("t.jsonl", '{"text": ""}', "line 1: column 'text' must hold a text, got ''"),
        ("t.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("t.csv", "id,text\n1\n", "line 2: column 'text' must hold a text, got None"),
        ("t.csv", 'text\nb\n"a', "line 2: not CSV"),
        ("t.csv", "text\n", "holds no text"),
        ("t.txt", " \n\n", "holds no text"),
        ("t.txt", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_errors_name_the_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read_texts(write(tmp_path, name, content))
    assert name in str(error.value)


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
    assert batch["labels"].tolist() == [[start, a, b, c], [-100, -100, b, -100], [start, a, b, -100]]
    assert encode(["abc"], t, max_length=3)["input_ids"].tolist() == [[start, a, b]]


@pytest.mark.parametrize("text", [("abcd", "e"), ""])
def test_encode_names_a_text_without_a_token_to_predict(text):
    with pytest.raises(ValueError, match="text 2 has no token to predict within max_length=4"):
        encode(["fine", text], tokenizer(), max_length=4)


def test_prompts_do_not_end_with_the_tokenizers_end_token():
    """Some tokenizers append an end token; the completion follows the prompt itself."""
    ends = tokenizer()
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    batch = encode([("ab", "cd")], ends, 16)
    assert ends.decode(batch["input_ids"][0]) == "<s>abcd"
    assert (batch["labels"][0] != -100).sum() == 2
