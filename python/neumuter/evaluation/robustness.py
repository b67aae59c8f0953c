"""Do forgotten texts stay forgotten? Metrics after quantisation, and after learning some of them again."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from neumuter.mutes.mute_set import MuteSource
from neumuter.serving.fold import fold
from neumuter.training.weights import WeightsConfig, tune_weights
from neumuter.types import Batch

BITS = (8, 4)
GROUP = 32  # input features that share a scale at 4 bits
RELEARNING = WeightsConfig(method="relearn", steps=100, batch_size=8, lr=5e-5)
EXPLAINED = (
    "int8, int4: the muted model, folded and quantised. half: of a random half of the texts. relearned N: of "
    "the same, after N steps of training on the other half."
)
MEASURED = (10, 30, 100)  # steps of relearning after which it is measured


def robustness(
    model: nn.Module,
    mutes: MuteSource | None,
    forget_batch: Batch,
    measure: Callable[[nn.Module, Batch], dict[str, float]],
    config: WeightsConfig = RELEARNING,
    measured: Sequence[int] = MEASURED,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """{state: metrics} of copies of ``model`` that have ``mutes`` folded in and are then tampered with.

    ``model``: neither attached nor muted; it stays as it is. ``mutes``: a MuteSet, a mute file's path, or
    None for a model that forgot in another way.
    ``forget_batch``: as in :class:`neumuter.training.batches.Pair`, at least two texts. ``measure(model,
    batch)``: a dict of metrics, of a state's model and the forget texts that are asked about. The states:

    - "int8", "int4": linear weights rounded to 8 bits per output channel, or to 4 bits per group of 32, by
      torchao; asked about all texts. The output layer is left alone, as is usual.
    - "half": only folded; asked about half of the texts, drawn with ``seed``.
    - "relearned N": trained for N steps on the other half of the texts, and asked about the same as "half"
      (Hu et al. 2025, *Unlearning or Obfuscating?*). All weights are trained; these and "half" in float32.

    One copy is in memory at a time, in training with its gradients and two moments of AdamW.
    Raises ImportError without torchao, ValueError for a model without linear layers that it rounds or for
    ``measured`` beyond the steps, and the errors of ``neumuter.fold``.
    """
    count = len(forget_batch["labels"])
    if count < 2:
        raise ValueError(f"relearning needs two forget texts or more, to learn and to ask about; got {count}")
    if config.method != "relearn" or not all(0 < step <= config.steps for step in measured):
        raise ValueError(f"config must be of method 'relearn' with {max(measured)} steps, got {config}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    halves = order.tensor_split([(count + 1) // 2])
    asked, learned = ({k: v[rows] for k, v in forget_batch.items()} for rows in halves)
    found = {f"int{bits}": measure(quantised(_folded(model, mutes), bits), forget_batch) for bits in BITS}
    folded = _folded(model, mutes).float()
    found["half"] = measure(folded, asked)
    folded.requires_grad_(True)

    def report(step: int, total: int, info: dict[str, Any]) -> None:
        if step in measured:
            found[f"relearned {step}"] = measure(folded, asked)

    tune_weights(folded, learned, None, config, seed, report)
    return found


def quantised(model: nn.Module, bits: int) -> nn.Module:
    """``model`` with its linear weights rounded in place, see :func:`robustness`, as far as they fit."""
    try:
        from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
    except ImportError as error:
        raise ImportError("measuring after quantisation needs torchao: pip install torchao") from error
    kinds = {8: (torch.int8, PerAxis(0)), 4: (torch.int4, PerGroup(GROUP))}  # type: ignore[attr-defined]  # not in torch's stubs
    if bits not in kinds:
        raise ValueError(f"bits must be 8 or 4, got {bits!r}")
    dtype, granularity = kinds[bits]
    head = cast(Any, model).get_output_embeddings()

    rounded: list[str] = []

    def fits(module: nn.Module, name: str) -> bool:
        linear = isinstance(module, nn.Linear) and module is not head
        if linear and (bits == 8 or cast(nn.Linear, module).in_features % GROUP == 0):
            rounded.append(name)
        return name in rounded

    quantize_(model, IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity), filter_fn=fits)
    if not rounded:
        raise ValueError(f"{type(model).__name__} has no linear layer that torchao rounds to {bits} bits")
    return model


def _folded(model: nn.Module, mutes: MuteSource | None) -> nn.Module:
    folded = copy.deepcopy(model)
    if mutes is not None:
        fold(folded, mutes)
    return folded
