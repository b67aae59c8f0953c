"""The experiments' own parts; the short SYNTH run with its bars is in continuous integration."""

import json
import time

import neumuter
import pytest
import torch
from neumuter import evaluation
from neumuter.evaluation import tofu

from bench.unlearning import page, people, synth
from bench.unlearning.memory import PeakMemory
from bench.unlearning.methods import MASKS, WEIGHTS, Job, run
from tests import models


def test_people_are_the_same_for_a_seed_and_no_answer_gives_another_away(tmp_path):
    made = people.questions(3, 16)
    assert made == people.questions(3, 16)
    assert made != people.questions(4, 16)
    rows = [row for rows in made for row in rows]
    assert len({row["question"] for row in rows}) == len(rows) == 16 * len(people.FACTS)
    for row in rows:
        assert row["paraphrased_answer"] not in row["perturbed_answer"]
        assert len(set(row["perturbed_answer"])) == people.WRONG
    path = tmp_path / "people.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert len(tofu.read_questions(path)) == len(rows)


def test_more_people_than_there_are_names():
    with pytest.raises(ValueError, match="people"):
        people.questions(0, 1000)


@pytest.fixture(scope="module")
def job():
    ids = models.batch(8, 8, 5)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    forget, keep = ({k: v[part] for k, v in batch.items()} for part in (slice(4), slice(4, 8)))
    recipe = {"share": 0.1, "batch_size": 4, "steps": 2, "lr": 1e-3, "paper_epochs": 1}
    model = models.build("llama")
    return Job(model, forget, keep, lambda m: {"loss": evaluation.mean_token_loss(m, forget)}, recipe, 0)


@pytest.mark.parametrize("method", [*MASKS, *WEIGHTS])
def test_every_method_gives_a_row_and_leaves_the_model_alone(job, method):
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    row = run(job, method)
    assert row["method"] == method
    assert row["seconds"] > 0
    assert row["loss"] != pytest.approx(job.measure(job.model)["loss"], abs=1e-9) or method == "paper"
    for name, value in job.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert [ffn.module.forward.__name__ for ffn in neumuter.families.find_ffns(job.model)] == ["forward"] * 3


def test_an_unknown_method_is_named(job):
    with pytest.raises(ValueError, match="'erase'"):
        run(job, "erase")


def test_peak_memory_sees_what_was_freed_again():
    with PeakMemory() as memory:
        held = torch.ones(64 << 20, dtype=torch.uint8)
        time.sleep(0.1)
        del held
    assert memory.mib is None or 60 < memory.mib < 80


def test_the_page_shows_means_and_extremes_and_its_own_age(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    monkeypatch.setattr(page, "PAGE", tmp_path / "results.md")
    rows = []
    for seed, extraction in ((0, 0.1), (1, 0.3)):
        about = {
            "seed": seed,
            "model": "small",
            "forget": 4,
            "neighbours": "retain",
            "heldout_perplexity": 50.0,
        }
        rows.append(about | {"method": "before", "forget_extraction": 1.0, "same_extraction": 1.0})
        ours = {"budget": 0.05, "share": 0.05, "forget_extraction": extraction, "same_extraction": 1.0}
        rows += [about | ours | {"method": m, "heldout_perplexity": 51.0} for m in synth.OURS]
    machine = {"gpu": None, "cpu": "some CPU", "threads": 2}
    (tmp_path / "synth.json").write_text(json.dumps({"rows": rows, "machine": machine}))
    assert page.write() == 0
    text = page.PAGE.read_text()
    assert "0.20 (0.10 … 0.30)" in text
    assert "+2.0%" in text
    assert "2 seeds (0, 1)" in text
    assert (tmp_path / "results-budgets.png").stat().st_size > 1000
    assert page.write(check=True) == 0
    (tmp_path / "synth.json").write_text(json.dumps({"rows": rows[:4], "machine": machine}))
    assert page.write(check=True) == 1


def test_bars_name_what_is_missed():
    row = {"method": "before", "forget_extraction": 1.0, "heldout_perplexity": 50.0, "retain_extraction": 1.0}
    good = row | {"method": "neumuter, trained support", "forget_extraction": 0.0}
    bad = good | {"retain_extraction": 0.2, "heldout_perplexity": 60.0}
    random = row | {"method": "random"}
    assert synth.missed([row, good, random]) == []
    assert len(synth.missed([row, bad, random])) == 2
    assert (
        len(synth.missed([row, good | {"forget_extraction": 0.9}, random | {"forget_extraction": 0.1}])) == 2
    )
