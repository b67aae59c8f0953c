"""What a process of a distributed test does: ``python -m tests.distributed HOW FAMILY FOLDER``.

A small model is attached and trained for a few steps on one global batch, split among the processes. The
mute set and the scores are written to FOLDER as HOW-N.mute and HOW-N.pt, N the number of processes.
"""

import sys
from pathlib import Path

import neumuter
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from tests.models import batch, build

STEPS, SAMPLES = 4, 8


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


def main(how, name, folder):
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
    mutes = masked.select(budget=12, seed=3)
    scores = masked.full_scores()
    if rank == 0:
        mutes.save(Path(folder) / f"{how}-{world}.mute")
        torch.save(scores, Path(folder) / f"{how}-{world}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
