"""Makes the checkpoint, the sets and the adapters, and asks the engines in turn."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

from bench import RESULTS, ROOT, machine, rows
from bench.models import step
from neumuter.recipes import mute_random
from neumuter.serving.adapters import export_lora
from neumuter.serving.fold import fold
from neumuter.training.masked import attach

SHARE = 0.01
SETS = (1, 4, 16, 64)
ADAPTERS = 4
REQUESTS, PROMPT, NEW = 16, 32, 32
BASE = "base"


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.engines", description=__doc__)
    parser.add_argument("python", help="the Python of an environment with vLLM and the plug-in")
    parser.add_argument("--out", type=Path, default=RESULTS / "engines", help="folder of the results")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shape", default="135M", help="tiny: does it run at all? Its times are no results")
    options = parser.parse_args()
    record = machine.describe("cpu", machine.LIBRARY)
    with tempfile.TemporaryDirectory() as folder:
        rank = prepare(Path(folder), options.shape)
        found, versions = measure(options.python, Path(folder), options.rounds, rank)
    record["versions"] |= versions
    record["threads"] = 1
    for way, row in found.items():
        print(f"{way:24} {row['tokens_per_second']:8.1f} tokens/s, {row['of_base']:.3f} of base", flush=True)
    print(f"on {record['cpu']}, one thread, load {record['load']} before")
    about = {
        "benchmark": "vllm",
        "op": f"{options.shape}, float32, eager, {REQUESTS} requests of {PROMPT} + {NEW} tokens",
    }
    path = options.out / f"{machine.slug(record)}.jsonl"
    rows.put(path, about, {"rounds": options.rounds, "ways": found}, record)


def prepare(folder, shape):
    """Write the base, a folded copy, the sets and the adapters; returns the adapters' rank."""
    model, *_ = step.build(shape, torch.float32, "cpu")
    model.save_pretrained(folder / BASE)
    with attach(model, start_layer=0) as masked:
        sets = [mute_random(masked, SHARE, seed) for seed in range(max(SETS))]
    (folder / "sets").mkdir()
    for number, mutes in enumerate(sets):
        mutes.save(folder / "sets" / f"s{number}.safetensors")
    for number, mutes in enumerate(sets[:ADAPTERS]):
        export_lora(model, mutes, folder / f"adapter{number}", one_rank=True)
    fold(model, sets[0])
    model.save_pretrained(folder / "folded")
    configs = [json.loads(path.read_text()) for path in folder.glob("adapter*/adapter_config.json")]
    return max(config["r"] for config in configs)


def measure(python, folder, rounds, rank):
    """{way: its medians}, and the versions of the engine."""
    muting = {"NEUMUTER_VLLM_SETS": str(folder / "sets"), "NEUMUTER_VLLM_REQUIRE": "0"}
    lora = dict(
        enable_lora=True, max_loras=ADAPTERS + 1, max_lora_rank=rank, lora_target_modules=["down_proj"],
        max_cpu_loras=ADAPTERS + 1,
    )  # fmt: skip
    servers = {
        BASE: (folder / BASE, {}, {}),
        "plug-in": (folder / BASE, {}, muting),
        "LoRA": (folder / BASE, lora, {}),
        "folded": (folder / "folded", {}, {}),
    }
    asked = {BASE: (BASE, 0), "folded": ("folded", 0), f"LoRA, {ADAPTERS} adapters": ("LoRA", ADAPTERS)}
    asked |= {"plug-in, no set": ("plug-in", 0)} | {f"plug-in, {n} sets": ("plug-in", n) for n in SETS}
    rates = {way: [] for way in asked}
    with ExitStack() as stack:
        # They start at once.
        engines = {name: stack.enter_context(Engine(python, folder, *what)) for name, what in servers.items()}
        versions, *_ = [engine.read() for engine in engines.values()]
        for number in range(-2, rounds):
            # Each round begins with another one.
            order = list(asked.items())
            for way, (name, sets) in order[number % len(order) :] + order[: number % len(order)]:
                rate = engines[name].ask(sets, max(0, number) * REQUESTS)
                if number >= 0:
                    rates[way].append(rate)
    return {
        way: {
            "tokens_per_second": round(statistics.median(found), 1),
            "of_base": round(statistics.median(a / b for a, b in zip(found, rates[BASE], strict=True)), 3),
        }
        for way, found in rates.items()
    }, versions


class Engine:
    """A process with vLLM, which serves the same requests again whenever it is asked."""

    def __init__(self, python, folder, model, options, environment):
        self.command = [python, ROOT / "bench/engines/engine.py", json.dumps(options), model, folder]
        self.command += [REQUESTS, PROMPT, NEW]
        # Engines that wait for their turn must not spin.
        given = {
            "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_SLEEP_WHEN_IDLE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        }  # fmt: skip
        self.environment = os.environ | given | environment

    def __enter__(self):
        self.process = subprocess.Popen(
            [str(part) for part in self.command], env=self.environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait(120)

    def read(self):
        for line in self.process.stdout:
            if line.startswith("ENGINE "):
                return json.loads(line.removeprefix("ENGINE "))
            sys.stderr.write(line)
        raise RuntimeError(f"{self.command} ended, exit code {self.process.wait()}")

    def ask(self, sets, first):
        """Tokens per second of a batch of ``sets`` sets or adapters, 0 for none, from number ``first`` on."""
        print(json.dumps([sets, first]), file=self.process.stdin, flush=True)
        return self.read()


if __name__ == "__main__":
    main()
