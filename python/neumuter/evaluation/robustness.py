"""Do forgotten texts stay forgotten? Metrics after quantisation, and after learning some of them again."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from neumuter.evaluation.forms import most_known
from neumuter.mutes.mute_set import MuteSource
from neumuter.serving.fold import fold
from neumuter.training.weights import WeightsConfig, tune_weights
from neumuter.types import Batch

BITS = (8, 4)
# At 4 bits, this number of input features shares a scale.
GROUP_SIZE = 32
RELEARNING = WeightsConfig(method="relearn", steps=100, batch_size=8, lr=5e-5)
EXPLAINED = (
    "int8, int4: the muted model, folded and quantised. half: asked about a random half of the texts. "
    "relearned N: asked about the same half, after N steps of training on the other half."
)
# The steps of relearning after which metrics are measured.
MEASURED_STEPS = (10, 30, 100)


def robustness(
    model: nn.Module,
    mutes: MuteSource | None,
    forms: Sequence[Batch],
    measure: Callable[[nn.Module, Batch], dict[str, float]],
    config: WeightsConfig = RELEARNING,
    measured: Sequence[int] = MEASURED_STEPS,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Measure copies of ``model`` that have ``mutes`` folded in and are then tampered with.

    The states:

    - "int8", "int4": linear weights rounded to 8 bits per output channel, or to 4 bits per group of 32, by
      torchao; asked about all texts. The output layer is left alone, as is usual.
    - "half": only folded; asked about half of the texts, drawn with ``seed``.
    - "relearned N": trained for N steps on the other half of the texts, and asked about the same as "half"
      (Hu et al. 2025, *Unlearning or Obfuscating?*). All weights are trained; these and "half" in float32.

    One copy is in memory at a time, in training with its gradients and two moments of AdamW.

    Args:
        model: a causal language model, neither attached nor muted; it stays as it is.
        mutes: a ``MuteSet``, the path of a mute file, or None for a model that forgot in another way.
        forms: at least two texts, in each form in which somebody can ask for them, as
            ``neumuter.texts.encode_forms`` gives them; the first one is what is learned again. "texts" may be
            missing where there is one form with a row for each text.
        measure: called as ``measure(model, batch)`` with the model of a state and the texts that it is asked
            about, each in the form in which that model knows it best; returns its metrics.
        config: how the model relearns, of method "relearn".
        measured: the steps of relearning after which metrics are measured.
        seed: draws the half that is relearned, and the order of training.

    Returns:
        {state: metrics}.

    Raises:
        ImportError: the package torchao is not installed.
        ValueError: fewer than two texts, a model without linear layers that torchao rounds, ``measured``
            beyond the steps of ``config``, or what ``neumuter.fold`` raises.
    """
    given = _number_rows(forms[0]).unique()
    count = len(given)
    if count < 2:
        raise ValueError(f"relearning needs two forget texts or more, to learn and to ask about; got {count}")
    if config.method != "relearn" or not all(0 < step <= config.steps for step in measured):
        raise ValueError(f"config must be of method 'relearn' with {max(measured)} steps, got {config}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    asked, learned = (
        [_take_texts(form, given[half]) for form in forms] for half in order.tensor_split([(count + 1) // 2])
    )

    def ask(model: nn.Module, forms: Sequence[Batch]) -> dict[str, float]:
        return measure(model, most_known(model, forms))

    found = {f"int{bits}": ask(quantise(_folded(model, mutes), bits), forms) for bits in BITS}
    folded = _folded(model, mutes).float()
    found["half"] = ask(folded, asked)
    folded.requires_grad_(True)

    def report(step: int, total: int, info: dict[str, Any]) -> None:
        if step in measured:
            found[f"relearned {step}"] = ask(folded, asked)

    tune_weights(folded, learned[0], None, config, seed, report)
    return found


def _number_rows(form: Batch) -> Tensor:
    """The number of each row's text, int64 [B]."""
    return form.get("texts", torch.arange(len(form["labels"])))


def _take_texts(form: Batch, numbers: Tensor) -> Batch:
    """The rows of the texts of these numbers, in their order."""
    found = _number_rows(form)
    rows = torch.cat([(found == number).nonzero().flatten() for number in numbers])
    return {name: value[rows] for name, value in form.items()}


def quantise(model: nn.Module, bits: int) -> nn.Module:
    """Round the linear weights of ``model`` in place, as far as they fit (see :func:`robustness`).

    Returns:
        ``model``.

    Raises:
        ImportError: the package torchao is not installed.
        ValueError: ``bits`` is neither 8 nor 4, or no layer fits.
    """
    try:
        from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
    except ImportError as error:
        raise ImportError("measuring after quantisation needs torchao: pip install torchao") from error
    kinds = {8: (torch.int8, PerAxis(0)), 4: (torch.int4, PerGroup(GROUP_SIZE))}  # type: ignore[attr-defined]  # not in torch's stubs
    if bits not in kinds:
        raise ValueError(f"bits must be 8 or 4, got {bits!r}")
    dtype, granularity = kinds[bits]
    head = cast(Any, model).get_output_embeddings()

    rounded: list[str] = []

    def fits(module: nn.Module, name: str) -> bool:
        linear = isinstance(module, nn.Linear) and module is not head
        if linear and (bits == 8 or cast(nn.Linear, module).in_features % GROUP_SIZE == 0):
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
