"""What a text costs, at a tiny size."""

import json

import pytest

from bench import tables, text
from bench.models import scale
from neumuter.evaluation import continuations, examination
from neumuter.recipes import schedule


@pytest.mark.parametrize("op", ["unlearn", "read"])
def test_what_a_text_costs(op, capsys, monkeypatch):
    for module in (continuations, examination):
        monkeypatch.setattr(module, "MAX_TOKENS", 2)
    monkeypatch.setattr(schedule, "LEAST_STEPS", 9)
    scale.main(op, "3", "cpu", "1")
    row = {"benchmark": "scale", "op": op, "texts": 3} | json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["seconds"] > 0
    assert row["peak_mib"] >= row["before_mib"] > 0
    # All three texts in each step.
    assert row["visits_per_text"] == (9 if op == "unlearn" else None)
    assert f"{op}, 3 texts" in text.row_text(row)
    *_, line = tables.scale([row, row | {"op": "other"}], op).strip().splitlines()
    assert line.count("|") == (7 if op == "unlearn" else 6)
    assert "| 3 |" in line


def test_each_case_has_texts_of_its_own():
    abouts = [about for about, _ in scale.cases("cpu", None)]
    assert {(about["op"], about["texts"]) for about in abouts} >= {("unlearn", 10_000), ("read", 100_000)}
    texts = [*scale.records("forget", 50), *scale.records("retain", 50)]
    assert len(set(texts)) == 100
