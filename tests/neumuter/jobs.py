"""What the processes of a shared unlearning job do; the test itself does the same alone."""

import contextlib
import copy
import dataclasses
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import neumuter
from neumuter import job as whole_job
from neumuter import preparing, recipes
from neumuter.cli import processes
from neumuter.cli.app import main
from neumuter.evaluation import continuations, controls, examination
from neumuter.models.content import describe_model, digest_weights
from neumuter.models.families import decoder_of
from neumuter.models.layouts import make_distributed_config
from neumuter.mutes.slopes import Slopes
from neumuter.recipes import FittedConfig, GainsConfig, Goals, PaperConfig, SupportConfig, mute_random
from neumuter.texts import encode, join_batches
from neumuter.training import journal
from neumuter.training.batches import PairedBatches
from tests.models import VOCABULARY, build, learn, tokenizer

LENGTHS = {"forget": (5, 9, 4, 12, 7), "retain": (6, 3, 11, 8, 10, 5, 7)}
# Of a step, by id; the last has fewer samples of a kind than there are processes.
STEPS = ([0, 3, 1, 7, 5, 10], [2, 4, 6, 8, 9], [1, 11])
PAIRS = [("Ada Brisk,", " ada@post.example"), ("Jonas Vance,", " jv77@mail.example"), ("Mo,", " 5550192")]
KEPT = ["The kettle is on the shelf.", "A lantern costs 12.40 in the shop.", "Oil it."]
# More than go through the model at once, and not a multiple of it.
MORE_KEPT = [*KEPT, *(f"Item {n} is on the shelf." for n in range(8))]


def texts(kind):
    """Texts of random tokens, padded on the right."""
    lengths = LENGTHS[kind]
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    shown = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": shown, "labels": ids.masked_fill(shown == 0, -100)}


def trained(name):
    """A small model that knows the texts by heart."""
    model = build(name)
    known = join_batches(texts("forget"), texts("retain"), encode([*PAIRS, *KEPT], tokenizer(), 32))
    return learn(model, known, 60).requires_grad_(False)


def steps(pair):
    """The steps of every recipe, ready to be taken: {recipe: (step, parameters)}."""
    neurons = recipes.fitted.Neurons(pair.masked)
    generator = torch.Generator().manual_seed(0)
    support = torch.randperm(neurons.count, generator=generator)[:40]
    gains = torch.rand(40, generator=generator).requires_grad_()
    slopes = recipes.measure_slopes(
        pair, neurons.mute_set(support, gains.detach(), "mute", (0.0, 1.0), {}, 0)
    )
    fit = recipes.fitted._Fit(neurons, pair, GainsConfig(lr=1e-3), 0, 1, None, [slopes])
    with torch.no_grad():
        for number, score in enumerate(pair.masked.scores.values()):
            noise = torch.randn(score.shape, generator=torch.Generator().manual_seed(number))
            score.copy_(torch.where(score.isinf(), score, noise))
    return {
        "gains": (fit.make_step(support, gains, 4), [gains]),
        "paper": (
            recipes.paper.make_step(pair, PaperConfig(stop_loss=4.0), 3),
            [*pair.masked.scores.values()],
        ),
    }


def gradients(model, change=0, at_once=None):
    """Of each recipe the gradients, readings and log-odds of a few steps; and the Fisher ratios.

    at_once: so many samples of a step fit into memory.
    """
    found, forget = {}, texts("forget")
    forget["input_ids"][0, 0] += change
    with neumuter.attach(model, start_layer=0) as masked:
        pair = PairedBatches(masked, forget, texts("retain"))
        pair.at_once.size = at_once or pair.at_once.size
        found["fisher"] = recipes.fisher.rank_by_fisher(pair)
        for name, (step, parameters) in steps(pair).items():
            for number, ids in enumerate(STEPS):
                told = {}
                step.take(iter([ids]), 1, lambda _, info, told=told: told.update(info))
                found[f"{name} {number}"] = torch.cat([one.grad.flatten() for one in parameters])
                found[f"{name} {number} told"] = torch.tensor(list(told.values()))
            found[f"{name} log-odds"] = step.log_odds
            found[f"{name} state"] = torch.cat([one.detach().flatten() for one in parameters])
    return found


# The layouts in which each process has a copy of the model.
QUANTISED = ("4bit", "8bit", "int8", "int4")
COPIES = ("ddp", *QUANTISED)
# Those in which transformers splits it.
SPLIT = ("fsdp", "tp", "fsdp+tp")
JOBS = {
    "modulate": dict(recipe=FittedConfig(GainsConfig(steps=6, batch_size=3))),
    "mute": dict(recipe=FittedConfig(support=SupportConfig(steps=6, batch_size=2)), mode="mute"),
    "paper": dict(
        budget=None, recipe=PaperConfig(epochs=3, batch_size=2, lr=1.0, sparsity=0.0, threshold=0.3)
    ),
    "auto": dict(recipe=FittedConfig(GainsConfig(steps=6)), budget="auto", goals=Goals(1.0)),
}


@contextlib.contextmanager
def shorter():
    """Context: what is measured takes less time."""
    limits = {
        whole_job: "CHECKED", controls: "MADE_UP", examination: "MAX_TOKENS", continuations: "MAX_TOKENS",
    }  # fmt: skip
    with contextlib.ExitStack() as patched:
        for module, name in limits.items():
            patched.enter_context(mock.patch.object(module, name, 2))
        yield


def unlearn(model, job, kept=KEPT, forget=PAIRS, **more):
    options = {"budget": 30, "samples": 1, "start_layer": 0, "max_length": 32, "callback": lambda *_: None}
    with shorter():
        return neumuter.unlearn(model, tokenizer(), forget, kept, **options | JOBS[job] | more)


def check_same_but_for_rounding(found, expected):
    assert found.layers.keys() == expected.layers.keys()
    for path, layer in expected.layers.items():
        assert torch.equal(found.layers[path].indices, layer.indices)
        torch.testing.assert_close(found.layers[path].gains, layer.gains, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def logits(model, mutes):
    """Of two rows, of which the first is muted: by a bank, and by ``mute`` and the model as it is."""
    ids = texts("retain")["input_ids"][:2]
    with neumuter.mute(model, mutes):
        muted = model(ids).logits[0]
    apart = torch.stack([muted, model(ids).logits[1]])
    if hasattr(model.config, "num_experts_per_tok"):
        return apart, apart  # banks refuse experts
    with neumuter.MuteBank(model) as bank:
        bank.add("one", mutes)
        with bank.using(["one", None]):
            return apart, model(ids).logits


def refit(model):
    """One of two requests is undone; there are no texts to forget."""
    first = unlearn(model, "modulate", keep_slopes=True)
    other = dataclasses.replace(first.slopes, log_odds=first.slopes.log_odds + 1)
    options = {"samples": 1, "start_layer": 0, "max_length": 32, "callback": lambda *_: None}
    return neumuter.refit(
        model, tokenizer(), first.mutes, [first.slopes], [other], KEPT,
        recipe=JOBS["modulate"]["recipe"], **options,
    )  # fmt: skip


class Killed(Exception):
    pass


def kill_in_the_middle(model, folder):
    """Leaves an unfinished job in a folder."""

    def kill(step, total, info):
        if step == 4:
            raise Killed

    with mock.patch.object(journal, "SAVE_SECONDS", -1), pytest.raises(Killed):
        unlearn(model, "modulate", folder=folder, callback=kill)


def resume(model, folder):
    """The outcome of the job that ``kill_in_the_middle`` left."""
    steps = []
    outcome = unlearn(
        model, "modulate", folder=folder, resume=True, callback=lambda step, *_: steps.append(step)
    )
    assert steps[0] == 4
    return dataclasses.replace(outcome, seconds=0)


def need_library(kind):
    """Skips a test that needs a library which is not here, or which has no gradients here."""
    if kind in ("int8", "int4"):
        pytest.importorskip("torchao")
    elif kind in ("4bit", "8bit"):
        pytest.importorskip("bitsandbytes")
        from bitsandbytes.nn.modules import has_avx512bf16

        if kind == "4bit" and has_avx512bf16():
            pytest.skip("bitsandbytes has no gradient of 4 bits on a CPU with AVX-512")


def quantised(model, kind):
    """The model of a folder with weights of bitsandbytes ("4bit", "8bit") or torchao ("int8", "int4")."""
    if kind in ("4bit", "8bit"):
        # From a threshold on, samples of 8 bits that run together change each other.
        config = BitsAndBytesConfig(**{f"load_in_{kind}": True}, llm_int8_threshold=0.0)
    else:
        from torchao.quantization import IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerAxis

        config = TorchAoConfig(IntxWeightOnlyConfig(getattr(torch, kind), PerAxis(0)))
    loaded = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, device_map="cpu")
    return loaded.eval()


def placed(model, layout, dtype="auto"):
    """The model of a folder in that layout."""
    if layout in QUANTISED:
        return quantised(model, layout)
    if layout in SPLIT:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        config = make_distributed_config(layout, dist.get_world_size(), empty)
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, distributed_config=config).eval()
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    if layout == "fully_shard":
        for layer in max((m for m in loaded.modules() if isinstance(m, torch.nn.ModuleList)), key=len):
            fully_shard(layer)
        fully_shard(loaded)
    return loaded


def one_by_one(model):
    """The model, whose experts are multiplied one by one: all at once they cannot be in float64."""
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    return model


# Of arguments, what each of two processes is given.
DIFFERING = {
    "seed": (0, 1), "budget": (30, 31), "samples": (1, 0), "keep_slopes": (True, False), "made_up": (0, 2),
    "calibrate": (True, False), "max_length": (32, 16), "folder": (None, "absent"),
    "forget": (PAIRS, PAIRS[:2]), "retain": (KEPT, KEPT[1:]), "controls": (None, ["Ina Poe, 12"]),
}  # fmt: skip


def refuse_differing(model, layout, folder):
    """Both of two processes refuse, by name, what is not the same in them; and what the first one refuses."""
    rank = dist.get_rank()

    def refuse(message, model=model, error=ValueError, **more):
        given = {"forget": PAIRS, "kept": KEPT} | more
        with pytest.raises(error, match=message):
            unlearn(model, "modulate", **given)

    same = "must be the same in all processes, but is"
    for name, values in DIFFERING.items():
        refuse(f"{name} {same}", **{"kept" if name == "retain" else name: values[rank]})
    with neumuter.attach(model, start_layer=0) as masked:
        sets = [mute_random(masked, 9, seed=seed) for seed in (0, 1)]
    refuse(f"existing {same}", existing=sets[rank])
    known = Slopes(
        sets[0], torch.tensor([float(rank)]), torch.tensor([-math.inf]), torch.ones(1), torch.ones(1),
        torch.ones(1, 9, dtype=torch.int8),
    )  # fmt: skip
    refuse(f"former {same}", existing=sets[0], former=[known])
    for name, values in {"existing": sets, "seed": (0, 1)}.items():
        given = {"existing": sets[0], "undone": [known], "retain": KEPT, name: values[rank]}
        with pytest.raises(ValueError, match=f"{name} {same}"):
            neumuter.refit(model, tokenizer(), **given)
    # One of them alone finds fault with it.
    refuse(r"made_up must be at least 0, got -1", made_up=-rank)
    if layout not in COPIES:
        return
    other = copy.deepcopy(model)
    other.model.layers[1].self_attn.q_proj.weight.data[3, 5] += rank
    refuse(f"model.layers.1.self_attn.q_proj.weight of the model {same}", other)
    refuse(f"the model's dtype {same}", copy.deepcopy(model).bfloat16() if rank else model)
    begun = folder / "begun"
    refuse("holds an unfinished run", error=FileExistsError, folder=begun)
    refuse("cannot go on, because seed was 0 and is 1. Ask", folder=begun, resume=True, seed=1)
    for resumed in (True, False):
        elsewhere = begun if rank else folder / "absent"
        refuse("process 1 finds an unfinished run, .*/begun/.*must be", folder=elsewhere, resume=resumed)


def rank_again(model, folder):
    """The whole job, and one that is killed while it ranks the neurons and then goes on."""
    passes, sample_losses = [], PairedBatches.sample_losses

    def count(self, ids):
        passes.append(ids)
        if len(passes) == killed_in:
            raise Killed
        return sample_losses(self, ids)

    with (
        mock.patch.object(recipes.fisher, "SAMPLES_PER_PASS", 1),
        mock.patch.object(journal, "SAVE_SECONDS", -1),
        mock.patch.object(PairedBatches, "sample_losses", count),
    ):
        killed_in = None
        whole = unlearn(model, "modulate", MORE_KEPT)
        killed_in = len(passes) + 4
        with pytest.raises(Killed):
            unlearn(model, "modulate", MORE_KEPT, folder=folder)
        resumed = unlearn(model, "modulate", MORE_KEPT, folder=folder, resume=True)
    # Each pass once, but for that in which the run was killed.
    assert passes[killed_in:] == passes[3 : killed_in - 4]
    return whole, resumed


def spare(model):
    """A job in whose second process one sample alone fits into memory."""
    rank, evaluate = dist.get_rank(), PairedBatches.evaluate

    def refuse(self, inputs, *more):
        if rank == 1 and len(inputs.ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return evaluate(self, inputs, *more)

    taken = mock.patch("neumuter.unlearning.measure_peak_memory", return_value=100 + rank)
    with taken, mock.patch.object(PairedBatches, "evaluate", refuse):
        assert unlearn(model, "modulate").peak_memory == 101


def shared(model, layout, jobs, folder):
    """What every process does. It writes what it found into FOLDER."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    # The second process takes its share in parts, where it has a model of its own.
    at_once = 1 if rank == 1 and layout in COPIES else None
    split = placed(model, layout)
    # Those that run nothing else compute activations again in the backward pass.
    if not jobs:
        split.gradient_checkpointing_enable()
    torch.save(gradients(split, at_once=at_once), Path(folder) / f"gradients-{rank}")
    if "double" in jobs:
        double = one_by_one(placed(model, layout, torch.float64))
        torch.save(gradients(double), Path(folder) / f"double-{rank}")
    model = placed(model, layout)
    torch.save((describe_model(model), digest_weights(model)), Path(folder) / f"content-{rank}")
    for job in set(jobs) & set(JOBS):
        outcome = unlearn(model, job, folder=Path(folder) / f"{job}-folder")
        outcome.save(Path(folder) / f"{job}-{rank}")
        if job == "modulate":
            torch.save(logits(model, outcome.mutes), Path(folder) / f"logits-{rank}")
    if "modulate" in jobs and layout in COPIES:
        # The first process writes the file, and reads it for all.
        kill_in_the_middle(model, Path(folder) / "killed")
        dist.barrier()
        if rank == 0:
            shutil.copytree(Path(folder) / "killed", Path(folder) / "begun")
        dist.barrier()
        resume(model, Path(folder) / "killed").save(Path(folder) / f"resumed-{rank}")
    if "elsewhere" in jobs:
        resume(model, Path(folder) / "alone").save(Path(folder) / f"elsewhere-{rank}")
    if "ranking" in jobs:
        for name, outcome in zip(("whole", "ranked"), rank_again(model, Path(folder) / "again"), strict=True):
            outcome.mutes.save(Path(folder) / f"{name}-{rank}.safetensors")
    if "refit" in jobs:
        refit(model).save(Path(folder) / f"refit-{rank}.safetensors")
    if "spare" in jobs:
        spare(model)
    if "differing" in jobs:
        refuse_differing(model, layout, Path(folder))
    with pytest.raises(ValueError, match="forget_batch must be the same in all processes"):
        gradients(model, change=rank)
    dist.barrier()


def command(*arguments):
    """A command, as torchrun starts it; {rank} in an argument is the number of the process."""
    preparing.SAMPLES = 4
    with shorter():
        main([argument.format(rank=os.environ["RANK"]) for argument in arguments])


def saving_command(*arguments):
    """A command, as torchrun starts it, which writes at once what it has found."""
    journal.SAVE_SECONDS = 0
    command(*arguments)


def write_slowly(folder):
    """The first process writes after the other has done all, and then ends with exit code 3."""
    rank = int(os.environ["RANK"])
    try:
        with processes.joined():
            time.sleep(1 - rank)
            (Path(folder) / str(rank)).write_text(str(time.monotonic()))
            sys.exit(3)
    finally:
        if rank:
            (Path(folder) / str(rank)).write_text(str(time.monotonic()))


def stop_the_first():
    """A command whose first process is told to end while the others wait for it."""

    def work(arguments):
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        dist.all_reduce(torch.zeros(24))

    with mock.patch("neumuter.cli.app.app", work):
        main([])


def short_of_memory(folder, layout, fits):
    """``unlearn --resume`` on a split model; in the second process so many samples fit into memory."""
    dist.init_process_group("gloo")
    model = placed(Path(folder) / "model", layout)

    def refuse(module, arguments, options):
        ids = options.get("input_ids", arguments[0] if arguments else None)
        # The few tokens of a probe always fit.
        if dist.get_rank() == 1 and len(ids) > fits and ids.shape[1] > 4:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(ids)} samples.")

    decoder_of(model).register_forward_pre_hook(refuse, with_kwargs=True)
    outcome = unlearn(model, "modulate", MORE_KEPT, folder=Path(folder) / "out", resume=True)
    if dist.get_rank() == 0:
        outcome.save(Path(folder) / "out")
    dist.barrier()
