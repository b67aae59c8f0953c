"""What the processes of a distributed test do.

A small model is attached and trained for a few steps on one global batch, split among the processes. The
mute set and the scores are written to FOLDER as HOW-N.mute and HOW-N.pt, N the number of processes.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import neumuter
from neumuter import NeuMuterConfig, NeuMuterTrainer
from neumuter.demo.task import VOCABULARY, encode, make_records, read_corpus, train_tokenizer
from tests.models import batch, build

STEPS, SAMPLES = 4, 8
CORPUS_CHARACTERS = 60_000  # for the tokenizer


def ddp(masked):
    """Through Accelerate, as the Trainer does it."""
    engine = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(masked.scores.values(), lr=200.0)
    model, optimizer = engine.prepare(masked.model, optimizer)
    return model, optimizer, engine.backward


def fsdp2(masked):
    """As Accelerate does it on GPUs; on the CPU it does not."""
    for layer in masked.model.model.layers:
        fully_shard(layer)
    fully_shard(masked.model)
    return masked.model, torch.optim.SGD(masked.scores.values(), lr=200.0), torch.Tensor.backward


def deepspeed(masked):
    """ZeRO stage 3."""
    import deepspeed

    optimizer = torch.optim.SGD(masked.scores.values(), lr=200.0)
    config = {
        "train_micro_batch_size_per_gpu": SAMPLES // dist.get_world_size(),
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=masked.model, optimizer=optimizer, config=config)
    return engine, engine, engine.backward


def tp(masked):
    """The model is split already; every process sees the whole batch."""
    return masked.model, torch.optim.SGD(masked.scores.values(), lr=200.0), torch.Tensor.backward


def loaded(how, name, folder):
    if how != "tp":
        return build(name)
    if dist.get_rank() == 0:
        build(name).save_pretrained(Path(folder) / "model")
    dist.barrier()
    return AutoModelForCausalLM.from_pretrained(Path(folder) / "model", tp_plan="auto").eval()


def trainer(name, folder):
    """NeuMuterTrainer on the demo's records; at the end of an epoch, processes have fewer samples or none."""
    world = int(os.environ["WORLD_SIZE"])
    records, tokenizer = make_records(0), train_tokenizer(read_corpus(CORPUS_CHARACTERS)[0])
    forget, keep = (encode(tokenizer, kind[:7], "secret") for kind in (records.forget, records.retain))
    config = NeuMuterConfig(
        output_dir=str(Path(folder) / "run"), num_train_epochs=STEPS,
        per_device_train_batch_size=4 // world, sparsity=2.0, budget=12, save_strategy="no",
        report_to=[], use_cpu=True, seed=3, disable_tqdm=True,
    )  # fmt: skip
    run = NeuMuterTrainer(build(name, vocab_size=VOCABULARY), config, forget, keep)
    run.train()
    return run.masked, run.mute_set()


def main(how, name, folder):
    if how == "trainer":
        return write(how, folder, *trainer(name, folder))
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    masked = neumuter.attach(loaded(how, name, folder))
    model, optimizer, backward = globals()[how](masked)
    share, shares = (0, 1) if how == "tp" else (rank, world)
    ids, data = torch.arange(SAMPLES).chunk(shares)[share], batch(SAMPLES, 9).chunk(shares)[share]
    for step in range(STEPS):
        optimizer.zero_grad()
        with masked.sampling(seed=3, step=step, sample_ids=ids):
            logits = model(data).logits[:, :-1].flatten(0, 1)
            backward(-F.cross_entropy(logits, data[:, 1:].flatten()))
        optimizer.step()
    return write(how, folder, masked, masked.select(budget=12, seed=3))


def write(how, folder, masked, mutes):
    scores = masked.full_scores()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank == 0:
        mutes.save(Path(folder) / f"{how}-{world}.mute")
        torch.save(scores, Path(folder) / f"{how}-{world}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
