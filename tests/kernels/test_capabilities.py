"""Every instruction set gives the same gates and selections, and the same activations to rounding."""

import functools
import os
import subprocess
import sys

import pytest
import torch

from neumuter_kernels import _C

NAMES = ["baseline", "avx2", "avx512", "avx512_bf16"]
SUPPORTED = NAMES[: NAMES.index(_C.cpu_capability()) + 1]

SCRIPT = """
import sys, torch
import neumuter_kernels as nk
torch.manual_seed(0)
results = {}
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for activation in nk.ACTIVATIONS:
        gate, up, grad = (torch.randn(70, 1100).to(dtype) for _ in range(3))
        mask = torch.rand(2, 1100, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        leaves = [x.requires_grad_() for x in (gate, up, mask)]
        h = nk.masked_glu(*leaves, activation=activation)
        for i, x in enumerate((h, *torch.autograd.grad(h, leaves, grad))):
            results[f"{dtype} {activation} {i}"] = x.detach()
scores = 3 * torch.randn(5000)
results["gates"] = nk.hard_concrete(scores, 3, 1, 2, 3)
results["gains"] = nk.select_muted(scores[None], budget=400).gains
torch.save(results, sys.argv[1])
"""


EDGES = """
# Far out, where exp overflows or underflows, φ is x or 0 and its slope 1 or 0.
x = torch.tensor([[3e38, 1e30, 100.0, -95.0, -120.0, -1e30]]).requires_grad_()
h = nk.masked_act(x, torch.ones(1, 6), activation="silu")
h.sum().backward()
torch.testing.assert_close(h, x.clamp(min=0), rtol=1e-6, atol=1e-38)
torch.testing.assert_close(x.grad, (x > 0).float(), rtol=1e-6, atol=1e-38)
# A NaN with all bits set must not be rounded to a zero.
nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)[None]
for dtype in (torch.bfloat16, torch.float16):
    gate, up = (torch.ones(1, 2, dtype=dtype, requires_grad=True) for _ in range(2))
    h = nk.masked_glu(gate, up, nan, activation="silu")
    h.sum().backward()
    assert all(y.isnan().all() for y in (h, gate.grad, up.grad)), (h, gate.grad, up.grad)
"""


def run(capability, path):
    environment = os.environ | {"NEUMUTER_CPU_CAPABILITY": capability}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT + EDGES, str(path)], env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Function: how both scripts ended with an instruction set, and the results; once for each."""

    @functools.cache
    def ran(capability):
        path = tmp_path_factory.mktemp(capability) / "results.pt"
        done = run(capability, path)
        assert path.exists(), done.stderr
        return done, torch.load(path)

    return ran


@pytest.mark.parametrize("capability", SUPPORTED[:-1])
def test_narrower_instruction_sets_agree(capability, ran):
    (_, found), (_, widest) = ran(capability), ran(SUPPORTED[-1])
    assert found.keys() == widest.keys()
    for name, x in found.items():
        if name in ("gates", "gains"):
            assert torch.equal(x, widest[name])
        else:
            # The float32 gradient of the mask is a sum over activations, which are rounded to their dtype.
            eps = torch.finfo(getattr(torch, name.split()[0].removeprefix("torch."))).eps
            torch.testing.assert_close(x, widest[name], rtol=64 * eps, atol=16 * eps, msg=name)


@pytest.mark.parametrize("capability", SUPPORTED)
def test_edges_of_the_arithmetic(capability, ran):
    done, _ = ran(capability)
    assert done.returncode == 0, done.stderr


def test_unknown_name_says_what_there_is(tmp_path):
    done = run("sse9", tmp_path / "results.pt")
    assert done.returncode != 0
    assert "NEUMUTER_CPU_CAPABILITY is 'sse9'" in done.stderr
    assert SUPPORTED[-1] in done.stderr


def test_report_says_what_is_installed():
    done = subprocess.run(
        [sys.executable, "-m", "neumuter_kernels"], capture_output=True, text=True, check=True
    )
    for expected in (
        torch.__version__,
        "CPU capability",
        _C.cpu_capability(),
        "op masked_ffn",
        "op select_muted",
    ):
        assert expected in done.stdout
