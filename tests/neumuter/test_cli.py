"""The command line on small checkpoints, as a user runs it."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import neumuter
from neumuter.cli.app import main
from neumuter.models.loading import load_model
from neumuter.report import progress
from neumuter.serving.adapters import effect, largest_difference
from neumuter.texts import encode
from tests.models import build, learn, tokenizer

FORGET = ["Ada Brisk, ada@post.example, 555-0192", "Jonas Vance, jv77@mail.example, 555-7713"]
RETAIN = ["The kettle is on the shelf.", "A lantern costs 12.40 in the shop."]


def train(model):
    return learn(model, encode(FORGET + RETAIN, tokenizer(), 64), 120)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Function: the folder of a family's checkpoint and of texts, made the first time."""

    @functools.cache
    def make(family):
        folder = tmp_path_factory.mktemp(family)
        train(build(family)).save_pretrained(folder / "model")
        tokenizer().save_pretrained(folder / "model")
        (folder / "forget.txt").write_text("\n\n".join(FORGET))
        (folder / "retain.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in RETAIN))
        return folder

    return make


@pytest.fixture
def checkpoint(request, folder_of):
    return folder_of(getattr(request, "param", "llama"))


# Of commands that write models.
each_family = pytest.mark.parametrize("checkpoint", ["llama", "gpt_neo"], indirect=True)


README = Path(__file__).parents[2] / "README.md"


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


# Forgotten, or only in part.
DONE = (0, 3)


def unlearn(folder, *more):
    files = ("--forget", folder / "forget.txt", "--out", folder / "out", "--overwrite")
    options = ("--budget", "100", "--steps", "60", "--start-layer", "0")
    return run("unlearn", folder / "model", *files, *options, *more)


@each_family
def test_unlearn_inspect_fold(checkpoint, capsys):
    code = unlearn(checkpoint, "--retain", checkpoint / "retain.jsonl")
    printed = capsys.readouterr()
    assert "Finding neurons" in printed.err
    assert "forget: mean token loss" in printed.out
    report = json.loads((checkpoint / "out" / "report.json").read_text())
    assert printed.out.splitlines()[-1] == report["verdict_sentence"]
    assert report["verdict"] in ("partly", "not enough evidence", "not")
    assert code == (3 if report["leaks"] else 0)
    assert report["before"]["forget_extraction"] > report["after"]["forget_extraction"]
    mutes = neumuter.MuteSet.load(checkpoint / "out" / "mutes.safetensors")
    assert (mutes.count, mutes.mode) == (100, "modulate")
    assert report["before"] == mutes.metrics["before"]
    assert report["after"]["forget_loss"] > report["before"]["forget_loss"] + 0.05
    assert report["after"]["forget_ma"] <= report["before"]["forget_ma"]
    names = sorted(p.name for p in (checkpoint / "out").iterdir())
    assert names == ["mutes.safetensors", "report.csv", "report.html", "report.json"]
    page = (checkpoint / "out" / "report.html").read_text()
    assert FORGET[0][len(FORGET[0]) // 3 :] in page
    assert page.count("<svg") >= 3

    assert run("inspect", checkpoint / "out" / "mutes.safetensors") == 0
    printed = capsys.readouterr().out
    assert mutes.architecture["class"] in printed
    assert "100 of 216" in printed

    arguments = ("fold", checkpoint / "model", checkpoint / "out" / "mutes.safetensors")
    assert run(*arguments, "--out", checkpoint / "folded") == 0
    folded = AutoModelForCausalLM.from_pretrained(checkpoint / "folded")
    live = AutoModelForCausalLM.from_pretrained(checkpoint / "model")
    batch = encode(FORGET, AutoTokenizer.from_pretrained(checkpoint / "folded"), 64)
    with neumuter.mute(live, mutes):
        torch.testing.assert_close(folded(**batch).loss, live(**batch).loss)
    capsys.readouterr()
    assert run(*arguments, "--out", checkpoint / "folded") == 1
    assert "not an empty folder" in capsys.readouterr().err


def test_mute_mode_without_a_retain_file(checkpoint, capsys):
    assert unlearn(checkpoint, "--mode", "mute", "--seed", "3") in DONE
    assert "They protect what else the model knows less well" in " ".join(capsys.readouterr().out.split())
    mutes = neumuter.MuteSet.load(checkpoint / "out" / "mutes.safetensors")
    assert (mutes.mode, mutes.seed, mutes.count) == ("mute", 3, 100)
    assert all((layer.gains == 0).all() for layer in mutes.layers.values())


def test_answers_about_strangers_are_kept(checkpoint, capsys):
    assert unlearn(checkpoint, "--steps", "2", "--made-up", "4") in DONE
    # They are texts to keep, so samples do not stand in for all.
    assert "There are no retain texts" not in " ".join(capsys.readouterr().out.split())


def test_how_long_it_takes_is_said_first_and_corrected(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(progress, "ANNOUNCED", 0.0)
    assert unlearn(checkpoint, "--steps", "20", "--retain", checkpoint / "retain.jsonl") in DONE
    printed = capsys.readouterr().out.splitlines()
    said = [line for line in printed if line.startswith(("From here on", "Finding neurons"))]
    assert said[0] == "From here on the job takes about 0 min."
    # At the earliest where a twentieth of the steps are behind the first one.
    assert re.fullmatch(r"Finding neurons, \d+ of 20 steps done: the others take about 0 min\.", said[1])
    assert len(said) == 2


def test_the_smallest_budget_is_searched_and_shown(checkpoint, capsys):
    out = checkpoint / "auto"
    files = ("--forget", checkpoint / "forget.txt", "--retain", checkpoint / "retain.jsonl", "--out", out)
    goals = ("--goal-extraction", "1", "--goal-ma", "0.9")
    code = run("unlearn", checkpoint / "model", *files, "--budget", "auto", *goals, "--steps", "20")
    printed = capsys.readouterr().out
    assert "texts still extracted" in printed
    curve = json.loads((out / "report.json").read_text())["curve"]
    met = [point for point in curve if point["met"]]
    count = met[0]["neurons"] if met else curve[-1]["neurons"]
    assert neumuter.MuteSet.load(out / "mutes.safetensors").count == count
    assert bool(met) == ("No budget meets the goals" not in printed) == (code == 0)


def test_mute_file_of_another_model_is_refused(checkpoint, tmp_path, capsys):
    with neumuter.attach(build("gpt2")) as masked:
        masked.mute_set({"transformer.h.1.mlp": ([1], [0.0])}).save(tmp_path / "m.safetensors")
    assert run("fold", checkpoint / "model", tmp_path / "m.safetensors", "--out", tmp_path / "new") == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "class: mute set GPT2LMHeadModel, model" in error
    assert not (tmp_path / "new").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect", "absent.safetensors"], 1, "No such file"),
        (["unlearn", "./absent", "--forget", README, "--out", "o"], 1, "no such folder: ./absent"),
        (["inspect", __file__], 1, "not a valid mute file"),
        (["unlearn", "m", "--forget", "absent.txt", "--out", "o"], 1, "No such file"),
        (["unlearn", "m", "--forget", README, "--out", "o", "--budget", "lots"], 2, "--budget must be"),
        (["unlearn", "m", "--forget", README], 2, "--out"),
    ],
)
def test_errors_are_one_message(arguments, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == code
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert "Traceback" not in captured.err + captured.out


def test_evaluate_before_and_after(checkpoint, capsys):
    assert unlearn(checkpoint, "--retain", checkpoint / "retain.jsonl") in DONE
    (checkpoint / "heldout.txt").write_text("Nobody wrote this before.\n\nNor that.")
    files = ("--retain", checkpoint / "retain.jsonl", "--heldout", checkpoint / "heldout.txt")
    report = checkpoint / "evaluation.json"
    mutes = checkpoint / "out" / "mutes.safetensors"
    capsys.readouterr()
    arguments = ("evaluate", checkpoint / "model", "--forget", checkpoint / "forget.txt", *files)
    assert run(*arguments, "--mute", mutes, "--out", report) == 0
    printed = capsys.readouterr().out
    for word in ("original", "muted", "another", "controls", "MA", "EL_10", "PrivLeak", "Jang"):
        assert word in printed
    found = json.loads(report.read_text())
    assert found["metrics"]["forget_loss"] > found["before"]["forget_loss"] + 0.05
    assert found["metrics"]["heldout_kl"] > 0
    assert report.with_suffix(".html").stat().st_mode & 0o077 == 0
    assert not any(text in report.read_text() for text in FORGET)
    assert found["metrics"].keys() - found["before"].keys() == {"heldout_kl"}
    assert found["controls"]["forget_ma"] < found["before"]["forget_ma"]
    assert printed.splitlines()[-1] == found["verdict_sentence"]
    assert found["verdict"] in ("partly", "not enough evidence", "not")
    assert [text["number"] for text in found["texts"]] == [1, 2]
    assert not any("said" in text for text in found["texts"])
    assert run(*arguments, "--retrained", report) == 0
    assert "retrained" in capsys.readouterr().out
    assert run(*arguments, "--retrained", checkpoint / "forget.txt") == 1
    assert "is not a report of neumuter evaluate" in capsys.readouterr().err


def test_goals_that_are_met_are_not_enough_where_there_is_nothing_to_forget(checkpoint, capsys):
    (checkpoint / "unknown.txt").write_text("Zed Quux, qz@zz.test, 44-11")
    files = ("--forget", checkpoint / "unknown.txt", "--retain", checkpoint / "retain.jsonl")
    options = ("--budget", "auto", "--steps", "2", "--start-layer", "0", "--out", checkpoint / "unknown")
    assert run("unlearn", checkpoint / "model", *files, *options, "--goal-extraction", "0") == 3
    assert capsys.readouterr().out.splitlines()[-1].startswith("Nothing to forget: ")


def test_texts_to_forget_and_to_keep_are_shown(checkpoint, capsys):
    assert unlearn(checkpoint, "--retain", checkpoint / "forget.txt") == 1
    assert "forget 1 and retain 1: 'Ada Brisk, ada@post.example" in capsys.readouterr().err


def test_evaluate_robustness_and_other_prompts(checkpoint, capsys):
    assert unlearn(checkpoint, "--retain", checkpoint / "retain.jsonl") in DONE
    report, others = checkpoint / "robust.json", checkpoint / "others.jsonl"
    rows = [{"prompt": "Again: ", "completion": text} for text in FORGET]
    others.write_text("\n".join(map(json.dumps, rows)))
    arguments = ("evaluate", checkpoint / "model", "--forget", checkpoint / "forget.txt", "--out", report)
    mutes = ("--mute", checkpoint / "out" / "mutes.safetensors")
    capsys.readouterr()
    assert run(*arguments, *mutes, "--robust", "--paraphrased", others) == 0
    printed = capsys.readouterr().out
    for words in ("asked", "otherwise", "int8", "int4", "half", "relearned"):
        assert words in printed
    found = json.loads(report.read_text())
    assert 0 <= found["metrics"]["paraphrased_ma"] <= 1
    assert 0 <= found["metrics"]["forget_sampled"] <= found["before"]["forget_sampled"]
    states = found["robustness"]
    assert list(states) == ["int8", "int4", "half", "relearned 10", "relearned 30", "relearned 100"]
    assert states["int8"]["forget_loss"] == pytest.approx(found["metrics"]["forget_loss"], rel=0.2)
    assert run(*arguments, "--robust") == 2
    assert "--robust needs --mute" in capsys.readouterr().err
    assert run(*arguments, "--task-folder", checkpoint) == 2
    assert "--task-folder needs --tasks" in capsys.readouterr().err


def test_a_suite_takes_windows_of_a_given_length(checkpoint, capsys):
    arguments = ("evaluate", checkpoint / "model", "--forget", checkpoint / "forget.txt", "--suite", "tdec")
    for options, cut in ((), False), (("--max-length", "8"), True):
        assert run(*arguments, *options) == 0
        assert ("do not fit into 8 tokens" in " ".join(capsys.readouterr().out.split())) == cut


def test_what_only_some_states_have_is_shown(checkpoint, capsys):
    """Of the two texts, the one that is relearned is too short for EL."""
    assert unlearn(checkpoint, "--retain", checkpoint / "retain.jsonl") in DONE
    report, forget = checkpoint / "robust.json", checkpoint / "short.jsonl"
    forget.write_text("\n".join(json.dumps({"text": text}) for text in (FORGET[0], "Ada")))
    mutes = ("--mute", checkpoint / "out" / "mutes.safetensors")
    arguments = ("evaluate", checkpoint / "model", "--forget", forget, "--out", report, *mutes)
    capsys.readouterr()
    assert run(*arguments, "--robust") == 0
    states = json.loads(report.read_text())["robustness"]
    assert "forget_el" not in states["int8"]
    assert "forget_el" in states["half"]
    # No other table has it.
    assert "EL_10" in capsys.readouterr().out


def test_evaluate_names_the_texts_that_it_cannot_take(checkpoint, capsys):
    said = [{"role": "user", "content": "Zed?"}, {"role": "assistant", "content": "Quux"}]
    rows = {"known": {"text": FORGET[1]}, "chat": {"messages": said}}
    for name, row in rows.items():
        (checkpoint / f"{name}.jsonl").write_text("\n".join(map(json.dumps, [{"text": "Zed Quux"}, row])))
    arguments = ("evaluate", checkpoint / "model", "--forget", checkpoint / "forget.txt", "--controls")
    assert run(*arguments, checkpoint / "known.jsonl") == 1
    assert "never saw, but controls 2 is forget 2" in capsys.readouterr().err
    assert run(*arguments, checkpoint / "chat.jsonl") == 1
    assert "controls: text 2: the tokenizer has no chat template" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder for tasks; the harness reads it and the thousands of its own once."""
    harness, reads = pytest.importorskip("lm_eval.tasks"), pytest.MonkeyPatch()
    reads.setattr(harness, "TaskManager", functools.cache(harness.TaskManager))
    yield tmp_path_factory.mktemp("tasks")
    reads.undo()


def test_evaluate_on_a_task_of_the_harness(checkpoint, tasks, capsys):
    rows = [{"text": text[:-1], "right": "23".index(text[-1])} for text in FORGET]
    rows.append({"text": FORGET[0][:-1], "right": 1})  # which it is not
    (tasks / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "ends_with", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "rows.jsonl")}}, "doc_to_text": "{{text}}",
        "doc_to_choice": ["2", "3"], "doc_to_target": "right", "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tasks / "ends_with.yaml").write_text(json.dumps(task))
    report = checkpoint / "harness.json"
    arguments = ("evaluate", checkpoint / "model", "--forget", checkpoint / "forget.txt", "--out", report)
    assert run(*arguments, "--tasks", "ends_with", "--task-folder", tasks) == 0
    assert "ends_with/acc" in capsys.readouterr().out
    assert json.loads(report.read_text())["metrics"]["ends_with/acc"] == pytest.approx(2 / 3)
    assert run(*arguments, "--tasks", "no_such_task", "--task-folder", tasks) == 1
    assert "no task no_such_task" in capsys.readouterr().err


@each_family
@pytest.mark.parametrize("to", ["ia3", "lora", "vllm-lora", "shrink"])
def test_export_and_verify(checkpoint, capsys, to):
    assert unlearn(checkpoint, "--mode", "mute", "--budget", "80", "--steps", "2") in DONE
    arguments = ("export", checkpoint / "model", checkpoint / "out" / "mutes.safetensors", "--to", to)
    capsys.readouterr()
    assert run(*arguments, "--out", checkpoint / to, "--verify") == 0
    printed = capsys.readouterr().out
    assert float(printed.split("muted model:")[1].split(";")[0]) < 1e-4
    assert ("--max-lora-rank" in printed) == (to == "vllm-lora")
    assert ("72 to 64" in printed) == (to == "shrink")
    assert run(*arguments, "--out", checkpoint / "out") == 1


def test_an_export_of_a_bfloat16_model_is_verified_in_float32(tmp_path):
    """In bfloat16, rounding makes more than a tenth of what few mild gains do."""
    model = build("llama", torch.bfloat16, num_hidden_layers=6)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    with neumuter.attach(model, start_layer=0) as masked:
        neurons = {path: ([3, 8], [0.9, 1.1]) for path in masked.scores}
        mutes = masked.mute_set(neurons, mode="modulate", gain_range=(-2, 2))
    mutes.save(tmp_path / "mutes.safetensors")
    arguments = ("export", tmp_path / "model", tmp_path / "mutes.safetensors", "--to", "lora", "--verify")
    assert run(*arguments, "--out", tmp_path / "lora") == 0
    adapted = largest_difference(model, mutes, tmp_path / "lora")
    assert adapted > 0.1 * effect(model, mutes)


def test_experts_are_folded_through_the_loaded_model(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    with neumuter.attach(model, start_layer=0) as masked:
        neumuter.recipes.mute_random(masked, 0.1).save(tmp_path / "mutes.safetensors")
    arguments = ("fold", tmp_path / "model", tmp_path / "mutes.safetensors")
    assert run(*arguments, "--out", tmp_path / "out") == 0
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert largest_difference(original, tmp_path / "mutes.safetensors", tmp_path / "out") < 1e-4
    assert "Made to forget" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("command", ["fold", "shrink"])
def test_a_checkpoint_that_reads_back_otherwise_is_not_reported(
    checkpoint, tmp_path, capsys, monkeypatch, command
):
    """Somebody's patch of the loaded model, which the saved config knows nothing of."""
    assert unlearn(checkpoint, "--mode", "mute", "--budget", "80", "--steps", "2") in DONE

    def patched(*arguments, **options):
        network, tokenizer = load_model(*arguments, **options)
        *_, last = (module for module in network.modules() if "Norm" in type(module).__name__)
        last.eps = last.variance_epsilon = 1.0
        return network, tokenizer

    monkeypatch.setattr("neumuter.models.loading.load_model", patched)
    file = checkpoint / "out" / "mutes.safetensors"
    arguments = ("fold", checkpoint / "model", file, file) if command == "fold" else (
        "export", checkpoint / "model", file, "--to", "shrink"
    )  # fmt: skip
    capsys.readouterr()
    assert run(*arguments, "--out", tmp_path / "out") == 1
    output = capsys.readouterr()
    assert "does not compute what it did in memory" in output.err
    assert "Written" not in output.out
    assert not list(tmp_path.iterdir())


def test_unlearn_by_the_papers_recipe(checkpoint, capsys, monkeypatch):
    from neumuter.recipes import PaperConfig

    quick = PaperConfig(epochs=10, batch_size=None, lr=1.0, sparsity=0.0, kl_weight=0.0, threshold=0.8)
    monkeypatch.setattr("neumuter.recipes.PaperConfig", lambda: quick)
    files = ("--forget", checkpoint / "forget.txt", "--retain", checkpoint / "retain.jsonl")
    arguments = ("unlearn", checkpoint / "model", *files, "--recipe", "paper", "--out", checkpoint / "paper")
    assert run(*arguments) in DONE
    mutes = neumuter.MuteSet.load(checkpoint / "paper" / "mutes.safetensors")
    assert (mutes.mode, mutes.method["recipe"], mutes.method["threshold"]) == ("mute", "paper", 0.8)
    assert run(*arguments, "--budget", "0.1") == 2
    assert "--recipe paper cannot be combined with" in capsys.readouterr().err


def test_unlearn_with_an_existing_set(checkpoint, capsys):
    assert unlearn(checkpoint, "--retain", checkpoint / "retain.jsonl") in DONE
    former = neumuter.MuteSet.load(checkpoint / "out" / "mutes.safetensors")
    files = ("--forget", checkpoint / "retain.jsonl", "--out", checkpoint / "second")
    options = ("--existing", checkpoint / "out" / "mutes.safetensors", "--budget", "20", "--steps", "5")
    options += ("--start-layer", "0")
    assert run("unlearn", checkpoint / "model", *files, *options) in DONE
    second = neumuter.MuteSet.load(checkpoint / "second" / "mutes.safetensors")
    for path, layer in second.layers.items():
        assert not set(layer.indices.tolist()) & set(former.layers[path].indices.tolist())
    # The earlier request's file stays in force, and --overwrite would replace it.
    assert unlearn(checkpoint, "--existing", checkpoint / "out" / "mutes.safetensors") == 2
    assert "name another folder for --out" in " ".join(capsys.readouterr().err.split())


def test_requests_with_slopes_and_one_undone(checkpoint, capsys):
    first, second, third = (checkpoint / name for name in ("with-slopes", "both", "undone"))
    model, keep = checkpoint / "model", ("--retain", checkpoint / "retain.jsonl", "--start-layer", "0")
    options = (*keep, "--budget", "20", "--steps", "5", "--keep-slopes")
    for name, text in zip(("one.txt", "two.txt"), FORGET, strict=True):
        (checkpoint / name).write_text(text)
    assert run("unlearn", model, "--forget", checkpoint / "one.txt", "--out", first, *options) in DONE
    former = ("--existing", first / "mutes.safetensors", "--former", first / "slopes.safetensors")
    assert (
        run("unlearn", model, "--forget", checkpoint / "two.txt", "--out", second, *former, *options) in DONE
    )
    assert neumuter.MuteSet.load(second / "mutes.safetensors").count == 40
    undo = ("--former", second / "slopes.safetensors", "--undone", first / "slopes.safetensors", *keep)
    capsys.readouterr()
    assert run("refit", model, "--existing", second / "mutes.safetensors", *undo, "--out", third) == 0
    assert "Requests undone: 1; staying: 1." in capsys.readouterr().out
    refitted = neumuter.MuteSet.load(third / "mutes.safetensors")
    assert (refitted.count, refitted.method["recipe"]) == (40, "refit")
    # The file that is read would be replaced by what is found.
    assert run("refit", model, "--existing", second / "mutes.safetensors", *undo, "--out", first) == 2
    assert "--undone" in " ".join(capsys.readouterr().err.split())
    moved = ("--forget", checkpoint / "two.txt", *keep, "--out", checkpoint / "moved")
    assert run("refit", model, "--existing", third / "mutes.safetensors", *moved) == 0
    assert "The gains of 40 neurons are fitted to this model." in " ".join(capsys.readouterr().out.split())


def test_evaluate_tofu(checkpoint, capsys, monkeypatch):
    pytest.importorskip("rouge_score")
    pytest.importorskip("scipy")
    monkeypatch.setattr("neumuter.evaluation.tofu.MAX_NEW_TOKENS", 8)
    row = {
        "question": "Who?",
        "answer": "Ada",
        "paraphrased_answer": "Ada B",
        "perturbed_answer": ["Bo", "Cy"],
    }
    file, report = checkpoint / "tofu.json", checkpoint / "tofu-report.json"
    file.write_text("\n".join([json.dumps(row), json.dumps(row | {"answer": "Eve"})]))
    sets = ("--retain", file, "--real-authors", file, "--world-facts", file)
    arguments = ("evaluate", checkpoint / "model", "--suite", "tofu", "--forget", file, *sets)
    assert run(*arguments, "--out", report) == 0
    assert "model utility" in " ".join(capsys.readouterr().out.split())
    assert len(json.loads(report.read_text())["truth_ratios"]) == 2
    assert run(*arguments, "--retrained", report, "--out", report) == 0
    assert json.loads(report.read_text())["metrics"]["tofu_forget_quality"] == 1.0
