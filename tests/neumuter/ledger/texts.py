"""The texts of two requests, and texts to keep."""

import json

import pytest

from neumuter.cli.app import main

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


def lines_of(ledger):
    return (ledger.folder / "ledger.jsonl").read_text().splitlines()
