"""What a text costs, at a tiny size."""

import itertools
import json

import pytest

from bench import report, rows, tables, text
from bench.models import scale
from neumuter.evaluation import continuations, examination
from neumuter.recipes import schedule
from neumuter.recipes.schedule import count_steps


@pytest.mark.parametrize("op", ["unlearn", "read"])
def test_what_a_text_costs(op, capsys, monkeypatch):
    for module in (continuations, examination):
        monkeypatch.setattr(module, "MAX_TOKENS", 2)
    monkeypatch.setattr(schedule, "LEAST_STEPS", 9)
    monkeypatch.setattr(schedule, "VISITS", 1)
    model = "15M" if op == "unlearn" else "demo"
    scale.main(op, model, "3", "cpu", "1")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    row = {"benchmark": "scale", "op": op, "model": model, "texts": 3} | found
    assert row["seconds"] > 0
    assert row["peak_mib"] >= row["before_mib"] > 0
    # All three texts in each step.
    assert row["visits_per_text"] == (9 if op == "unlearn" else None)
    assert f"{op}, {model}, 3 texts" in text.row_text(row)
    *_, line = (
        tables.scale([row, row | {"op": "other"}, row | {"model": "other"}], f"{op} {model}")
        .strip()
        .splitlines()
    )
    assert line.count("|") == (7 if op == "unlearn" else 6)
    assert "| 3 |" in line


def test_each_case_has_texts_of_its_own():
    found = {(about["op"], about["model"], about["texts"]) for about, _ in scale.cases("cpu", None)}
    assert found >= {("unlearn", "demo", 10_000), ("read", "demo", 100_000)}
    texts = [*scale.records("forget", 50), *scale.records("retain", 50)]
    assert len(set(texts)) == 100


def has_todays_visits(found):
    """Whether each text was visited as often as today's default does."""
    steps = [count_steps(row["texts"], None, scale.BATCH_SIZE) for row in found]
    visits = [
        n * min(scale.BATCH_SIZE, row["texts"]) / row["texts"] for n, row in zip(steps, found, strict=True)
    ]
    return [row["visits_per_text"] for row in found] == pytest.approx(visits)


def find_misses(found):
    """What of a table of "unlearn" is not flat; the libraries count as memory, too."""
    misses, found = [], sorted(found, key=lambda row: row["texts"])
    each = [row["seconds"] / row["texts"] for row in found]
    if any(later >= former for former, later in itertools.pairwise(each)):
        misses.append(f"the seconds of a text do not fall: {each}")
    peaks = [row["peak_mib"] for row in found]
    if max(peaks) > 1.2 * min(peaks):
        misses.append(f"peaks are more than 1.2 times apart: {peaks}")
    return misses


def test_a_text_costs_the_same_however_many_there_are():
    """And the page says if its rows are of another default than today's."""
    page = (report.TEMPLATES / "performance.md").read_text(encoding="utf-8")
    found = []
    for path in sorted(report.RESULTS.glob("*.jsonl")):
        measured = [row for row in rows.read(path) if row["benchmark"] == "scale"]
        for op, model in scale.CASES if measured else ():
            table = [row for row in measured if (row["op"], row["model"]) == (op, model)]
            assert sorted(row["texts"] for row in table) == [*scale.CASES[op, model]], path.name
            found += [table] if op == "unlearn" else []
    assert found
    for table in found:
        assert find_misses(table) == []
    assert all(map(has_todays_visits, found)) != ("The rows are of an earlier default" in page)


def test_a_table_that_is_not_flat_is_named():
    flat = [
        {"texts": count, "visits_per_text": visits, "seconds": seconds, "peak_mib": 900}
        for count, visits, seconds in ((10, 128, 60), (100, 40, 90), (1000, 10.24, 300))
    ]
    assert find_misses(flat) == []
    assert has_todays_visits(flat)
    assert not has_todays_visits([flat[0] | {"visits_per_text": 64}, *flat[1:]])
    for change, miss in (
        ({"seconds": 9}, "the seconds of a text do not fall"),
        ({"peak_mib": 700}, "more than 1.2 times apart"),
    ):
        (said,) = find_misses([flat[0] | change, *flat[1:]])
        assert miss in said
