"""pytest-benchmark entries over the functions of bench/, at small sizes."""

import pytest
import torch

from bench.kernels import activations, select

GLU = activations.Case("masked_glu", 64, 1536, 1, torch.float32, "cpu", "silu")
ACT = activations.Case("masked_act", 64, 1536, 4, torch.bfloat16, "cpu", "gelu_tanh")
CASES = [(case, which, i) for case in (GLU, ACT) for which in activations.PASSES for i in range(3)]


def run(benchmark, contender):
    assert contender.check() is None
    benchmark.pedantic(
        contender.run, setup=lambda: ((contender.prepare(),), {}), rounds=20, iterations=1, warmup_rounds=2
    )


def name(value):
    return value.op if isinstance(value, activations.Case) else None


@pytest.mark.parametrize(("case", "which", "i"), CASES, ids=name)
def test_masked_activation(benchmark, case, which, i):
    benchmark.group = f"{case.op} {which}"
    contender = case.contenders(which)[i]
    benchmark.name = contender.name
    run(benchmark, contender)


@pytest.mark.parametrize("mode", select.MODES)
@pytest.mark.parametrize("i", range(2))
def test_selection(benchmark, mode, i):
    benchmark.group = f"select_muted by {mode}"
    contenders, _, _ = select.problem(4, 11008, "cpu", mode)
    benchmark.name = contenders[i].name
    run(benchmark, contenders[i])
