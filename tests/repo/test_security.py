"""What SECURITY.md promises: nothing read runs, and nothing read says where to write."""

import ast
import json
from pathlib import Path

import pytest
import torch

import neumuter
from neumuter import MuteFileError, MuteMismatchError, MuteSet
from neumuter.cli.app import main
from neumuter.recipes import mute_random
from tests.models import build, tokenizer
from tests.neumuter.test_mute_set import join, split

ROOT = Path(__file__).parents[2]
FOLDERS = ("neumuter_kernels", "python", "bench", "examples")
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
PICKLING = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
RUNNING = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
UNSAFE = {"torch.save", "torch.jit.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
KEYWORDS = {"shell": False, "allow_pickle": False, "trust_remote_code": False, "weights_only": True}


def offences(source):
    """What in a Python source could run what it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            yield from PICKLING.intersection(name.split(".")[0] for name in names)
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
            if name in RUNNING | UNSAFE or (name == "torch.load" and "weights_only" not in given):
                yield name
        elif isinstance(node, ast.keyword) and node.arg in KEYWORDS:
            if not (isinstance(node.value, ast.Constant) and node.value.value is KEYWORDS[node.arg]):
                yield node.arg
        elif isinstance(node, ast.Dict):
            yield from KEYWORDS.keys() & {key.value for key in node.keys if isinstance(key, ast.Constant)}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import os.path, dill", "eval('1')", "os.system('ls')",
        "torch.load(path)", "torch.load(path, weights_only=False)", "torch.save(x, path)", "yaml.load(text)",
        "numpy.load(path, allow_pickle=True)", "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=trust)", "{'trust_remote_code': True}",
    ],
)  # fmt: skip
def test_the_scan_finds(source):
    assert list(offences(source))


def test_the_scan_lets_pass():
    source = (
        "import json\ntorch.load(p, weights_only=True)\nmodel.eval()\ntorch.compile(model)\nyaml.safe_load(t)"
    )
    assert list(offences(source)) == []


def test_no_source_unpickles_evaluates_or_trusts():
    assert len(SOURCES) > 80
    found = {str(path.relative_to(ROOT)): list(offences(path.read_text())) for path in SOURCES}
    assert {path: what for path, what in found.items() if what} == {}


def test_every_loading_by_transformers_says_that_code_is_not_trusted():
    calls = [
        node
        for path in (ROOT / "python").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained")
    ]
    silent = [call for call in calls if "trust_remote_code" not in {given.arg for given in call.keywords}]
    assert len(calls) - len(silent) >= 6
    # Those of PEFT, which take no such argument, read JSON and safetensors.
    peft = {"_import_peft().PeftModel.from_pretrained", "peft.PeftConfig.from_pretrained"}
    assert {ast.unparse(call.func) for call in silent} == peft


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with texts and a mute file, and another one whose code leaves a file behind when run."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = build("llama")
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    with neumuter.attach(model, start_layer=0) as masked:
        mute_random(masked, 0.1).save(folder / "mutes.safetensors")
    (folder / "texts.txt").write_text("One text.\n\nAnother text.")
    code, classes = f"open({str(folder / 'ran')!r}, 'w')\n", ("Config", "Model", "Tokenizer")
    (folder / "hostile").mkdir()
    code += "".join(f"class {name}: model_type = 'hostile'\n" for name in classes)
    (folder / "hostile" / "code.py").write_text(code)
    auto = dict.fromkeys(("AutoModelForCausalLM", "AutoModelForMaskedLM"), "code.Model")
    auto |= {"AutoConfig": "code.Config", "AutoTokenizer": ["code.Tokenizer", None]}
    config = json.dumps({"model_type": "hostile", "auto_map": auto})
    for name in ("config.json", "tokenizer_config.json"):
        (folder / "hostile" / name).write_text(config)
    return folder


COMMANDS = {
    "unlearn": "unlearn hostile --forget texts.txt --out out",
    "rewrite": "unlearn model --forget texts.txt --rewrite-with hostile --out out",
    "evaluate": "evaluate hostile --forget texts.txt",
    "fold": "fold hostile mutes.safetensors --out out",
    "export": "export hostile mutes.safetensors --to lora --out out",
    "plan": "plan hostile",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_no_command_runs_the_code_of_a_checkpoint(command, folder, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")  # were somebody asked, they would agree
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 1
    assert "trust_remote_code" in capsys.readouterr().err
    assert not (folder / "ran").exists()


class Opening:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_weights_in_a_pickle_do_not_run(folder, tmp_path, capsys):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / "model" / name).read_bytes())
    torch.save({"model.embed_tokens.weight": Opening(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(tmp_path), "--forget", str(folder / "texts.txt")])
    assert stop.value.code == 1
    assert "cannot be loaded: UnpicklingError" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)  # it would have
    assert (tmp_path / "ran").exists()


HOSTILE_PATHS = (
    "../../etc/passwd", "/etc/passwd", "a/b", "..", ".", "", "a..b", "a.", "~", "C:\\a", "a\\b", "a\x00b",
    "a\n", "a b", "é", "．．", "a" * 65, ".".join("a" * 33),
)  # fmt: skip


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_module_paths_of_a_mute_file_are_names(path, folder, tmp_path):
    header, payload = split((folder / "mutes.safetensors").read_bytes())
    metadata = json.loads(header["__metadata__"]["neumuter"])
    former, metadata["layers"][0]["path"] = metadata["layers"][0]["path"], path
    header["__metadata__"]["neumuter"] = json.dumps(metadata)
    for kind in ("indices", "gains"):
        header[f"{path}.{kind}"] = header.pop(f"{former}.{kind}")
    (tmp_path / "m.safetensors").write_bytes(join(header, payload))
    with pytest.raises(MuteFileError, match="not a module path"):
        MuteSet.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("path", ["__class__", "model.forward.__globals__", "model.layers.0.mlp.__dict__"])
def test_module_paths_are_looked_up_among_ffns_alone(path, folder):
    mutes = MuteSet.load(folder / "mutes.safetensors")
    former = next(iter(mutes.widths))
    for named in (mutes.layers, mutes.widths, mutes.fingerprint):
        named[path] = named.pop(former)
    model = build("llama")
    for use in (neumuter.mute, neumuter.fold, lambda model, mutes: neumuter.MuteBank(model).add("a", mutes)):
        with pytest.raises(MuteMismatchError, match=path):
            use(model, mutes)
    with pytest.raises(MuteMismatchError, match=path):
        neumuter.fold_checkpoint(folder / "model", mutes, folder / "never")


def test_what_a_mute_file_says_does_not_say_where_to_write(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    mutes = MuteSet.load("mutes.safetensors")
    mutes.method["recipe"] = mutes.metrics["after"]["../../escaped"] = "../../escaped"
    mutes.save(tmp_path / "m.safetensors")
    before = {path for place in (folder, tmp_path) for path in place.rglob("*")}
    for form in ("fold", "lora", "ia3"):
        pytest.importorskip("peft")
        out = tmp_path / form
        command = ["fold"] if form == "fold" else ["export", "--to", form]
        with pytest.raises(SystemExit) as stop:
            main([*command, "model", str(tmp_path / "m.safetensors"), "--out", str(out)])
        assert stop.value.code == 0
    after = {path for place in (folder, tmp_path) for path in place.rglob("*")}
    assert {path.relative_to(tmp_path).parts[0] for path in after - before} == {"fold", "lora", "ia3"}
