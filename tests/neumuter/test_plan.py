"""The plan of a model against what running it takes."""

import inspect
import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaConfig

from bench.models.step import SHAPES, peak_mib
from neumuter.cli.app import main
from neumuter.training import plan as planning
from neumuter.training.pace import CARD
from neumuter.training.plan import find_fitting, load_config, plan, plan_tensor_parallel
from neumuter.training.tracing import trace
from tests.models import EXPERTS, FAMILIES, LAYERS, OF_EXPERTS, WIDTH, config


@pytest.mark.parametrize(("shape", "dtype"), [("15M", torch.float32), ("15M", torch.bfloat16)])
def test_the_peak_is_that_of_a_real_step(shape, dtype, monkeypatch):
    """bench.models.step's step, in a process of its own: within 10 %."""
    # With instructions for bfloat16, oneDNN reorders weights into memory of its own, which is not planned.
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = plan(LlamaConfig(**SHAPES[shape]), samples=1, tokens=200, dtype=dtype)
    assert found.training / 2**20 == pytest.approx(peak_mib(shape, dtype, "ours", "cpu"), rel=0.1)


# Its forward pass looks at values.
UNPLANNED = ("jetmoe",)


@pytest.mark.parametrize("name", UNPLANNED)
def test_a_forward_pass_that_depends_on_values_is_refused(name):
    with pytest.raises(ValueError, match=r"the forward pass of \S+ depends on values"):
        plan(config(name), samples=2, tokens=16)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in UNPLANNED])
def test_counts_are_those_of_the_model(name):
    dtype = torch.bfloat16 if name in OF_EXPERTS else torch.float32
    model = AutoModelForCausalLM.from_config(config(name), dtype=dtype)
    if name in OF_EXPERTS and name != "llama4":
        with pytest.raises(ValueError, match="dtype must be bfloat16 for a model with experts"):
            plan(config(name), samples=2, tokens=16, dtype=torch.float32)
    found = plan(config(name), samples=2, tokens=16, dtype=dtype)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    assert found.weights == sum(t.numel() * t.element_size() for t in held)
    assert found.neurons % WIDTH == 0 or name in ("qwen2_moe", "bloom")
    assert found.masks == 16 * found.neurons
    assert found.activations > found.reference > 0
    chosen = found.neurons * (2 / EXPERTS if name in OF_EXPERTS else 1)  # two of four experts a token
    assert found.flops > 2 * 2 * 64 * 32 * chosen  # at least two products of the hidden size, forward


def test_flops_of_the_projections():
    """Twice the weights of layers per token forward, once more backward above the first masked FFN."""
    shape = LlamaConfig(**SHAPES["tiny"])
    found = plan(shape, samples=1, tokens=64, dtype=torch.float32)
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160
    head = 64 * 320
    forward = 2 * 128 * 3 * layer + 2 * 63 * 3 * head
    backward = (
        2 * 128 * layer + 2 * 128 * (64 * 160) + 2 * 63 * 2 * head
    )  # layer 2; down of layer 1; the head
    attention = 2 * 2 * 2 * 4 * 64 * 64 * 16 * (3 + 2.5)  # two products in 3 layers; five, backward in one
    assert found.flops == pytest.approx(forward + backward + attention, rel=1e-3)


def test_recomputation_keeps_less_and_computes_more():
    shape = LlamaConfig(**SHAPES["tiny"])
    plain, saving = (plan(shape, samples=4, tokens=64, recompute=c) for c in (False, True))
    assert saving.activations < 0.6 * plain.activations
    assert saving.flops > plain.flops


def test_layouts():
    found = plan(config("llama"), devices=2, samples=2, tokens=16)
    total = {name: sum(parts.values()) for name, parts in found.layouts.items()}
    assert total["DDP"] == found.training
    weights = {name: parts["weights"] for name, parts in found.layouts.items()}
    assert list(total) == ["DDP", "FSDP2, ZeRO-3", "tensor parallel", "device_map"]
    assert weights["FSDP2, ZeRO-3"] < weights["tensor parallel"] < weights["device_map"] < weights["DDP"]
    assert list(plan(config("llama"), samples=2, tokens=16).layouts) == ["one device"]
    two_machines = plan(config("llama"), devices=4, samples=2, tokens=16, machine=2)
    assert list(two_machines.layouts) == ["DDP", "FSDP2, ZeRO-3", "FSDP2 and tensor parallel"]
    assert two_machines.refused.keys() == {"tensor parallel", "device_map"}
    held = 3 * 100 * 2 * LAYERS * 2 * 8 * 2  # keys and values of two heads of eight in 16 bits
    assert found.serving(3, 100) == found.weights + 4 * found.neurons + held


# Layers that are large beside what a step makes of them.
LARGER = dict(hidden_size=1024, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8)
LARGER |= dict(num_key_value_heads=4, vocab_size=8192)


@pytest.mark.parametrize(
    ("name", "devices", "machine", "recompute"),
    [("llama", 8, 8, False), ("llama", 16, 4, True), ("mixtral", 8, 8, True), ("mixtral", 16, 4, False)],
)
def test_both_ways_to_split_take_what_was_planned(name, devices, machine, recompute):
    """By a trace of the step under FSDP2 and tensor parallelism: within 10 %."""
    sizes = dict(samples=8, tokens=128, recompute=recompute)
    model = config(name, **LARGER)
    traced = trace(model, planning._make_step, "fsdp+tp", devices, **sizes, local=machine)
    parts = plan_tensor_parallel(model, "fsdp+tp", devices, **sizes, machine=machine)
    assert sum(parts.values()) == pytest.approx(traced.peak, rel=0.1)
    assert parts["weights"] == pytest.approx(traced.weights, rel=0.01)
    whole = plan_tensor_parallel(model, "tp", 4, **sizes)
    assert parts["weights"] == pytest.approx(whole["weights"] * 4 / devices, rel=0.01)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}), ("llama", {"tie_word_embeddings": False}),
        ("gemma2", {"tie_word_embeddings": True}), ("gpt_neox", {}), ("gpt2", {}),
    ],
)  # fmt: skip
def test_large_embeddings_are_gathered_as_planned(name, changes, recompute):
    """Tied ones twice, and those that transformers does not wrap on their own for good."""
    large = config(name, vocab_size=60_000, **changes)
    planned = plan(large, 4, 4, 16, torch.float32, recompute).layouts["FSDP2, ZeRO-3"]
    traced = trace(large, planning._make_step, "fsdp", 4, 4, 16, torch.float32, recompute)
    assert sum(planned.values()) == pytest.approx(traced.peak, rel=0.1)


@pytest.mark.parametrize(
    ("quantisation", "library"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao"),
    ],
)
def test_quantised_weights_are_not_planned(quantisation, library):
    text = config("gemma3")
    for model in (config("llama"), Gemma3Config(text_config=text.to_dict())):
        model.quantization_config = quantisation
        for make in (plan, lambda model: plan_tensor_parallel(model, "tp", 2)):
            with pytest.raises(ValueError, match=f"quantised by {library}, and what these take"):
                make(model)


def test_weights_that_load_as_plain_are_planned():
    model = config("llama", quantization_config={"quant_method": "mxfp4"})
    assert plan(model, samples=1, tokens=16) == plan(config("llama"), samples=1, tokens=16)


def test_weights_that_load_as_plain_are_not_split():
    """So that no command is printed that ``unlearn`` refuses."""
    text = config("gemma3")
    for model in (config("llama"), Gemma3Config(text_config=text.to_dict())):
        model.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        found = plan(model, 4, samples=1, tokens=16)
        assert [*found.layouts] == ["DDP", "device_map"]
        for name in ("FSDP2, ZeRO-3", "FSDP2 and tensor parallel", "tensor parallel"):
            assert "split a model that was saved with plain weights" in found.refused[name]


def test_windows_bound_the_cache():
    found = plan(config("gemma3", sliding_window=8), samples=1, tokens=16)
    assert [window for _, window in found.cache] == [8, 8, 8]
    assert found.serving(1, 1000) == found.serving(1, 8)


def test_vision_language_configs_are_planned_as_their_text_model():
    text = config("gemma3")
    whole = Gemma3Config(text_config=text.to_dict())
    assert plan(whole, samples=1, tokens=16).parameters == plan(text, samples=1, tokens=16).parameters


def test_command(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config("llama").to_dict()))
    assert load_config(tmp_path).model_type == "llama"
    with pytest.raises(SystemExit) as stop:
        main(["plan", str(tmp_path), "--gpus", "2", "--memory", "0.0001", "--tokens", "16"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    for part in ("LlamaForCausalLM", "H100", "weights", "FSDP2", "no", "No layout fits"):
        assert part in printed
    for arguments, message in (
        (["plan", str(tmp_path / "nowhere")], "is neither a config.json nor a folder"),
        (["plan", str(tmp_path), "--card", "V100"], "--card must be one of"),
        (["plan", str(tmp_path), "--gpus", "12"], "--gpus-per-machine, or a multiple of it; got 12 and 8"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code
        assert message in re.sub(r"[\s│]+", " ", capsys.readouterr().err)


def test_the_fastest_layout_that_fits_is_chosen():
    found = plan(config("llama", num_key_value_heads=4), devices=4, samples=2, tokens=16)
    assert [*found.layouts] == [*found.seconds] == [*planning.LAYOUTS, "device_map"]
    peaks = {name: sum(parts.values()) for name, parts in found.layouts.items()}
    assert found.choose(min(peaks.values()) * 1.04) is None
    for name, peak in peaks.items():
        chosen = found.choose(peak * 1.06)
        assert peaks[chosen] <= peak * 1.01
        faster = [other for other in peaks if found.seconds[other]["H100"] < found.seconds[chosen]["H100"]]
        assert all(peaks[other] > peak for other in faster), name
        # One process has the devices of all.
        assert found.choose(peak * 1.06, processes=True) != "device_map"


@pytest.mark.parametrize(("layers", "layout", "recompute"), [(16, "DDP", True), (8, "device_map", False)])
def test_one_process_is_taken_only_where_recomputed_copies_do_not_fit(layers, layout, recompute):
    model = config("llama", num_hidden_layers=layers, num_key_value_heads=1)
    peak = sum(plan(model, 4, 8, 64).layouts["device_map"].values())
    found = find_fitting(model, peak / 0.949, 4, 32, 64)
    assert (found.layout, found.recompute) == (layout, recompute)


def test_fewer_texts_are_planned_where_as_many_do_not_fit():
    model = config("llama", num_hidden_layers=4)
    least = sum(plan(model, samples=4, tokens=64, recompute=True).layouts["one device"].values())
    found = find_fitting(model, least / 0.949, batch=8, tokens=64)
    assert found[1:] == ("one device", 4, 4, True)
    assert find_fitting(model, least / 0.951, batch=4, tokens=64).layout is None
    assert find_fitting(model, 1e12, batch=1, tokens=64)[1:] == ("one device", 1, 4, False)


@pytest.fixture
def planned(chosen, tmp_path, capsys, monkeypatch):
    """Function: the last two lines that ``neumuter plan`` prints where ``chosen`` fits; takes --gpus."""
    (tmp_path / "config.json").write_text(json.dumps(config("llama").to_dict()))
    found = planning.Fitting(plan(config("llama"), samples=2, tokens=16), *chosen)
    monkeypatch.setattr(planning, "find_fitting", lambda *given, **more: found)

    def planned(*gpus):
        with pytest.raises(SystemExit):
            main(["plan", str(tmp_path), "--tokens", "16", "--gpus", *gpus])
        return capsys.readouterr().out.strip().splitlines()[-2:]

    return planned


@pytest.mark.parametrize(
    ("chosen", "said", "begin", "end"),
    [
        (
            ("DDP", 16, 8, False), "DDP fits, and is the fastest that does, by the data sheet. ",
            "torchrun --nproc-per-node 2 -m neumuter ", "--batch-size 16",
        ),
        (
            ("tensor parallel", 4, 4, True),
            "tensor parallel fits with 4 texts of each kind in a step and with recomputed activations, and ",
            "torchrun --nproc-per-node 2 -m neumuter ",
            "--batch-size 4 --max-length 16 --layout tp --recompute",
        ),
        (
            ("device_map", 8, 8, True),
            "device_map fits with 8 texts of each kind in a step and with recomputed activations, and is the",
            "neumuter ",
            "--batch-size 8 --max-length 16 --device-map auto --recompute",
        ),
    ],
)  # fmt: skip
def test_what_fits_is_started(said, begin, end, tmp_path, planned):
    sentence, command = planned("2")
    assert sentence.startswith(said)
    assert command.startswith(f"{begin}unlearn {tmp_path} ")
    assert end in command


@pytest.mark.parametrize(
    ("chosen", "gpus", "begin", "end"),
    [
        (
            ("FSDP2 and tensor parallel", 8, 4, False), ["16"],
            "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --nproc-per-node 8 -m ",
            "--batch-size 8 --max-length 16 --layout fsdp+tp",
        ),
        (
            ("FSDP2 and tensor parallel", 8, 4, False), ["8"], "torchrun --nproc-per-node 8 -m ",
            "--batch-size 8 --max-length 16 --layout fsdp+tp",
        ),
        (
            ("DDP", 64, 8, False), ["8", "--gpus-per-machine", "2"],
            "torchrun --nnodes 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --nproc-per-node 2 -m ",
            "--batch-size 64 --max-length 16",
        ),
    ],
)  # fmt: skip
def test_a_command_for_each_of_several_machines(gpus, begin, end, planned):
    sentence, command = planned(*gpus)
    assert command.startswith(begin)
    assert command.endswith(end)
    assert ("with the address of one of them as HOST" in sentence) == ("HOST" in begin)


def test_what_cannot_be_split_is_named(tmp_path, capsys):
    found = {name: plan(config(name), devices=2, samples=1, tokens=16) for name in ("gemma2", "llama4")}
    assert "tensor parallel" in found["gemma2"].layouts
    assert "would split the experts of" in found["llama4"].refused["tensor parallel"]
    (tmp_path / "config.json").write_text(json.dumps(config("llama").to_dict()))
    with pytest.raises(SystemExit):
        main(["plan", str(tmp_path), "--gpus", "4", "--tokens", "16"])
    assert "2 key-value heads cannot be divided by 4" in " ".join(capsys.readouterr().out.split())


def test_the_command_and_the_library_take_the_same_machine_and_card():
    from neumuter.cli.plan import plan as command

    given = inspect.signature(command).parameters
    assert given["gpus_per_machine"].default == planning.MACHINE
    assert given["card"].default == CARD
