"""What mask training and serving cost, computed from a config.json alone: nothing is loaded or downloaded.

One training step of NeuMuter's objective is traced on the model as one device holds it, and as one device of
several holds it under tensor parallelism. What FSDP2 and device_map save follows by arithmetic.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from neumuter.files import PathLike
from neumuter.models.layouts import check_layout, divide
from neumuter.models.loading import raising_one_line
from neumuter.models.quantised import find_quantisation, refuse_quantised
from neumuter.models.recomputation import decoder_layers
from neumuter.training.batches import SAMPLES_PER_PASS, PairedBatches
from neumuter.training.pace import ALONE, CARD, CARDS, Group, Work
from neumuter.training.step import Step
from neumuter.training.tracing import Nothing, Trace, trace

# This share of a device's memory may be in use.
FILLED = 0.95
# A score, its gradient and the two moments of Adam, all float32.
STATE_BYTES = 16
# GPUs of a machine, unless it is said how many.
MACHINE = 8
# What ``neumuter.models.layouts`` calls the layouts over several processes.
LAYOUTS = {
    "DDP": "ddp", "FSDP2, ZeRO-3": "fsdp", "FSDP2 and tensor parallel": "fsdp+tp", "tensor parallel": "tp",
}  # fmt: skip
# Fewer samples of each kind take no less memory, because the neurons are ranked on so many at a time.
LEAST_SAMPLES = SAMPLES_PER_PASS // 2


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes.

    layouts: {name: {part: bytes per device}} for the number of devices asked.
    refused: {name: why} of those that there are not for this model.
    seconds: {name: {card: the time of a step by its data sheet}}, all with the same samples; see
        ``neumuter.training.pace``.
    """

    model: str
    parameters: int
    neurons: int
    weights: int
    # Scores, their gradients and Adam's moments.
    masks: int
    # The last hidden states of the retain samples.
    reference: int
    # What is kept for the backward pass, and what is needed beyond all of these at the peak.
    activations: int
    temporary: int
    # FLOPs of one training step, and the bytes that its operations read and write.
    flops: int
    moved: int
    # Of each layer, when serving: (bytes of a token's keys and values, window or None).
    cache: tuple[tuple[int, int | None], ...]
    layouts: dict[str, dict[str, int]]
    refused: dict[str, str]
    seconds: dict[str, dict[str, float]]

    def choose(self, memory: float, card: str = CARD, processes: bool = False) -> str | None:
        """The fastest layout that fits ``memory`` bytes a device with 5 % to spare; None if none does.

        card: of ``CARDS``. processes: leave out layouts in one process.
        """
        peaks = {name: sum(parts.values()) for name, parts in self.layouts.items()}
        fitting = [name for name, peak in peaks.items() if peak <= FILLED * memory]
        allowed = [name for name in fitting if name in LAYOUTS or not processes]
        return min(allowed, key=lambda name: self.seconds[name][card], default=None)

    @property
    def training(self) -> int:
        """Peak bytes of mask training on one device."""
        return self.weights + self.masks + self.reference + self.activations + self.temporary

    def serving(self, sequences: int, tokens: int) -> int:
        """Bytes of serving ``sequences`` of ``tokens`` tokens each with one mute set, on one device."""
        kept = sum(size * min(tokens, window or tokens) for size, window in self.cache)
        return self.weights + 4 * self.neurons + sequences * kept


class Fitting(NamedTuple):
    """The layout that a plan has chosen, or None, and for what it holds.

    batch: samples of each kind in a step of all devices. samples: of each kind that a device is planned for
    where the samples of a step are divided. recompute: whether activations are.
    """

    plan: Plan
    layout: str | None
    batch: int
    samples: int
    recompute: bool


def load_config(path: PathLike) -> PreTrainedConfig:
    """Load the config at ``path``, a config.json or the folder that has one.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of no model that transformers knows.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{path} is neither a config.json nor a folder that has one")
    with raising_one_line(str(path)), torch.device("meta"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(file, trust_remote_code=False)
        AutoModelForCausalLM.from_config(_plain_text_config(config), trust_remote_code=False)
    return config


def plan(
    config: PreTrainedConfig,
    devices: int = 1,
    samples: int = 8,
    tokens: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    recompute: bool = False,
    machine: int = MACHINE,
    batch: int | None = None,
) -> Plan:
    """Plan mask training and serving for a config of transformers.

    Layouts with tensor parallelism are left out inside a process group, where they cannot be traced.

    Args:
        samples: of each kind, forget and retain, that a device has in a step.
        tokens: of each sample.
        dtype: of the weights.
        recompute: whether activations are computed again in the backward pass.
        machine: devices of each machine.
        batch: samples of each kind in a step of all devices. Those that compute layers together, by tensor
            parallelism, have the same samples: their share of the batch, at least ``LEAST_SAMPLES``. None:
            ``samples`` as well.

    Raises:
        ValueError: a model that ``attach`` refuses; quantised weights; experts in another dtype than
            bfloat16, which fake tensors do not multiply; or a model whose forward pass depends on values,
            which they do not have.
    """
    given, config = config, _plain_text_config(config)
    found = trace(config, _make_step, "ddp", 1, samples, tokens, dtype, recompute)
    masked, model = found.masked, found.masked.model
    cache = _cache(model)
    neurons = sum(len(score) for score in masked.scores.values())
    masked.detach()
    parts = _parts(found, neurons)
    work, local = Work.of(found, samples, recompute), min(devices, machine)
    whole = batch or samples * devices
    layouts, refused, seconds = {"one device": parts}, {}, {"one device": _time(work, whole)}
    if devices > 1:
        # DDP copies the weights.
        layouts, seconds = {"DDP": parts}, {"DDP": _time(work, whole, devices)}
        for name, layout in LAYOUTS.items():
            if layout == "ddp" or ("tp" in layout and dist.is_initialized()):
                continue
            try:
                if layout == "fsdp":
                    refuse_quantised(given, split=True)
                    layouts[name] = _gather(found, parts, devices)
                    seconds[name] = _time(work, whole, devices, Group(devices, local))
                    continue
                sizes = divide(layout, devices, local)
                shares = sizes.get("fsdp", 1)
                each = samples if batch is None else _share(batch, shares)
                layouts[name], split = _plan_split(
                    given, layout, devices, each, tokens, dtype, recompute, machine
                )
                gathered = Group(shares, max(1, local // sizes["tp"]))
                reduced = Group(sizes["tp"], min(sizes["tp"], local))
                seconds[name] = _time(split, whole, shares, gathered, reduced)
            except (ImportError, ValueError, RuntimeError) as error:
                refused[name] = str(error)
        if devices <= machine:
            layouts["device_map"] = _spread(parts, model, devices)
            seconds["device_map"] = _time(work, whole)
        else:
            refused["device_map"] = f"one process has the devices of one machine, which are {machine}"
    return Plan(
        model=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        neurons=neurons,
        flops=found.flops,
        moved=found.moved,
        cache=cache,
        layouts=layouts,
        refused=refused,
        seconds=seconds,
        **parts,
    )


def plan_tensor_parallel(
    config: PreTrainedConfig,
    layout: str,
    devices: int,
    samples: int = 8,
    tokens: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    recompute: bool = False,
    machine: int = MACHINE,
) -> dict[str, int]:
    """Plan mask training under "tp" or "fsdp+tp": {part: bytes per device}.

    Args:
        devices, samples, tokens, dtype, recompute, machine: as of ``plan``.

    Raises:
        ImportError, ValueError: the model cannot be laid out so; see ``plan``, too.
        RuntimeError: called inside a process group.
    """
    return _plan_split(config, layout, devices, samples, tokens, dtype, recompute, machine)[0]


def _plan_split(
    config: PreTrainedConfig,
    layout: str,
    devices: int,
    samples: int,
    tokens: int,
    dtype: torch.dtype,
    recompute: bool,
    machine: int,
) -> tuple[dict[str, int], Work]:
    """What ``plan_tensor_parallel`` returns, and what a device does in a step."""
    text = _plain_text_config(config)
    refuse_quantised(config, split=True)
    local = min(devices, machine)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text, dtype=dtype, trust_remote_code=False)
        check_layout(layout, model, devices, local)
    sizes = divide(layout, devices, local)
    found = trace(text, _make_step, "tp", sizes["tp"], samples, tokens, dtype, recompute)
    parts = _parts(found, sum(len(score) for score in found.masked.scores.values()))
    work = Work.of(found, samples, recompute)
    return (_gather(found, parts, sizes["fsdp"]) if "fsdp" in sizes else parts), work


def _time(
    work: Work, batch: int, shares: int = 1, gathered: Group = ALONE, reduced: Group = ALONE
) -> dict[str, float]:
    """{card: the time of a step} on devices that have one of so many shares of a batch."""
    each = math.ceil(batch / shares)
    return {name: work.seconds(card, each, gathered, reduced) for name, card in CARDS.items()}


def find_fitting(
    config: PreTrainedConfig,
    memory: float,
    devices: int = 1,
    batch: int = 8,
    tokens: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    machine: int = MACHINE,
    recompute: bool = False,
    processes: bool = False,
    card: str = CARD,
) -> Fitting:
    """Find the fastest layout that fits ``memory`` bytes a device: first as asked, then with activations
    recomputed, then with half the samples, and so on, and in the end with ``LEAST_SAMPLES`` of each kind.
    Activations are recomputed as well if that is faster than one process with all devices.

    Args:
        devices, tokens, dtype, machine: as of ``plan``.
        batch: samples of each kind in a step of all devices. However few a device has, room for
            ``LEAST_SAMPLES`` is planned.
        recompute: whether activations are recomputed in any case.
        processes: whether there is a process for each device, so that none can have them all.
        card: of ``CARDS``, on which layouts are compared.

    Raises:
        ValueError: see ``plan``.
    """
    while True:
        samples, found = _share(batch, devices), []
        for saving in (True,) if recompute else (False, True):
            one = plan(config, devices, samples, tokens, dtype, saving, machine, batch)
            layout = one.choose(memory, card, processes)
            # One process with all devices has the samples of one device.
            divided = layout is None or layout in LAYOUTS
            found.append(Fitting(one, layout, batch if divided else min(batch, samples), samples, saving))
            too_large = all(parts["weights"] > memory for parts in one.layouts.values())
            if too_large or layout not in (None, "device_map"):
                break
        if fitting := [one for one in found if one.layout]:
            return min(fitting, key=lambda one: one.plan.seconds[cast(str, one.layout)][card])
        if too_large or batch <= LEAST_SAMPLES:
            return found[-1]
        # Where devices have the fewest already, those alone have less to do that compute layers together.
        batch = max(batch // 2, LEAST_SAMPLES) if samples > LEAST_SAMPLES else LEAST_SAMPLES


def _share(batch: int, parts: int) -> int:
    """The samples of each kind that are planned for a device that has one of so many parts of a batch."""
    return max(-(-batch // parts), LEAST_SAMPLES)


def _plain_text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the text model. Raises ValueError for quantised weights."""
    if found := find_quantisation(config):
        raise ValueError(
            f"the config says that the weights are quantised by {found.get('quant_method')}, and what these "
            "take is not planned: plan the model that they were made from, and measure a step of this one"
        )
    text: PreTrainedConfig = config.get_text_config()
    return text


def _make_step(pair: PairedBatches) -> Step:
    """The step of NeuMuter's objective."""
    return Step(
        pair,
        list(pair.masked.scores.values()),
        lambda inputs, counter: pair.masked.sampling(0, counter, inputs.samples),
        [lambda found: found.kl - found.mean(found.losses)],
        Nothing(),
    )


def _parts(found: Trace, neurons: int) -> dict[str, int]:
    known = {
        "weights": found.weights,
        "masks": STATE_BYTES * neurons,
        "reference": found.reference,
        "activations": found.activations,
    }
    # Of the masks, the scores and their gradients are in the trace already.
    return known | {"temporary": found.peak - sum(known.values()) + STATE_BYTES * neurons // 2}


def _bytes(*modules: nn.Module) -> int:
    """Of the parameters and buffers that a process has, tied ones once."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(_size(t) for t in tensors.values())


def _size(tensor: Tensor) -> int:
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor.numel() * tensor.element_size()


def _cache(model: nn.Module) -> tuple[tuple[int, int | None], ...]:
    """Of each layer with keys and values: (bytes of one token's, the window that it keeps or None)."""
    with cast(FakeTensor, next(model.parameters())).fake_mode, torch.no_grad():
        output = model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True)
    cache = getattr(output, "cache", None) or output.past_key_values
    found = []
    for layer in cache.layers:
        tensors = [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
        found.append((sum(map(_size, tensors)), getattr(layer, "sliding_window", None)))
    return tuple(found)


def _gather(found: Trace, parts: dict[str, int], devices: int) -> dict[str, int]:
    """The bytes of a device if FSDP2 or ZeRO-3 splits a traced model with these ``parts`` over ``devices``.

    The weights are gathered where they are needed. The head stays gathered. Embeddings that are apart from it
    go again, if transformers wraps them on their own; tied ones are gathered twice, as embeddings and as
    head, and stay. Before a layer runs, three layers are there for a moment: what was received of it and of
    the one before, and its own weights. While it runs, forward or backward, these are two. So are embeddings
    that go.
    """
    model: Any = found.masked.model
    layers = [_bytes(layer) for layer in decoder_layers(model)]
    outside = parts["weights"] - sum(layers)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    size = _bytes(embeddings)
    tied = head is not None and head.weight is embeddings.weight
    names = {name for name, module in model.named_modules() if module is embeddings}
    wrapped = names & (getattr(model, "fsdp_plan", None) or {}).keys()
    freed = size if wrapped and not tied else 0
    last = outside + (size if tied else -freed)
    # What transformers keeps in float32 is gathered behind its layer, and the layer before goes by that.
    apart = getattr(model, "_keep_in_fp32_modules_strict", None) and model.dtype != torch.float32
    beside = {name: peak - found.peak + parts["temporary"] for name, peak in found.peaks.items()}
    moments = (
        (2 if apart else 3) * max(layers) - parts["activations"] // len(layers),
        2 * freed - parts["activations"],
        2 * max(layers) + max(beside["layers"], beside["backward"]),
        beside["head"],
    )
    weights = math.ceil(parts["weights"] / devices)
    return parts | {"weights": weights, "temporary": last + max(moments)}


def _spread(parts: dict[str, int], model: Any, devices: int) -> dict[str, int]:
    """The bytes of a device if device_map spreads the layers of a model with these ``parts``.

    Their activations are spread with them. The embeddings and the head are counted with each device.
    """
    layers = sum(map(_bytes, decoder_layers(model)))
    weights = parts["weights"] - layers + math.ceil(layers / devices)
    divided = {part: math.ceil(parts[part] / devices) for part in ("masks", "activations")}
    return parts | divided | {"weights": weights}
