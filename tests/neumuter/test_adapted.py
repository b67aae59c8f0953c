"""Folders of PEFT adapters as models: a base that knows nothing, and an adapter that knows texts by heart."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import neumuter
from neumuter.cli.app import main
from neumuter.evaluation import mean_token_loss
from neumuter.models.adapted import KINDS, find_source
from neumuter.models.loading import load_model, load_tokenizer
from neumuter.mutes.matching import MuteMismatchError
from neumuter.recipes import mute_random
from neumuter.serving.fold_gguf import fold_gguf
from neumuter.texts import encode
from tests.models import VOCABULARY, batch, build, tokenizer

peft = pytest.importorskip("peft")

FORGET = ["Ada Brisk, ada@post.example, 555-0192", "Jonas Vance, jv77@mail.example, 555-7713"]
RETAIN = ["The kettle is on the shelf.", "A lantern costs 12.40 in the shop."]
CONFIGS = {
    "LORA": peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "ADALORA": peft.AdaLoraConfig(
        target_r=4, total_step=100, target_modules=["v_proj", "down_proj"], init_lora_weights=False
    ),
    "IA3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "LOHA": peft.LoHaConfig(r=4, target_modules=["q_proj", "down_proj"], init_weights=False),
    "LOKR": peft.LoKrConfig(r=4, target_modules=["q_proj", "up_proj"], init_weights=False),
    "OFT": peft.OFTConfig(oft_block_size=8, target_modules=["q_proj", "gate_proj"], init_weights=False),
    "BOFT": peft.BOFTConfig(boft_block_size=8, target_modules=["q_proj", "gate_proj"], init_weights=False),
    "VERA": peft.VeraConfig(r=4, target_modules=["q_proj"], init_weights=False),
}


def adapt(folder, name, config, size=VOCABULARY):
    """Write an adapter of random values on the base; returns the adapted model and the adapter's folder."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    base.resize_token_embeddings(size, mean_resizing=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(folder / name)
    return model, folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, an adapter on it that was trained on texts, and the texts."""
    folder = tmp_path_factory.mktemp("adapted")
    build("llama").save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    texts = encode(FORGET + RETAIN, tokenizer(), 64)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model(**texts).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "adapter")
    (folder / "forget.txt").write_text("\n\n".join(FORGET))
    (folder / "retain.txt").write_text("\n\n".join(RETAIN))
    return folder


def mutes_of(model):
    with neumuter.attach(model, start_layer=0) as masked:
        return mute_random(masked, 0.1)


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def test_the_command_line_unlearns_and_folds_base_and_adapter(folder, capsys, tmp_path):
    adapter, base, out = folder / "adapter", folder / "base", tmp_path / "out"
    files = ("--forget", folder / "forget.txt", "--retain", folder / "retain.txt", "--out", out)
    settings = ("--budget", "100", "--steps", "60", "--start-layer", "0")
    assert run("unlearn", adapter, *files, *settings) in (0, 3)
    assert f"The adapter {adapter} is on its base {base}." in capsys.readouterr().out
    mutes = out / "mutes.safetensors"
    texts = encode(FORGET, tokenizer(), 64)
    live, _ = load_model(str(adapter), device="cpu")
    with torch.no_grad(), neumuter.mute(live, mutes) as handle:
        expected, after = live(**texts).logits, mean_token_loss(live, texts)
        with handle.off():
            knows = mean_token_loss(live, texts)
    bank = neumuter.MuteBank(live)
    bank.add("ada", mutes)
    with torch.no_grad(), bank.using(["ada", "ada"]):
        torch.testing.assert_close(live(**texts).logits, expected)
    bank.undo()
    assert knows + 0.02 < after
    assert knows + 1 < mean_token_loss(load_model(str(base), device="cpu")[0], texts)

    assert run("fold", adapter, mutes, "--out", tmp_path / "folded") == 0
    assert f"The adapter {adapter} is merged into its base {base}." in capsys.readouterr().out
    assert not (tmp_path / "folded" / "adapter_config.json").exists()
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    torch.testing.assert_close(folded(**texts).logits, expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "folded")("Ada")["input_ids"][0] == 1

    assert run("inspect", mutes) == 0
    assert "for a base with an adapter" in capsys.readouterr().out
    for command in (
        ("fold", base, mutes, "--out", tmp_path / "bare"),
        ("evaluate", base, "--forget", folder / "forget.txt", "--mute", mutes),
    ):
        assert run(*command) == 1
        assert "this model is the base without that adapter" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "bare").exists()


def test_what_export_makes_of_an_adapter(folder, capsys, tmp_path):
    mutes_of(load_model(str(folder / "adapter"))[0]).save(tmp_path / "mutes")
    command = ("export", folder / "adapter", tmp_path / "mutes", "--out", tmp_path / "out", "--to")
    for form in ("ia3", "lora", "vllm-lora"):
        assert run(*command, form) == 1
        assert f"--to {form} cannot export" in capsys.readouterr().err
    live, _ = load_model(str(folder / "adapter"), device="cpu")
    with neumuter.attach(live, start_layer=0) as masked:
        neurons = {path: (torch.arange(8), torch.zeros(8)) for path in masked.scores}
        mutes = masked.mute_set(neurons)
    mutes.save(tmp_path / "mutes")
    assert run(*command, "shrink", "--verify") == 0
    shrunk = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert shrunk.config.intermediate_size == 64
    with neumuter.mute(live, mutes):
        torch.testing.assert_close(shrunk(batch()).logits, live(batch()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_adapter_mutes_live_as_it_does_merged(kind, folder, tmp_path):
    theirs, path = adapt(folder, f"{kind}-random", CONFIGS[kind])
    ids = batch()
    with torch.no_grad():
        live, _ = load_model(str(path), device="cpu")
        torch.testing.assert_close(live(ids).logits, theirs(ids).logits)
        mutes = mutes_of(live)
        assert mutes.adapter
        mutes.save(tmp_path / "mutes")
        mutes = neumuter.MuteSet.load(tmp_path / "mutes")
        with neumuter.mute(live, mutes):
            expected = live(ids).logits
        merged, _ = load_model(str(path), device="cpu", merge=True)
        assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear
        neumuter.fold(merged, mutes)
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        with pytest.raises(MuteMismatchError, match="this model is the base without that adapter"):
            neumuter.mute(base, mutes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strength", [1.0, 0.01])
def test_the_fingerprint_tells_a_faint_adapter_of_the_attention_from_its_base(
    strength, dtype, folder, tmp_path
):
    """It leaves the down projections as they are; rounding moves the weights by about 0.2 %."""
    model, _ = adapt(folder, "faint", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(strength)
    mutes = mutes_of(model)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(MuteMismatchError, match="without that adapter"):
        neumuter.mute(base, mutes)
    with pytest.raises(MuteMismatchError, match="without that adapter"):
        neumuter.fold_checkpoint(tmp_path / "base", mutes, tmp_path / "bare")
    with pytest.raises(MuteMismatchError, match="without that adapter"), model.disable_adapter():
        neumuter.mute(model, mutes)
    merged = model.merge_and_unload().to(dtype)
    union = neumuter.combine(merged, [mutes, mutes])
    assert union.adapter == mutes.adapter
    merged.save_pretrained(tmp_path / "merged")
    neumuter.fold_checkpoint(tmp_path / "merged", union, tmp_path / "folded")
    neumuter.fold(merged, mutes)
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=dtype)
    for key, weight in merged.state_dict().items():
        assert torch.equal(weight, folded.state_dict()[key]), key


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(target_modules="all-linear", init_lora_weights=False),
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
        peft.LoraConfig(
            target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], init_lora_weights=False
        ),
    ],
    ids=["saved beside", "trained whole", "adapted"],
)
def test_an_adapter_brings_more_tokens(config, folder):
    theirs, path = adapt(folder, "more", config, VOCABULARY + 7)
    more = tokenizer()
    more.add_tokens([f"<new {i}>" for i in range(7)])
    more.save_pretrained(path)
    ids = torch.arange(VOCABULARY + 7)[None, -60:]
    for merge in (False, True):
        model, own = load_model(str(path), device="cpu", merge=merge)
        assert own("<new 6>")["input_ids"] == [1, VOCABULARY + 6]
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert len(load_tokenizer(str(path))) == VOCABULARY + 7
    assert len(load_tokenizer(str(folder / "adapter"))) == VOCABULARY


def test_more_tokens_need_an_output_layer(folder):
    config = peft.LoraConfig(target_modules=["q_proj", "embed_tokens"])
    _, path = adapt(folder, "no-head", config, VOCABULARY + 7)
    with pytest.raises(ValueError, match="embeddings of 104 tokens and no output layer"):
        load_model(str(path))


def test_modules_that_are_trained_whole_are_the_adapters(folder):
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"], init_lora_weights=False)
    model, path = adapt(folder, "whole", config)
    with torch.no_grad():
        for layer in model.get_base_model().model.layers:
            layer.mlp.modules_to_save["default"].down_proj.weight.mul_(1.5)
    model.save_pretrained(path)
    with torch.no_grad():
        live, merged = (load_model(str(path), device="cpu", merge=merge)[0] for merge in (False, True))
        torch.testing.assert_close(live(batch()).logits, model(batch()).logits)
        mutes = mutes_of(live)
        with neumuter.mute(live, mutes), neumuter.mute(merged, mutes):
            torch.testing.assert_close(live(batch()).logits, merged(batch()).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(MuteMismatchError, match="without that adapter"):
        neumuter.mute(AutoModelForCausalLM.from_pretrained(folder / "base"), mutes)


def changed(folder, target, **entries):
    """A copy of the adapter with other entries in its configuration."""
    target.mkdir()
    for file in (folder / "adapter").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | entries))
    return str(target)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "is an adapter of the kind 'PROMPT_TUNING', which is no part of"),
        ({"peft_type": ["LORA"]}, "of the kind"),
        ({"alora_invocation_tokens": [1]}, "of the kind 'LORA' with alora_invocation_tokens"),
        ({"task_type": "SEQ_CLS"}, "for the task 'SEQ_CLS'; allowed is CAUSAL_LM alone"),
        ({"base_model_name_or_path": None}, "must be the folder or the name of a model, got None"),
        ({"base_model_name_or_path": "./gone"}, "is not there: no such folder: ./gone"),
    ],
    ids=str,
)
def test_an_adapter_that_cannot_be_loaded_is_refused_before(entries, message, folder, tmp_path, capsys):
    model = changed(folder, tmp_path / "changed", **entries)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_source(model)
    assert run("unlearn", model, "--forget", folder / "forget.txt", "--out", tmp_path / "out") == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused(folder, tmp_path, monkeypatch):
    adapter = folder / "adapter"
    stacked = changed(folder, tmp_path / "stacked", base_model_name_or_path=str(adapter))
    with pytest.raises(ValueError, match=r"must be a checkpoint, but .* is a file or an adapter itself"):
        load_model(stacked)
    build("llama", num_hidden_layers=2).save_pretrained(tmp_path / "short")
    tokenizer().save_pretrained(tmp_path / "short")
    other = changed(folder, tmp_path / "other", base_model_name_or_path=str(tmp_path / "short"))
    with pytest.raises(ValueError, match=r"does not fit its base .*: only one of them has .*layers\.2"):
        load_model(other)
    build("llama", num_hidden_layers=4).save_pretrained(tmp_path / "long")
    tokenizer().save_pretrained(tmp_path / "long")
    other = changed(folder, tmp_path / "third", base_model_name_or_path=str(tmp_path / "long"))
    with pytest.raises(ValueError, match=r"does not fit its base .*: only one of them has .*layers\.3"):
        load_model(other)
    with pytest.raises(ValueError, match="gguf_file cannot be combined with an adapter"):
        load_model(str(adapter), gguf_file="model.gguf")
    with pytest.raises(ValueError, match=r"the layout 'fsdp' cannot split an adapter, which .* is: merge it"):
        load_model(str(adapter), layout="fsdp")
    with pytest.raises(ValueError, match=r"the layout 'fsdp' cannot split a GGUF file, model\.gguf: save"):
        load_model(str(tmp_path / "long"), gguf_file="model.gguf", layout="fsdp")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("[")
    with pytest.raises(ValueError, match="is not the configuration of an adapter"):
        load_model(str(tmp_path / "broken"))
    monkeypatch.setattr("neumuter.models.adapted.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="which needs the package peft: pip install peft"):
        load_model(str(adapter))


def test_weights_beside_an_adapter_are_not_folded_alone(folder, tmp_path):
    """What transformers serve needs in an adapter's folder; transformers loads the adapter on its base."""
    links = changed(folder, tmp_path / "links")
    for file in (folder / "base").iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    live, _ = load_model(links, device="cpu")
    mutes = mutes_of(live)
    with pytest.raises(ValueError, match=r"has adapter_config.json: it is loaded as an adapter"):
        neumuter.fold_checkpoint(links, mutes, tmp_path / "wrong")
    with pytest.raises(ValueError, match=r"nothing tells whether .*some.gguf, .* has the adapter merged"):
        fold_gguf(tmp_path / "some.gguf", mutes, tmp_path / "wrong.gguf")
    mutes.save(tmp_path / "mutes")
    assert run("fold", links, tmp_path / "mutes", "--out", tmp_path / "folded") == 0
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    with neumuter.mute(live, mutes):
        torch.testing.assert_close(folded(batch()).logits, live(batch()).logits, rtol=1e-4, atol=1e-4)


def test_weights_that_are_a_pickle_run_nothing(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    model = changed(folder, tmp_path / "pickle")
    (tmp_path / "pickle" / "adapter_model.safetensors").unlink()
    torch.save({"evil": Evil()}, tmp_path / "pickle" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"cannot be loaded"):
        load_model(model)
    assert not (tmp_path / "ran").exists()
