"""Each experiment in its short form; that of SYNTH, with its bars, is in continuous integration."""

import re

import pytest
import torch
import transformers

import neumuter
from bench.unlearning import (
    calibrated,
    capacity,
    hundreds,
    instead,
    judged,
    nothing_to_keep,
    page,
    planted,
    real,
    requests,
    robust,
    rounded,
    slopes,
    synth,
    tdec,
)
from neumuter import evaluation, recipes
from neumuter.demo.model import Training, architecture
from neumuter.models.families import find_ffns
from neumuter.recipes import schedule
from neumuter.serving.live import mute
from neumuter.training.batches import PairedBatches
from neumuter.types import IGNORED
from tests.bench.quick import quick_rows


def test_real_runs(tiny):
    found = {row["method"]: row for row in quick_rows(real.cases(quick=True))}
    assert list(found) == ["before", "retrained", "random", real.OURS]
    assert found["before"]["forget"] == found["random"]["forget"] == 12
    assert found[real.OURS]["share"] > 0
    assert found[real.OURS]["forget_loss"] != found["before"]["forget_loss"]


def test_tdec_runs_on_a_folder_of_its_files(tiny):
    with pytest.raises(FileNotFoundError, match="lm_extraction_32_0"):
        list(tdec.cases(tiny))
    for name in tdec.FILES:
        rows = [["doc_id", "corpus", "text"], *([str(n), "none", f"{name} {n} " * 9] for n in range(3))]
        (tiny / name).write_text("\n".join(",".join(row) for row in rows))
    found = quick_rows(tdec.cases(tiny, quick=True))
    assert [row["method"] for row in found] == ["before", "retrained", "random", tdec.OURS]
    assert all(0 <= row["forget_el"] <= 1 for row in found)
    (tiny / tdec.FILES[1]).write_text("doc_id,corpus,text\n0,none,short")
    with pytest.raises(ValueError, match="has 0 texts of 40 tokens"):
        quick_rows(tdec.cases(tiny, quick=True))


def test_robust_runs(tiny):
    found = quick_rows(robust.cases(quick=True))
    assert [row["state"] for row in found] == list(robust.STATES)
    assert all(row["forget_loss"] > 0 for row in found)


def test_requests_run(tiny):
    found = quick_rows(requests.cases(quick=True))
    by_case = {(row["method"], row["requests"]): row for row in found}
    methods = ("slopes", "existing", "anew", "alone")
    assert list(by_case) == [("before", 0), *((method, asked) for method in methods for asked in (1, 2))]
    for method in methods[1:]:
        assert by_case[method, 1] | {"method": "slopes"} == by_case["slopes", 1]
        assert by_case[method, 2]["share"] == 2 * by_case["slopes", 1]["share"] > 0 or method == "alone"
    assert by_case["slopes", 2]["share"] == by_case["existing", 2]["share"]


def test_a_request_is_undone_from_its_slopes(tiny, monkeypatch):
    monkeypatch.setattr(requests, "UNDONE", 0)
    cases = {tuple(about.values())[1:]: find for about, find in requests.cases(quick=True)}
    assert cases["slopes", 2, 0]()["share"] == cases["slopes", 2, None]()["share"] > 0


def test_slopes_run(tiny, monkeypatch):
    monkeypatch.setattr(slopes, "TRAINING", Training(steps=1))
    monkeypatch.setattr(slopes, "GUESSES", 3)
    found = quick_rows(slopes.cases(quick=True))
    assert [row["what"] for row in found] == ["read", "many", "many", "many"]
    # The slopes of the secret itself are the most alike, whatever the model has learned.
    assert found[0]["guessed"] == 1.0
    assert [row["share"] > 0 for row in found[1:]] == [False, True, True]


def test_a_crowd_is_of_different_customers():
    crowd = slopes.make_crowd(3, 50)
    people = [record.prompt for record in crowd.forget + crowd.retain_same]
    assert len(set(people)) == 62
    assert crowd == slopes.make_crowd(3, 50) != slopes.make_crowd(4, 50)
    many = slopes.make_crowd(3, 1200, 10)
    assert len({record.prompt for record in many.forget + many.retain_same}) == 1210
    assert many.forget[:50] == crowd.forget
    assert re.fullmatch(r"Customer \w+ B\. \w+, mail", many.retain_same[-1].prompt)


def test_synth_gives_whole_records_to_the_default_alone(tiny, monkeypatch):
    monkeypatch.setattr(schedule, "LEAST_STEPS", 2)
    setting = synth.Setting("gated, 0.9 M", 3)
    told, given = setting.job(0.05), setting.default_job(0.05)
    counted = [(job.forget["labels"] != IGNORED).sum() for job in (told, given)]
    assert told.unseen is None
    assert counted[0] < counted[1]
    assert given.unseen().shape == given.forget["labels"].shape
    seen = []
    monkeypatch.setattr(synth, "run", lambda job, method: seen.append((method, job.unseen is None)) or {})
    quick_rows(synth.cases(quick=True))
    assert seen == [("random", True), *((method, method != "neumuter, modulate") for method in synth.OURS)]


def test_calibrated_runs(tiny, monkeypatch):
    monkeypatch.setattr(schedule, "LEAST_STEPS", 2)
    found = quick_rows(calibrated.cases(quick=True))
    assert [row["method"] for row in found] == ["before", "calibrated", "plain"]
    assert found[1]["share"] == found[2]["share"] > 0
    monkeypatch.setattr(calibrated, "LEAST_STEPS", 1)
    assert calibrated.Worded(3).find_mutes("longer").method["gains"]["steps"] == 2
    # These models know no record, so that only the estimate itself can be looked at.
    setting = calibrated.Worded(3)
    monkeypatch.setattr(calibrated, "LEAST_STEPS", 3)  # of 8 of 12 samples each, so that one comes twice
    assert setting.find_mutes("distribution").count == setting.find_mutes("fewer").count > 0
    estimate = setting.compare("estimate")
    assert 0 <= estimate["agree"] <= 1
    assert estimate["worded_loss"] == pytest.approx(setting.measure(setting.full)["worded_loss"], rel=0.2)


def test_capacity_runs(tiny, monkeypatch):
    monkeypatch.setattr(capacity, "TRAINING", Training(steps=1))
    monkeypatch.setattr(schedule, "MOST_STEPS", 2)
    monkeypatch.setattr(schedule, "LEAST_STEPS", 2)
    found = quick_rows(capacity.cases(quick=True))
    assert [row["method"] for row in found] == ["before", "neumuter, modulate", "retrained"]
    assert (found[1]["share"], found[1]["steps"]) == (1.0, 4)
    setting = capacity.Crowd(3, 24)
    assert (len(setting.forget), len(setting.same)) == (24, 240)
    assert capacity.tune(setting, "npo")["steps"] == found[1]["steps"]


def test_the_curve_of_capacity_shows_each_share_alone():
    row = {"seed": 3, "forget": 24, "heldout_perplexity": 2.0}
    rows = [
        row | {"method": "before", "forget_extraction": 1.0},
        row | {"method": "neumuter, modulate", "budget": 0.01, "forget_extraction": 0.5},
        row | {"method": "neumuter, modulate", "budget": 1.0, "forget_extraction": 0.25},
        row | {"method": "npo", "forget_extraction": 0.75},
    ]
    lines = page.capacity(rows, "24").splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["1.00", "0.50", "0.25", "0.75"]
    assert page.capacity(rows, "96") is None


def test_hundreds_run(tiny, monkeypatch):
    monkeypatch.setattr(hundreds, "SHARES", {8: (1.0,), 2: (0.01,)})
    monkeypatch.setattr(hundreds, "PEOPLE", 4)
    found = quick_rows(hundreds.cases(quick=True))
    assert [(row["method"], row["forget"], row["share"] > 0) for row in found] == [
        ("before", 2, False), ("neumuter, modulate", 2, True)
    ]  # fmt: skip
    setting = hundreds.Hundreds(3, 2)
    counts = [len(batch["labels"]) for batch in (setting.forget, setting.secrets, setting.paraphrased)]
    assert counts == [2, 2, 2]
    # The others are neither to be forgotten nor to be kept.
    assert len(setting.retain["labels"]) == 12
    assert "**ours, modulate**, 1%" in page.capacity(found, "2")


def test_judged_runs(tiny, monkeypatch):
    monkeypatch.setattr(capacity, "TRAINING", Training(steps=1))
    monkeypatch.setattr(capacity, "ASKING", 4)
    monkeypatch.setattr(capacity, "STAYING", 4)
    monkeypatch.setattr(judged, "COUNT", 3)
    monkeypatch.setattr(schedule, "LEAST_STEPS", 2)
    found = quick_rows(judged.cases(quick=True))
    assert [(row["method"], row.get("budget")) for row in found] == [
        ("before", None), ("retrained", None), (judged.OURS, 0.1), (judged.OURS, 1.0)
    ]  # fmt: skip
    assert {row["texts"] for row in found} == {3}
    # Of so few texts nothing can be said.
    assert {row[f"{kind} verdict"] for row in found for kind in ("made", "unseen")} == {"not enough evidence"}
    assert {row["unseen"] for row in found} == {3}
    lines = page.judged(found, "480 customers").splitlines()[2:]
    assert [line.split(" | ")[-1] for line in lines] == ["not enough evidence |"] * 4
    assert "100%" in lines[-1]
    two = [found[0], found[0] | {"seed": 5, "made verdict": "partly"}]
    assert "not enough evidence (1), partly (1)" in page.judged(two, "480 customers")


def test_planted_neurons_alone_learn(tiny, monkeypatch):
    monkeypatch.setattr(planted, "MOST_STEPS", 3)
    setting = planted.Planted(3)
    before = synth.Setting("gated, 0.9 M", 3).full
    for ffn, old in zip(find_ffns(setting.full), find_ffns(before), strict=True):
        changed = (ffn.down.weight != old.down.weight).any(0)
        assert changed.nonzero().flatten().tolist() == setting.planted[ffn.path].sort().values.tolist()
        assert torch.equal((ffn.module.gate_proj.weight != old.module.gate_proj.weight).any(1), changed)
    found = quick_rows(planted.cases(quick=True))
    assert [row["method"] for row in found] == ["before", "fisher", "random"]
    assert all(0 <= row["precision"] <= 1 for row in found[1:])


def test_rounded_weights_are_measured(tiny, monkeypatch):
    pytest.importorskip("torchao")
    # 200 neurons do not divide into the blocks of Q4_0.
    monkeypatch.setattr(rounded, "FITTED", ("int4",))
    found = quick_rows(rounded.cases(quick=True))
    assert [(row["method"], row["format"]) for row in found] == [
        *((method, name) for method in ("calibrated", "live") for name in ("none", "int4")),
        ("fitted", "int4"),
    ]
    folded, folded_rounded, live, rounded_live, fitted = (row["heldout_perplexity"] for row in found)
    assert live == pytest.approx(folded, rel=1e-4)
    assert folded not in (folded_rounded, rounded_live, fitted)
    found = [row | {"retain_extraction": 0.5} for row in found]
    lines = page.rounded([row | {"method": "before"} for row in found] + found, "gated, 0.9 M").splitlines()
    assert "found on the rounded model | 4 bits" in lines[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["q8_0", "nf4", "q4_0"])
def test_each_format_rounds_all_layers_but_the_last(name, dtype):
    pytest.importorskip({"nf4": "bitsandbytes"}.get(name, "gguf"))
    model = transformers.AutoModelForCausalLM.from_config(architecture()).requires_grad_(False).to(dtype)
    before = {
        path: module.weight.clone() for path, module in model.named_modules() if hasattr(module, "weight")
    }
    rounded.FORMATS[name](model)
    for path, module in model.named_modules():
        if path not in before:
            continue
        error = (module.weight - before[path]).abs().max() / before[path].abs().max()
        linear = isinstance(module, torch.nn.Linear) and path != "lm_head"
        assert module.weight.dtype == dtype
        assert (0 < error < (0.01 if name == "q8_0" else 0.2)) if linear else error == 0


def test_nothing_to_keep_runs(tiny):
    found = quick_rows(nothing_to_keep.cases(quick=True))
    assert [row.get("neighbours") for row in found] == [None, "own samples", "made up"]
    assert [row["share"] > 0 for row in found] == [False, True, True]
    assert found[2]["forget_loss"] != found[0]["forget_loss"]


def test_instead_runs(tiny, monkeypatch):
    for name, value in (("STEPS", 3), ("STRANGERS", 2)):
        monkeypatch.setattr(instead, name, value)
    found = quick_rows(instead.cases(quick=True))
    assert [row["method"] for row in found] == ["before", "plain", "instead"]
    assert found[1]["share"] == found[2]["share"] > 0


def test_without_an_answer_the_fit_is_that_of_the_recipe(job, monkeypatch):
    for name, value in (("STEPS", 6), ("BATCH", 2)):
        monkeypatch.setattr(instead, name, value)
    config = recipes.FittedConfig(recipes.GainsConfig(steps=6, batch_size=2))
    with neumuter.attach(job.model, start_layer=0) as masked:
        found = instead._fit(masked, job.forget, None, job.retain, 0.1, 0.02, 3)
        wanted = recipes.fit_mutes(PairedBatches(masked, job.forget, job.retain), 0.1, "modulate", config, 3)
        answered = instead._fit(masked, job.forget, job.retain, job.retain, 0.1, 0.02, 3)
    for path, layer in wanted.layers.items():
        assert torch.equal(found.layers[path].indices, layer.indices)
        torch.testing.assert_close(found.layers[path].gains, layer.gains, atol=1e-5, rtol=0)
    with mute(job.model, found):
        plainly = evaluation.mean_token_loss(job.model, job.retain)
    with mute(job.model, answered):
        assert evaluation.mean_token_loss(job.model, job.retain) < plainly
