"""Plans of models of full size agree with traces of the step that ``unlearn`` takes."""

import pytest

from bench import report, rows, tables
from bench.models import plans


@pytest.mark.parametrize(
    ("model", "recompute"), [("Llama 3 8B", False), ("OLMoE 7B", False), ("OLMoE 7B", True)]
)
def test_a_device_of_eight_needs_what_was_planned(model, recompute):
    about = {"model": model, "layout": "fsdp", "devices": 8, "samples": 8, "tokens": 256}
    found = plans.compare(about | {"recompute": recompute})
    assert found["planned"] == pytest.approx(found["traced"], rel=0.1)


def test_the_committed_traces_agree_and_are_all_there():
    known = rows.read(report.RESULTS / "plans.jsonl")
    for about, _ in plans.cases():
        (row,) = (row for row in known if rows.is_about(row, about))
        assert row["planned"] == pytest.approx(row["traced"], rel=0.1), about
    assert len(known) == len(list(plans.cases()))
    shown = tables.plans(known, None)
    assert shown.count("\n") == len(known) + 1
    for model in plans.MODELS:
        assert f"| {model} |" in shown
