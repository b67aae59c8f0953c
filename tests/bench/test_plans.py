"""Plans of models of full size agree with traces of the step that ``unlearn`` takes."""

import pytest

from bench import report, rows, tables
from bench.models import plans


@pytest.mark.parametrize(
    ("model", "layout", "devices", "recompute"),
    [
        ("Llama 3 8B", "ddp", 1, False), ("Llama 3 8B", "fsdp", 8, False), ("OLMoE 7B", "fsdp", 8, False),
        ("OLMoE 7B", "fsdp", 8, True),
    ],
)  # fmt: skip
def test_a_device_needs_what_was_planned(model, layout, devices, recompute):
    about = {"model": model, "layout": layout, "devices": devices, "samples": 8, "tokens": 256}
    found = plans.compare(about | {"recompute": recompute})
    assert found["planned"] == pytest.approx(found["traced"], rel=0.1)


def test_a_large_model_is_still_planned_as_it_was_traced():
    """One of the committed traces; to plan all of them takes minutes, which ``make plan-traces`` does."""
    about = {"model": "Llama 3 70B", "layout": "fsdp", "devices": 8, "recompute": False}
    (row,) = (row for row in rows.read(report.RESULTS / "plans.jsonl") if rows.is_about(row, about))
    assert plans.plan_peak(row) == pytest.approx(row["traced"], rel=0.1)


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
