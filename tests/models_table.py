"""Writes the tables of docs/models.md from test results: ``python -m tests.models_table RESULTS.xml``.

RESULTS.xml is what ``pytest --junitxml`` wrote for test_families, test_loading and test_distributed.
"""

import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

import torch
import transformers

import neumuter
from tests.models import FAMILIES, build

PAGE = Path(__file__).parents[1] / "docs/models.md"
BEGIN = "<!-- made by `make models` from test results; do not edit -->"
END = "<!-- end of tables -->"
CHECKS = {
    "test_off_has_the_bits_of_the_untouched_model": "gates off: same bits",
    "test_gradients_are_those_of_a_hook_on_the_down_projection": "gradients",
    "test_muting_zeroes_columns_and_survives_folding_and_saving": "mute, fold, reload",
}
LOADING = {
    "test_sixteen_bits": "float16 and bfloat16",
    "test_torchao": "torchao int8 and int4 weights",
    "test_bitsandbytes": "bitsandbytes 8 and 4 bit (on a CPU with AVX-512, 4 bit has no gradient)",
    "test_quantised_by_device_map": "`unlearn` on quantised weights that Accelerate places (`device_map`)",
    "test_foreign_quantised_linears": "quantised linears of others, as GPTQ and AWQ have them",
    "test_lora_on_top_and_merged": "PEFT LoRA on top, and merged",
    "test_offloaded": "offloaded to memory or disk by Accelerate (`device_map`)",
    "test_experts_offloaded": "experts offloaded",
    "test_checkpointing_recomputes_the_same_noise": "activation checkpointing",
    "test_compiled_without_graph_breaks": "`torch.compile(fullgraph=True)`, training and muted",
    "test_attaching_a_compiled_model": "attach after `torch.compile`",
    "test_static_cache": "`generate` with a static cache",
    "test_attention_is_untouched": "SDPA and eager attention",
    "test_padding": "padding on the left and on the right",
    "test_packed_sequences": "packed sequences (`row_ids`)",
    "test_compiled_layers_have_the_paths_of_plain_ones": "single layers compiled",
    "test_a_recipe_finds_the_same_on_an_offloaded_model": "a recipe on an offloaded model, with experts too",
    "test_a_pickled_model_is_whole": "pickling while attached",
    "test_a_deep_copy_is_a_model_of_its_own": "deep copies",
    "test_one_result_for_any_number_of_processes[ddp-2]": "DDP through Accelerate, 1 and 2 processes",
    "test_one_result_for_any_number_of_processes[ddp-4]": "DDP through Accelerate, 4 processes",
    "test_the_trainer_finds_the_same_neurons_of_the_demo_task": "NeuMuterTrainer, 1, 2 and 4 processes",
    "test_one_result_for_any_number_of_processes[fsdp2-2]": "FSDP2 (`fully_shard`), 2 processes",
    "test_one_result_for_any_number_of_processes[tp-2]": "tensor parallelism (`tp_plan`), 2 processes",
    "test_tensor_parallel_packed_ffns": "tensor parallelism with packed gate and up, 2 processes",
    "test_one_result_for_any_number_of_processes[deepspeed-2]": "DeepSpeed ZeRO-3, 2 processes",
}


def results(path):
    """{test name: [(parameters, outcome)]} of a junit file."""
    found = defaultdict(list)
    for case in ElementTree.parse(path).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "yes"
        name, _, parameters = case.get("name").partition("[")
        found[name].append((parameters.rstrip("]"), outcome))
        found[case.get("name")].append(("", outcome))
    return found


def summary(outcomes):
    """One word for several outcomes; a failure outweighs all."""
    return next((o for o in ("failed", "skipped") if o in outcomes), "yes") if outcomes else "not run"


def family_row(name, found):
    model = build(name)
    kind = type(model).__name__
    with neumuter.attach(model, 0) as masked:
        seams = ", ".join(sorted(set(masked.seams.values())))
    cells = []
    for test in CHECKS:
        cells.append(summary([o for p, o in found[test] if name in p.split("-")]))
    return [f"`{name}`", kind, seams, *cells]


def table(head, rows):
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(r)} |" for r in rows)]
    return "\n".join(lines)


def text(found):
    families = [family_row(name, found) for name in FAMILIES]
    loading = [[what, summary([o for _, o in found[test]])] for test, what in LOADING.items()]
    versions = f"torch {torch.__version__.split('+')[0]} and transformers {transformers.__version__}"
    return "\n\n".join([
        f"With {versions}, on the CPU:",
        table(["family", "class", "seams", *CHECKS.values()], families),
        "Loaded and run in these ways:",
        table(["way", "works"], loading),
    ])  # fmt: skip


def main(path):
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(f"{before}{BEGIN}\n\n{text(results(path))}\n\n{END}{after}")
    os.replace(temporary, PAGE)
    failed = re.findall(r"\| (?:failed|skipped|not run)\b", PAGE.read_text())
    return f"{len(failed)} cells are red" if failed else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
