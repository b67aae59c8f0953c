"""One mask-training step on a whole model: NeuMuter's objective on a forget and a retain sample.

Ours is a step of ``neumuter.recipes.train_gates``; on a GPU as the CUDA graph that it becomes there, and
eager. Its limit is the floor: one forward pass of the same tokens and one backward pass to the input of the
first masked layer, of the frozen model, likewise. The baselines are the official algorithm, written by us
after its paper and code (Hou et al. 2025) but without its host synchronisations, and IA3 of PEFT, which
trains one vector per down projection for the same losses.

``python -m bench.models.step SHAPE DTYPE CONTENDER`` runs one alone on the CPU and prints its peak MiB.
"""

import copy
import functools
import gc
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import neumuter
from bench import ROOT
from bench.timing import Contender, compare
from neumuter.models.packing import one_sequence_a_row
from neumuter.recipes import PaperConfig
from neumuter.recipes.paper import make_step
from neumuter.training import graphs
from neumuter.training.batches import PairedBatches
from neumuter.training.gates import INITIAL_SCORE, STRETCH, TEMPERATURE

CONFIG = PaperConfig()
SHIFT = TEMPERATURE * math.log(-STRETCH[0] / STRETCH[1])
TOKENS = 200  # of each sample
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # larger blocks go back to the system when they are freed

# Random weights in real shapes: SmolLM2 135M, Llama 3.2 1B, Llama 3.1 8B.
SHAPES = {
    "tiny": dict(hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=320, tie_word_embeddings=True),
    "135M": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                 num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    # A tenth of its layers and a sixth of its vocabulary, for tests on processors slow in bfloat16.
    "15M": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=9,
                num_key_value_heads=3, vocab_size=8192, tie_word_embeddings=True),
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True),
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False),
}  # fmt: skip
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SHOWN = {
    "cpu": [("135M", FLOAT32), ("135M", BFLOAT16)],
    "cuda": [("135M", BFLOAT16), ("1B", BFLOAT16), ("8B", BFLOAT16)],
}


def build(shape, dtype, device):
    """A frozen model of random weights, and two samples of random tokens, int64 [1, T] each."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape])
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    samples = torch.randint(config.vocab_size, (2, 1, TOKENS)).to(device)
    return model.eval().requires_grad_(False), *samples


def sharing_weights(model):
    """A copy of the modules around the same weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def objective(forget_loss, kl, scores):
    """NeuMuter's: ascend the forget loss up to stop_loss, close gates, hold the retain sample."""
    sign = torch.where(forget_loss.detach() <= CONFIG.stop_loss, -1.0, CONFIG.descent)
    return sign * forget_loss + CONFIG.sparsity * closed(scores) + CONFIG.kl_weight * kl


def closed(scores):
    """The mean probability that a gate is closed."""
    return 1 - torch.stack([(s - SHIFT).sigmoid().mean() for s in scores]).mean()


def gate(score, noise):
    """A hard-concrete sample [F] for uniform ``noise`` [F] (Louizos et al. 2018, eq. 10–12)."""
    stretched = ((noise.logit() + score) / TEMPERATURE).sigmoid() * (STRETCH[1] - STRETCH[0]) + STRETCH[0]
    return stretched.clamp(0, 1)


class Step:
    """A contender. ``loss(noise)``: of a step, for one uniform [F] per masked layer, or, if None, its own.

    ``parameters``: float32, what the step trains with Adam.
    """

    def begin(self, parameters):
        self.parameters = parameters
        self.optimizer = torch.optim.Adam(parameters, lr=CONFIG.lr)

    def train(self):
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def gradients(self, noise):
        """The loss without the sparsity term, and its gradients in one vector.

        That term is the same for all, and so large that it would hide what differs.
        """
        loss = self.loss(noise) - CONFIG.sparsity * closed(self.parameters)
        return loss.detach(), torch.cat(torch.autograd.grad(loss, self.parameters))


class Ours(Step):
    """What ``train_gates`` does with ``PaperConfig(refined=True)``."""

    def __init__(self, model, forget, retain):
        self.masked = neumuter.attach(model)
        self.pair = PairedBatches(self.masked, *(_batch(ids) for ids in (forget, retain)))
        self.step = make_step(self.pair, PaperConfig(refined=True))
        self.parameters = self.step.parameters

    def train(self):
        self.step.once([0, 1])

    def loss(self, noise):
        named = zip(self.masked.scores.items(), noise, strict=True)
        with self.masked.applying({path: gate(score, n) for (path, score), n in named}):
            losses, kl = self.pair.losses([0, 1])
        return objective(losses.mean(), kl, self.parameters)


class OursEager(Ours):
    """The same without CUDA graphs."""

    def __init__(self, model, forget, retain):
        super().__init__(model, forget, retain)
        self.step.run_eagerly()


def _batch(ids):
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class ThreeForwards(Step):
    """A forget, a retain and a reference pass over whole sequences, with all their logits."""

    def loss(self, noise=None):
        self.draw(noise)
        forget_loss = self.model(input_ids=self.forget, labels=self.forget, use_cache=False).loss
        self.draw(noise)
        logits = self.model(input_ids=self.retain, use_cache=False).logits[:, :-1].flatten(0, 1)
        with torch.no_grad():
            reference = self.reference_logits()[:, :-1].flatten(0, 1)
        logits, reference = (F.log_softmax(x.float(), -1) for x in (logits, reference))
        kl = F.kl_div(logits, reference, reduction="batchmean", log_target=True)
        return self.objective(forget_loss, kl)


class Official(ThreeForwards):
    """A masked copy of each down projection's weight in every forward, and a copied reference model.

    Masks take the dtype of the weights: the official code, which leaves them in float32, fails in bf16.
    """

    def __init__(self, model, forget, retain):
        self.model, self.forget, self.retain = model, forget, retain
        self.reference = copy.deepcopy(model)
        self.layers = []
        for layer in model.model.layers[1:]:
            layer.mlp.down_proj = WeightMasked(layer.mlp.down_proj.weight)
            self.layers.append(layer.mlp.down_proj)
        self.begin([layer.score for layer in self.layers])

    def draw(self, noise):
        for i, layer in enumerate(self.layers):
            layer.noise = torch.rand_like(layer.score).clamp(1e-4, 1 - 1e-4) if noise is None else noise[i]

    def reference_logits(self):
        return self.reference(input_ids=self.retain, use_cache=False).logits

    def objective(self, forget_loss, kl):
        return objective(forget_loss, kl, self.parameters)


class WeightMasked(torch.nn.Module):
    """A projection [d, F] whose weight's columns are masked."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.noise = weight, None
        self.score = torch.nn.Parameter(torch.full(weight.shape[1:], INITIAL_SCORE, device=weight.device))

    def forward(self, hidden):
        return F.linear(hidden, self.weight * gate(self.score, self.noise).to(self.weight.dtype))


class IA3(ThreeForwards):
    """PEFT's multiplier on the input of each down projection: no gates, so no sparsity term."""

    def __init__(self, model, forget, retain):
        from peft import IA3Config, get_peft_model

        projections = r".*layers\.[1-9]\d*\.mlp\.down_proj"  # the first layer is left alone
        config = IA3Config(target_modules=projections, feedforward_modules=projections)
        self.model, self.forget, self.retain = get_peft_model(model, config), forget, retain
        self.begin([p for p in self.model.parameters() if p.requires_grad])

    def draw(self, noise):
        pass

    def reference_logits(self):
        with self.model.disable_adapter():
            return self.model(input_ids=self.retain, use_cache=False).logits

    def objective(self, forget_loss, kl):
        return CONFIG.kl_weight * kl - forget_loss


class Floor:
    """One forward pass and one backward pass to the input of the second layer, which is the first masked."""

    def __init__(self, model, forget, retain):
        self.model, self.ids = model, torch.cat([forget, retain])
        model.model.layers[1].register_forward_pre_hook(self.watch, with_kwargs=True)

    def watch(self, module, args, kwargs):
        self.input = args[0].detach().requires_grad_()
        return (self.input, *args[1:]), kwargs

    def train(self):
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        torch.autograd.grad(loss, self.input)


class FloorGraph(Floor):
    """The same as a CUDA graph."""

    def __init__(self, model, forget, retain):
        super().__init__(model, forget, retain)
        self.graph = None

    def train(self):
        if self.graph is None:
            with one_sequence_a_row():
                for _ in range(graphs.WARM_UP):
                    graphs.run_aside(super().train)
                self.graph, _ = graphs.capture(super().train, None)
        self.graph()


IA3_THERE = {"PEFT IA3": IA3} if importlib.util.find_spec("peft") else {}
# By the kind of device.
CONTENDERS = {
    "cpu": {"ours": Ours, "official NeuMuter": Official} | IA3_THERE,
    "cuda": {"ours, graph": Ours, "ours, eager": OursEager, "official NeuMuter": Official} | IA3_THERE,
}
FLOORS = {"cpu": {"floor": Floor}, "cuda": {"floor, graph": FloorGraph, "floor, eager": Floor}}


def disagreement(first, second, device, dtype):
    """None, or how the loss and score gradients of two steps differ for the same gates."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.rand(s.shape, generator=generator).clamp(0.05, 0.95).to(device) for s in first.parameters]
    (loss, gradient), (other_loss, other_gradient) = (s.gradients(noise) for s in (first, second))
    # The official step rounds masked weights to bf16 and ours rounds masked activations, in up to 32 layers.
    tolerance = 1e-4 if dtype == FLOAT32 else 0.1
    error = ((gradient - other_gradient).norm() / other_gradient.norm()).item()
    if not torch.isclose(loss, other_loss, rtol=tolerance):
        return f"loss {loss.item():.6f}, official {other_loss.item():.6f}"
    return None if error <= tolerance else f"score gradients: relative error {error:.1e}"


def problem(shape, dtype, device):
    """The contenders, ours first, and the floor, around the same weights."""
    model, *samples = build(shape, dtype, device)
    kinds = CONTENDERS[device] | FLOORS[device]
    steps = {name: make(sharing_weights(model), *samples) for name, make in kinds.items()}
    if dtype != FLOAT32 and device == "cpu":
        steps["official NeuMuter, float32"] = Official(*build(shape, FLOAT32, device))
    contenders = [Contender(name, lambda _, s=step: s.train()) for name, step in steps.items()]
    ours, limit = contenders[0], next(iter(FLOORS[device]))
    ours.check = lambda: disagreement(steps[ours.name], steps["official NeuMuter"], device, dtype)
    return [c for c in contenders if c.name != limit], next(c for c in contenders if c.name == limit)


def peak_mib(shape, dtype, name, device):
    """Peak memory of two steps of one contender, models included; MiB.

    On the CPU in a process of its own, without the libraries: what that holds after two steps of a tiny model
    is left out; and with malloc giving back what is freed, since its habit of keeping memory is not a
    contender's doing.
    """
    if device == "cuda":
        gc.collect()  # models with gates have cycles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        two_steps(shape, dtype, name, device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    arguments = [sys.executable, "-m", "bench.models.step", shape, str(dtype).removeprefix("torch."), name]
    result = subprocess.run(arguments, cwd=ROOT, env=os.environ | MALLOC, stdout=subprocess.PIPE, check=True)
    return float(result.stdout.split()[-1])


def two_steps(shape, dtype, name, device):
    step = (CONTENDERS[device] | FLOORS[device])[name](*build(shape, dtype, device))
    step.train()
    step.train()


def alone(shape, dtype, name):
    """What the process of ``peak_mib`` does."""
    two_steps("tiny", dtype, name, "cpu")
    libraries = _status_mib("VmRSS")
    two_steps(shape, dtype, name, "cpu")
    return _status_mib("VmHWM") - libraries


def _status_mib(what):
    """A figure of this process; not ru_maxrss, which a process inherits from the one that started it."""
    return int(re.search(rf"{what}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10


def cases(device, effort, small=False):
    """Yields (what a row is about, how it is measured)."""
    for shape, dtype in [("tiny", FLOAT32)] if small else SHOWN[device]:
        about = {
            "op": f"training step, Llama {shape}", "pass": "forward+backward", "shape": [2, TOKENS],
            "dtype": str(dtype).removeprefix("torch."),
        }  # fmt: skip
        yield about, functools.partial(_measured, shape, dtype, device, effort)


def _measured(shape, dtype, device, effort):
    contenders, floor = problem(shape, dtype, device)
    row = compare(contenders, floor, device, effort)
    del contenders, floor
    for entry in [*row["contenders"], row["limit"]]:
        if "median_us" in entry:
            in_float32 = entry["name"].endswith(", float32")
            kind = entry["name"].removesuffix(", float32")
            entry["tokens_per_s"] = 2 * TOKENS / entry["median_us"] * 1e6
            entry["peak_mib"] = peak_mib(shape, FLOAT32 if in_float32 else dtype, kind, device)
    return row


if __name__ == "__main__":
    print(alone(sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3]))
