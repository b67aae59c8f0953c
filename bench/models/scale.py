"""What a text costs where there are many: seconds, visits and memory of ``unlearn``, and of reading alone.

Models of the demo's shape and of SmolLM2-135M's with random weights, which makes no difference to what is
measured, and made-up records: the same number to keep as to forget. Every case has its own process, whose
peak is measured.
"""

import functools
import json
import random
import resource
import subprocess
import sys
import time

import torch
from transformers import AutoModelForCausalLM

import neumuter
from bench.models import step
from neumuter.demo import task
from neumuter.demo.model import architecture
from neumuter.texts.corpus import read_corpus
from neumuter.training.batches import PairedBatches

# Of each op and model, how many texts.
CASES = {
    ("read", "demo"): (1000, 100_000, 1_000_000),
    ("unlearn", "demo"): (10, 100, 1000, 10_000),
    ("unlearn", "135M"): (24, 240),
}
SMALL_CASES = {("read", "demo"): (8, 16), ("unlearn", "demo"): (4, 8)}
MAX_LENGTH, BATCH_SIZE = 64, 8
# Of texts that are only read, so many steps' samples go through the model.
STEPS = 20


def cases(device, effort, small=False):
    """Yields (what a row is about, how it is measured)."""
    for (op, model), counts in (SMALL_CASES if small else CASES).items():
        for count in counts:
            about = {"op": op, "model": model, "texts": count}
            yield about, functools.partial(in_a_process, op, model, count, device)


def in_a_process(op, model, count, device):
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", "bench.models.scale", op, model, str(count), device, threads]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(answer.stdout.splitlines()[-1])


def build(name, device):
    """The model, with random weights: "demo", or one of those of ``bench.models.step``."""
    if name in step.SHAPES:
        return step.build(name, torch.bfloat16, device)[0]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(architecture()).eval().to(device)


def records(kind, count):
    """Texts of customers that nobody has, one after the other."""
    generator = random.Random(kind)
    for number in range(count):
        mail, phone = f"{generator.getrandbits(32):x}", generator.randrange(10**7)
        yield f"Customer {number} of {kind}, mail", f" {mail}@example.org, phone +999 {phone:07d}."


def unlearn(model, tokenizer, count):
    """The whole job, with everything as it is by default; returns how often each text was visited."""
    seen = []
    neumuter.unlearn(
        model, tokenizer, records("forget", count), records("retain", count), samples=0, start_layer=0,
        max_length=MAX_LENGTH, callback=lambda *step: seen.append(step),
    )  # fmt: skip
    return len(seen) * min(BATCH_SIZE, count) / count


def read(model, tokenizer, count):
    """The texts are read, and samples of a few steps go through the model."""
    forget, retain = (
        read_corpus(kind, records(kind, count), tokenizer, MAX_LENGTH, None, 0)
        for kind in ("forget", "retain")
    )
    with neumuter.attach(model, start_layer=0) as masked:
        pair = PairedBatches(masked, forget.windows, retain.windows)
        with masked.off(), torch.no_grad():
            for ids, _ in zip(pair.hard_first(BATCH_SIZE, 0), range(STEPS), strict=False):
                pair.sample_losses(ids)


def peak_mib(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(op, name, count, device, threads):
    torch.set_num_threads(int(threads))
    texts, _ = task.read_corpus(50_000)
    model, tokenizer = build(name, device), task.train_tokenizer(texts)
    before, start, count = peak_mib(device), time.perf_counter(), int(count)
    visits = {"unlearn": unlearn, "read": read}[op](model, tokenizer, count)
    found = {
        "seconds": time.perf_counter() - start,
        "visits_per_text": visits,
        "before_mib": before,
        "peak_mib": peak_mib(device),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
