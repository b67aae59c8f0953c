"""What commands refuse before they load a model, and what they leave behind: nothing."""

import subprocess
import sys

import huggingface_hub
import pytest
import transformers

import neumuter
from neumuter.cli.app import main
from neumuter.cli.arguments import parse_budget
from neumuter.files import check_writable, made_folder
from neumuter.models.hub import find_model
from neumuter.models.loading import load_model
from neumuter.recipes import mute_random
from neumuter.report.progress import show_progress
from tests.models import build, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, texts, and a mute file in a folder of its own."""
    folder = tmp_path_factory.mktemp("arguments")
    model = build("llama")
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "texts.txt").write_text("Ada Brisk, ada@post.example\n\nJonas Vance, 555-7713")
    (folder / "out").mkdir()
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "unfinished.safetensors").write_text("")
    with neumuter.attach(model, start_layer=0) as masked:
        mute_random(masked, 0.1).save(folder / "out" / "mutes.safetensors")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Function: (exit code, what is printed) of a command in the folder, which must not load the model."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        "neumuter.models.loading.load_model", lambda *_, **__: pytest.fail("the model is loaded")
    )

    def call(line):
        with pytest.raises(SystemExit) as stop:
            main(line.split())
        captured = capsys.readouterr()
        return stop.value.code, " ".join((captured.err + captured.out).replace("│", "").split())

    return call


UNLEARN = "unlearn model --forget texts.txt --out new/folder "
REFUSED = {
    "a goal without a search": (UNLEARN + "--goal-ma 0.5", "--goal-ma and --goal-secrets need --budget auto"),
    "another goal without a search": (UNLEARN + "--goal-secrets 0.5", "need --budget auto"),
    "a goal for secrets that nobody knows": (
        UNLEARN + "--budget auto --no-calibrate --goal-secrets 0.5",
        "--goal-secrets needs to know secrets",
    ),
    "slopes without the set in force": (UNLEARN + "--former texts.txt", "--former needs --existing"),
    "paraphrases of a suite": (
        "evaluate model --forget texts.txt --suite tofu --paraphrased texts.txt",
        "--paraphrased",
    ),
    "facts without their suite": (
        "evaluate model --forget texts.txt --world-facts texts.txt",
        "--world-facts",
    ),
    "an ambiguous budget": (UNLEARN + "--budget 1", "write 1% or 1.0"),
    "a share above 1": (UNLEARN + "--budget 150%", "share in (0, 1]"),
    "no neurons": (UNLEARN + "--budget 0", "share in (0, 1]"),
    "more neurons than there are": (UNLEARN + "--budget 9999", "from 1 to 144 neurons"),
    "a layer that is not there": (UNLEARN + "--start-layer 3", "from 0 to 2"),
    "a device that is not there": (UNLEARN + "--device-map auto --device cpu", "cannot be combined with"),
    "no forget file": ("unlearn model --forget absent.txt --out new", "No such file"),
    "no retain file": (UNLEARN + "--retain absent.txt", "No such file"),
    "no existing set": (UNLEARN + "--existing absent.safetensors", "No such file"),
    "no slopes": (UNLEARN + "--existing out/mutes.safetensors --former absent", "No such file"),
    "no slopes of those undone": (
        "refit model --existing out/mutes.safetensors --undone absent --out new",
        "No such file",
    ),
    "a mute file as slopes": (
        "refit model --existing out/mutes.safetensors --undone out/mutes.safetensors --out new",
        "not a valid file of slopes",
    ),
    "nothing to refit for": (
        "refit model --existing out/mutes.safetensors --out new",
        "--undone or --forget",
    ),
    "slopes for other weights": (
        "refit model --existing out/mutes.safetensors --forget texts.txt --former texts.txt --out new",
        "--former needs --undone",
    ),
    "no rewriting model": (UNLEARN + "--rewrite-with ./absent", "no such folder: ./absent"),
    "no model": ("unlearn ./absent --forget texts.txt --out new", "no such folder: ./absent"),
    "an unfinished run in the way": ("unlearn model --forget texts.txt --out unfinished", "--resume"),
    "a run that has ended": ("unlearn model --forget texts.txt --out out --resume", "--overwrite"),
    "a mute file in the way": ("unlearn model --forget texts.txt --out out", "--overwrite"),
    "a file as a folder": (
        "unlearn model --forget texts.txt --out texts.txt/new",
        "File exists: 'texts.txt'",
    ),
    "no folder for the report": ("evaluate model --forget texts.txt --out new/r.json", "no such folder: new"),
    "a report that is no JSON": ("evaluate model --forget texts.txt --out out/mutes.safetensors", ".json"),
    "no mute file": ("evaluate model --forget texts.txt --mute absent", "No such file"),
    "no mute file to export": ("export model absent --to lora --out new/x", "No such file"),
    "a folder that is taken": (
        "export model out/mutes.safetensors --to lora --out out",
        "not an empty folder",
    ),
    "no mute file to fold": ("fold model absent absent --out new/x", "No such file"),
    "no model to fold": ("fold ./absent out/mutes.safetensors --out new/x", "no such folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused_before_anything_is_loaded(run, folder, name):
    line, message = REFUSED[name]
    before = sorted(folder.rglob("*"))
    code, printed = run(line)
    assert code in (1, 2)
    assert message in printed
    assert sorted(folder.rglob("*")) == before


def test_packages_that_are_missing_are_named_before(run, monkeypatch):
    monkeypatch.setattr("neumuter.cli.arguments.find_spec", lambda name: None)
    for line, packages in {
        UNLEARN + "--quantize 4bit": "accelerate",
        "evaluate model --forget texts.txt --tasks t": "lm-eval",
        "evaluate model --forget texts.txt --suite tofu --retrained out": "rouge-score",
        "evaluate model --forget texts.txt --mute out/mutes.safetensors --robust": "torchao",
        "export model out/mutes.safetensors --to ia3 --out new": "peft",
    }.items():
        if "--retrained" in line:
            monkeypatch.setattr("neumuter.cli.evaluate._read_report", lambda path: None)
        code, printed = run(line)
        assert code == 1
        assert f"pip install {packages}" in printed


@pytest.mark.parametrize(
    ("text", "budget"),
    [("1%", 0.01), ("0.5%", 0.005), ("100%", 1.0), ("1.0", 1.0), ("0.01", 0.01), ("1e-3", 0.001), ("2", 2)],
)
def test_a_budget_is_read(text, budget):
    assert parse_budget(text) == pytest.approx(budget)
    assert type(parse_budget(text)) is type(budget)


def test_the_version_is_printed(run):
    assert run("--version") == (0, neumuter.__version__)


def asked(monkeypatch, error=None, cached=None):
    def answer(self, name, timeout):
        if error:
            raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: cached)


def test_a_model_is_looked_up_once_and_without_retries(monkeypatch, tmp_path):
    assert not find_model(str(tmp_path))
    asked(monkeypatch)
    assert not find_model("org/model")
    unknown = huggingface_hub.errors.RepositoryNotFoundError.__new__(
        huggingface_hub.errors.RepositoryNotFoundError
    )
    asked(monkeypatch, unknown)
    with pytest.raises(FileNotFoundError, match="no such folder: small-modle, nor a model of that name"):
        find_model("small-modle")
    asked(monkeypatch, ConnectionError("Name or service not known"))
    with pytest.raises(FileNotFoundError, match=r"cannot be asked \(Name or service not known\)"):
        find_model("small-modle")
    asked(monkeypatch, ConnectionError("offline"), cached="/cache/config.json")
    assert find_model("org/model")


def test_offline_files_come_from_the_cache_alone(folder, monkeypatch):
    seen = []
    monkeypatch.setattr("neumuter.models.adapted.find_model", lambda model: True)
    for loader in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
        original = loader.from_pretrained

        def load(name, original=original, **options):
            seen.append(options.pop("local_files_only"))
            return original(name, **options)

        monkeypatch.setattr(loader, "from_pretrained", load)
    load_model(str(folder / "model"))
    assert seen == [True, True]


def test_a_model_is_placed_as_asked(folder, monkeypatch):
    model, _ = load_model(str(folder / "model"), device="cpu", attention="eager")
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="device 'nowhere' cannot be used"):
        load_model(str(folder / "model"), device="nowhere")
    seen = {}

    def load(name, **options):
        seen.update(options)
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    load_model(str(folder / "model"), device_map="auto", quantize="4bit")
    assert seen["device_map"] == "auto"
    assert seen["quantization_config"].load_in_4bit
    load_model(str(folder / "model"), device="cpu", quantize="8bit")
    assert seen["device_map"] == "cpu"
    assert seen["quantization_config"].load_in_8bit


def fail_in(folder, name=None):
    with made_folder(folder) as made:
        if name:
            (made / name).touch()
        raise RuntimeError


def test_folders_that_stay_empty_go(tmp_path):
    with pytest.raises(RuntimeError):
        fail_in(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError):
        fail_in(tmp_path / "a" / "b", "kept")
    assert (tmp_path / "a" / "b" / "kept").exists()
    check_writable(tmp_path / "c" / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(FileExistsError):
        check_writable(tmp_path / "a" / "b" / "kept" / "new")


def test_without_a_terminal_every_tenth_is_a_line(capsys):
    with show_progress("Counting") as advance:
        for step in range(1, 41):
            advance(step, 40, {"loss": 1.5, "muted": 0.01})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "Counting: 10 % (4 of 40), loss 1.500, muted 1.00%"
    assert lines[-1].startswith("Counting: 100 % (40 of 40)")


def test_no_warning_of_another_library_is_shown(folder):
    code = "from neumuter.cli.app import main; main()"
    line = ["unlearn", "model", "--forget", "texts.txt", "--out", "new", "--start-layer", "9"]
    done = subprocess.run([sys.executable, "-c", code, *line], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error"]
