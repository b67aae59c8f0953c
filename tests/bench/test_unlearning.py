"""The experiments' own parts; the short SYNTH run with its bars is in continuous integration."""

import functools
import json
import threading
from types import SimpleNamespace

import pytest
import torch
import transformers

import neumuter
from bench import rows as results
from bench.unlearning import __main__ as experiments
from bench.unlearning import (
    calibrated,
    capacity,
    instead,
    memory,
    nothing_to_keep,
    page,
    paper,
    people,
    planted,
    real,
    relearned,
    requests,
    robust,
    rounded,
    slopes,
    synth,
    tdec,
)
from bench.unlearning.methods import MASKS, WEIGHTS, Job, run
from neumuter import evaluation, recipes
from neumuter.demo import task
from neumuter.demo.model import Training, architecture
from neumuter.evaluation import continuations, controls, examination, tofu
from neumuter.models.families import find_ffns
from neumuter.recipes import schedule
from neumuter.serving.live import mute
from neumuter.training import weights
from neumuter.training.batches import PairedBatches
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
    assert [ffn.module.forward.__name__ for ffn in find_ffns(job.model)] == ["forward"] * 3


def test_an_unknown_method_is_named(job):
    with pytest.raises(ValueError, match="'erase'"):
        run(job, "erase")


def test_peak_memory_sees_what_was_freed_again(monkeypatch):
    looked, resident = threading.Event(), memory._resident

    def look():
        looked.set()
        return resident()

    monkeypatch.setattr(memory, "_resident", look)
    with memory.PeakMemory() as peak:
        held = torch.ones(64 << 20, dtype=torch.uint8)
        for _ in range(2 * memory.STATM.exists() * (not torch.cuda.is_available())):
            looked.clear()  # the second look begins after the first was seen
            looked.wait()
        del held
    assert peak.mib is None or 60 < peak.mib < 80


def test_bars_name_what_is_missed():
    row = {"method": "before", "forget_extraction": 1.0, "heldout_perplexity": 50.0, "retain_extraction": 1.0}
    good = row | {"method": "neumuter, trained support", "forget_extraction": 0.0}
    bad = good | {"retain_extraction": 0.2, "heldout_perplexity": 60.0}
    random = row | {"method": "random"}
    default = good | {"method": "neumuter, modulate"}
    assert synth.missed([row, good, default, random]) == []
    assert len(synth.missed([row, bad, default, random])) == 2
    assert len(synth.missed([row, good, default | {"retain_extraction": 0.7}, random])) == 1
    known = good | {"forget_extraction": 0.9}
    assert len(synth.missed([row, known, default, random | {"forget_extraction": 0.1}])) == 2


def quick_rows(cases):
    return [about | find() for about, find in cases]


@pytest.mark.parametrize("family", ["gpt_neo", "phi"])
def test_the_papers_table_runs_on_models_of_its_shapes(tmp_path, family, monkeypatch):
    pytest.importorskip("rouge_score")
    models.build(family).save_pretrained(tmp_path / "model")
    models.tokenizer().save_pretrained(tmp_path / "model")
    made = [row for rows in people.questions(0, 4) for row in rows]
    data = tmp_path / "data"
    data.mkdir()
    if family == "gpt_neo":
        lines = ["doc_id,corpus,text", *(f'{n},none,"{row["answer"]}"' for n, row in enumerate(made[:4]))]
        (data / "lm_extraction_32_0.csv").write_text("\n".join(lines))
    else:
        for kind, name in paper.TOFU_FILES.items():
            rows = made[2:4] if kind == "texts to keep" else made[:2]
            (data / name).write_text("\n".join(map(json.dumps, rows)))
    options = SimpleNamespace(
        model=str(tmp_path / "model"), data=data, retrained=None, tasks=None, rewrite_with=None
    )
    if family == "phi":
        options.retrained = options.model
    monkeypatch.setattr(paper, "GATES", recipes.PaperConfig(epochs=2, batch_size=None))
    monkeypatch.setattr(paper, "GAINS", recipes.GainsConfig(steps=3, batch_size=2))
    monkeypatch.setattr(tofu, "MAX_NEW_TOKENS", 8)
    monkeypatch.setattr(paper, "read_corpus", functools.partial(task.read_corpus, 30_000))
    found = quick_rows(paper.cases(options))
    assert [row["method"] for row in found] == list(paper.RECIPES)
    assert found[2]["share"] > 0
    assert all(row["heldout_perplexity"] > 1 for row in found)
    if family == "phi":
        assert found[0]["tofu_forget_quality"] == 1.0
        assert 0 <= found[0]["tofu_model_utility"] < 1
    else:
        assert "forget_el" in found[0]
    (data / "lm_extraction_32_0.csv").unlink(missing_ok=True)
    (data / "forget10.json").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="neither TDEC nor TOFU"):
        list(paper.cases(options))


def test_a_stopped_run_goes_on(tmp_path):
    path, ran = tmp_path / "rows.jsonl", []

    def cases(names):
        for name in names:
            yield {"method": name}, lambda name=name: ran.append(name) or {"value": 1.0}

    assert len(list(experiments.run(cases("ab"), path))) == 2
    assert [row["method"] for row in experiments.run(cases("abc"), path)] == ["c"]
    assert ran == ["a", "b", "c"]
    known = results.read(path)
    assert len(known) == 3
    known[0]["machine"]["cpu"] = "another"
    results.write(path, known)
    with pytest.raises(ValueError, match="measured with other cpu"):
        list(experiments.run(cases("ab"), path))


def test_a_fresh_run_starts_over_and_its_bars_are_checked(tmp_path, monkeypatch, capsys):
    def start(*options):
        monkeypatch.setattr("sys.argv", ["", "synth", "--quick", "--out", str(tmp_path), *options])
        return experiments.main()

    rows = {m: {"forget_extraction": 1.0, "heldout_perplexity": 50.0, "retain_extraction": 1.0}
            for m in ("before", "random", *synth.OURS)}  # fmt: skip
    monkeypatch.setattr(
        synth, "cases", lambda quick: (({"method": m}, lambda r=r: r) for m, r in rows.items())
    )
    assert start("--check") == 1
    assert "trained support: extraction is 1, must be at most 0.5" in capsys.readouterr().out
    for method in synth.OURS:
        rows[method] = rows[method] | {"forget_extraction": 0.0}
    assert start("--check") == 1  # as before
    assert start("--fresh", "--check") == 0
    assert "SYNTH meets all its bars" in capsys.readouterr().out
    assert len(results.read(tmp_path / "synth.jsonl")) == len(rows)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The experiments' own models in small, few and short texts, learners of one step."""

    def smaller():
        config = architecture()
        config.hidden_size, config.intermediate_size, config.head_dim = 32, 200, 8  # 2 neurons are 0.5 %
        return config

    monkeypatch.setattr(task, "read_corpus", functools.partial(task.read_corpus, 30_000))
    monkeypatch.setitem(synth.MODELS, "gated, 0.9 M", smaller)
    monkeypatch.setattr(task, "HELDOUT_WINDOWS", 2)
    monkeypatch.setattr(real, "PEOPLE", 4)
    for name, value in (("TEXTS", 2), ("TOKENS", 40), ("PROMPT", 32)):
        monkeypatch.setattr(tdec, name, value)
    monkeypatch.setenv("NEUMUTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(real, "pretrained", lambda name: models.build("llama"))
    monkeypatch.setattr(real, "tokenizer", lambda name=None: models.tokenizer())
    monkeypatch.setattr(tdec, "tokenizer", models.tokenizer)
    monkeypatch.setattr(real, "WINDOWS", 2)
    monkeypatch.setitem(real.TUNING, "most_epochs", 1)
    monkeypatch.setitem(real.RECIPE, "steps", 10)  # so that bfloat16 shows a difference
    monkeypatch.setitem(tdec.Texts.recipe, "steps", 2)
    monkeypatch.setattr(synth, "Training", lambda: Training(steps=1))
    monkeypatch.setattr(requests, "GAINS", recipes.GainsConfig(steps=2, batch_size=None))
    monkeypatch.setitem(synth.RECIPE, "steps", 2)
    for module, name in ((continuations, "MAX_TOKENS"), (examination, "MAX_TOKENS"), (controls, "MADE_UP")):
        monkeypatch.setattr(module, name, 2)
    return tmp_path


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
    assert (found[0]["guessed"], found[0]["read"]) == (1.0, 1.0)
    assert [row["share"] > 0 for row in found[1:]] == [False, True, True]


def test_a_crowd_is_of_different_customers():
    crowd = slopes.make_crowd(3, 50)
    people = [record.prompt for record in crowd.forget + crowd.retain_same]
    assert len(set(people)) == 62
    assert crowd == slopes.make_crowd(3, 50) != slopes.make_crowd(4, 50)


def test_calibrated_runs(tiny, monkeypatch):
    monkeypatch.setattr(schedule, "LEAST_STEPS", 2)
    found = quick_rows(calibrated.cases(quick=True))
    assert [row["method"] for row in found] == ["before", "calibrated", "plain"]
    assert found[1]["share"] == found[2]["share"] > 0
    # These models know no record, so that only the estimate itself can be looked at.
    setting = calibrated.Worded(3)
    estimate = setting.compare()
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
    assert capacity.tune(setting, "npo")["steps"] == 60


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


def test_rounded_weights_are_measured(tiny):
    pytest.importorskip("torchao")
    found = quick_rows(rounded.cases(quick=True))
    assert [row["format"] for row in found] == ["none", "int4"]
    assert found[0]["heldout_perplexity"] != found[1]["heldout_perplexity"]


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


def test_relearned_runs(tiny, monkeypatch):
    pytest.importorskip("torchao")
    attack = weights.WeightsConfig(method="relearn", steps=20, batch_size=6, lr=1e-2)
    for name, value in (("ATTACK", attack), ("STEPS", (20,)), ("FIT_STEPS", 2)):
        monkeypatch.setattr(relearned, name, value)
    found = quick_rows(relearned.cases(quick=True))
    assert [row["method"] for row in found] == ["before", "first layer", "in the loop"]
    assert len({row["forget_loss"] for row in found}) == 3
    assert all(row["relearned 20 ma"] != row["half ma"] for row in found)


@pytest.fixture
def pair(job):
    with neumuter.attach(job.model, start_layer=0) as masked:
        yield PairedBatches(masked, job.forget, job.retain)


def test_the_first_layer_has_all_neurons_of_its_set(pair):
    mutes = relearned.FITS["first layer"](pair, 3)
    assert list(mutes.layers) == [pair.masked.ffns[0].path]


def test_without_an_attack_relearned_fits_as_the_recipe(pair):
    # This model knows no text: with a usual margin there is nothing to forget.
    config = recipes.GainsConfig(steps=6, batch_size=2, margin=20.0)
    found = relearned.Fit(pair, relearned.SHARE, config, 3, lambda *_: None).find()
    wanted = recipes.fit_mutes(pair, relearned.SHARE, config=recipes.FittedConfig(config), seed=3)
    assert wanted.count == found.count > 1
    for path, layer in wanted.layers.items():
        assert torch.equal(found.layers[path].indices, layer.indices)
        torch.testing.assert_close(found.layers[path].gains, layer.gains, atol=1e-5, rtol=0)
        assert (layer.gains - 1).abs().min() > 0.01


@pytest.mark.parametrize("attack", [relearned._relearn, relearned._move_gains, relearned._move_weights])
def test_an_attack_adds_its_hinge_and_leaves_the_weights_alone(pair, attack, monkeypatch):
    before = {name: value.clone() for name, value in pair.masked.model.state_dict().items()}
    seen, hinge = [], relearned.Fit.hinge

    def see(fit, gains, ids):
        seen.append((ids, hinge(fit, gains, ids)))
        return seen[-1][1]

    monkeypatch.setattr(relearned.Fit, "hinge", see)
    fit = relearned.Fit(pair, relearned.SHARE, recipes.GainsConfig(margin=20.0), 3, attack)
    fit.support = torch.arange(fit.neurons.count)
    gains = torch.ones(fit.neurons.count, requires_grad=True)
    attack(fit, gains, [0, 1, 2, 3])
    assert gains.grad.abs().max() > 0
    ids, attacked = seen[-1]
    if attack is relearned._relearn:
        assert len(ids) == 2
        assert attacked != hinge(fit, gains, ids)
    else:
        # The worst place near by is where more of the texts comes back.
        assert attacked > hinge(fit, gains, [0, 1, 2, 3])
    for name, value in pair.masked.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(weight.requires_grad for weight in fit.downs)


def test_nothing_to_keep_runs(tiny):
    found = quick_rows(nothing_to_keep.cases(quick=True))
    assert [row.get("neighbours") for row in found] == [None, "own samples", "made up"]
    assert [row["share"] > 0 for row in found] == [False, True, True]
    assert found[2]["forget_loss"] != found[0]["forget_loss"]


def test_instead_runs(tiny, monkeypatch):
    for name, value in (("STEPS", 3), ("CHOOSING", 1), ("STRANGERS", 2)):
        monkeypatch.setattr(instead, name, value)
    found = quick_rows(instead.cases(quick=True))
    assert [row["method"] for row in found] == ["before", "plain", "instead"]
    assert found[1]["share"] == found[2]["share"] > 0


def test_without_an_answer_the_fit_is_that_of_the_recipe(job, monkeypatch):
    for name, value in (("STEPS", 6), ("CHOOSING", 2), ("BATCH", 2)):
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
