"""``--layout auto`` takes what ``neumuter plan`` prints for the same GPUs."""

import functools

import pytest
import torch

import neumuter
from neumuter.cli import layouts
from neumuter.cli.app import app, main
from neumuter.cli.layouts import choose_layout
from neumuter.cli.processes import Layout
from neumuter.models.pieces import Pieces
from neumuter.training import plan as planning
from neumuter.training.plan import FILLED, LAYOUTS
from neumuter.training.tracing import _imagined as imagined
from tests import models
from tests.models import config

GPUS, MACHINE, TOKENS, BATCH = 4, 2, 128, 8
SIZES = dict(hidden_size=64, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4)
MODEL = config("llama", num_hidden_layers=4, **SIZES)
NAMES = {layout: name for name, layout in LAYOUTS.items()}
# What is to fit, and nothing faster: the layout, the batch size, and whether activations are recomputed.
CASES = [
    ("ddp", BATCH, False), ("fsdp", BATCH, False), ("fsdp+tp", BATCH, False), ("fsdp+tp", BATCH, True),
    ("tp", 4, False),
]  # fmt: skip
plan = planning.plan


@functools.cache
def plan_once(*given):
    return plan(MODEL, *given)


@pytest.fixture
def auto(tmp_path, monkeypatch):
    """Function: what auto chooses where so many bytes are free on each GPU."""
    MODEL.save_pretrained(tmp_path)
    monkeypatch.setattr(planning, "plan", lambda _, *given: plan_once(*given))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(layouts, "count_processes", lambda: GPUS)
    monkeypatch.setattr(layouts, "_run_apart", lambda function, *given: function(*given))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(MACHINE))

    def choose(free, batch=BATCH, recompute=False):
        monkeypatch.setattr(layouts, "_find_free", lambda: free)
        return choose_layout(Layout.auto, str(tmp_path), "auto", batch, TOKENS, recompute)

    return choose


def enough(layout, batch, recompute):
    """Bytes of which this layout fills as much as it may."""
    given = (GPUS, 4, TOKENS, torch.float32, recompute, MACHINE, batch)
    return int(sum(plan_once(*given).layouts[NAMES[layout]].values()) / FILLED) + 1


@pytest.mark.parametrize("wanted", CASES)
def test_auto_takes_the_fastest_layout_that_fits(wanted, auto, capsys):
    found = auto(enough(*wanted))
    layout, batch, recompute = wanted
    assert found == (Layout(layout), BATCH // batch - 1, recompute)
    said = "No layout fits if 8 texts of each kind go through the model at once" in capsys.readouterr().out
    assert said == (batch < BATCH)


@pytest.mark.parametrize("wanted", CASES)
def test_auto_takes_what_plan_prints(wanted, auto, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main([
            "plan", str(tmp_path), "--gpus", str(GPUS), "--gpus-per-machine", str(MACHINE),
            "--memory", str(enough(*wanted) / 1e9), "--samples", str(BATCH // GPUS),
            "--tokens", str(TOKENS), "--dtype", "float32",
        ])  # fmt: skip
    words = capsys.readouterr().out.split()
    layout = words[words.index("--layout") + 1] if "--layout" in words else "ddp"
    batch, recompute = int(words[words.index("--batch-size") + 1]), "--recompute" in words
    # What plan prints as a smaller batch is for auto fewer samples at a time.
    chosen = (Layout(layout), BATCH // batch - 1, recompute)
    # Nothing else is planned for auto: the same machines, too.
    monkeypatch.setattr(planning, "plan", lambda _, *given: planned.append(given) or plan_once(*given))
    planned, known = [], plan_once.cache_info().currsize
    assert auto(enough(*wanted)) == chosen
    assert planned
    assert plan_once.cache_info().currsize == known
    # The command that is printed gets what it was printed for.
    assert auto(enough(*wanted), batch, recompute) == (Layout(layout), 0, recompute)


def test_quantised_weights_are_copied(auto, tmp_path):
    """How large they are is not planned, and they are never split."""
    given = (Layout.auto, str(tmp_path), "auto", BATCH, TOKENS, False)
    assert choose_layout(*given, quantize=True) == (Layout.ddp, 0, False)
    for quantised in (
        {"quant_method": "torchao", "quant_type": "int8_weight_only"},
        # Formats that become plain weights where nothing computes with them.
        {"quant_method": "fp8", "weight_block_size": [128, 128]}, {"quant_method": "mxfp4"},
    ):  # fmt: skip
        config("llama", quantization_config=quantised).save_pretrained(tmp_path)
        assert choose_layout(*given) == (Layout.ddp, 0, False)


def test_unlearn_lets_as_few_samples_through_at_a_time(tmp_path, monkeypatch):
    class Seen(Exception):
        """How many of eight samples go through the model at a time."""

    def see(*_, **__):
        raise Seen(Pieces(None, 8).limit(8))

    models.build("llama").save_pretrained(tmp_path / "model")
    models.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "forget.txt").write_text("Ada Brisk, 555-0192")
    monkeypatch.setattr(neumuter, "unlearn", see)
    files = ["--forget", str(tmp_path / "forget.txt"), "--out", str(tmp_path / "out")]
    for halvings in (0, 1, 2):
        chosen = layouts.Chosen(Layout.ddp, halvings, False)
        monkeypatch.setattr("neumuter.cli.unlearn.choose_layout", lambda *_, chosen=chosen: chosen)
        with pytest.raises(Seen, match=str(8 >> halvings)):
            app(["unlearn", str(tmp_path / "model"), *files], standalone_mode=False)


@pytest.mark.parametrize(
    ("name", "card"), [("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-40GB", "A100"), ("NVIDIA L4", "H100")]
)
def test_layouts_are_compared_on_the_card_that_there_is(name, card, auto, monkeypatch):
    seen = []
    nothing = planning.Fitting(None, None, BATCH, BATCH, False)
    monkeypatch.setattr(planning, "find_fitting", lambda *given: seen.append(given[-1]) or nothing)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    with pytest.raises(ValueError, match="finds no layout"):
        auto(1 << 40)
    assert seen == [card]


def test_what_fits_in_no_layout_is_refused(auto):
    with pytest.raises(ValueError, match="auto finds no layout that fits into the 1e-06 GB free"):
        auto(1000)


def test_it_is_planned_in_a_process_of_its_own(tmp_path, monkeypatch):
    """In a process group nothing can be traced."""
    MODEL.save_pretrained(tmp_path)
    free = enough("fsdp+tp", BATCH, False)
    monkeypatch.setattr(layouts, "count_processes", lambda: GPUS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    with imagined(GPUS):
        found = choose_layout(Layout.auto, str(tmp_path), "auto", BATCH, TOKENS, False)
    assert found == (Layout.both, 0, False)
