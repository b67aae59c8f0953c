"""neumuter doctor: right kernels pass, a broken one is found and reported, and nothing private is printed."""

import socket
from pathlib import Path

import pytest
import torch

import neumuter_kernels as nk
from neumuter.cli import diagnosis as doctor
from neumuter.cli.app import main
from neumuter_kernels import reference, selftest
from neumuter_kernels.info import backends


@pytest.fixture
def breaking():
    """breaking(op, function): that op of CPU tensors is ``function`` until the end of the test."""
    library = torch.library.Library("neumuter", "IMPL", "CPU")
    yield lambda op, function: library.impl(op, function, allow_override=True)
    library._destroy()


def run(capsys):
    """(exit code, the tables, the text for a bug report)."""
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    tables, _, text = capsys.readouterr().out.partition("from here on:")
    return stop.value.code, tables, text


def test_a_sound_machine_passes_and_is_described(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "SECONDS", 0.2)
    code, tables, text = run(capsys)
    assert code == 0
    assert "fails" not in tables
    for known in (torch.__version__, nk._C.cpu_capability(), "nvcc", "peft", "transformers", "load average"):
        assert known in text
    tested = [line.split()[1:4] for line in text.splitlines() if line.startswith("test")]
    assert [["cpu", op, "passed"] for op in backends()] == tested[: len(backends())]
    assert f"threads                  {torch.get_num_threads()} of" in text
    speeds = [line for line in text.splitlines() if line.startswith("speed")]
    assert len(speeds) == len(doctor.devices())
    assert " x eager" in speeds[0]


def test_every_op_passes_on_every_backend(device, monkeypatch):
    monkeypatch.setattr(selftest, "TOLERANCE", {torch.float32: 1e-5})  # Triton's interpreter is slow
    tested = list(selftest.run(device))
    assert [result.op for result in tested] == list(backends())
    assert [result for result in tested if result.error] == []


def test_a_broken_kernel_is_reported(capsys, monkeypatch, breaking):
    def wrong(*arguments):
        return masked_ffn(*arguments) * 1.0001

    def raising(*arguments):
        raise RuntimeError(f"in {Path.home()}/secret project/kernel.py on {socket.gethostname()}")

    monkeypatch.setattr(doctor, "SECONDS", 0.0)
    breaking("masked_ffn", wrong)
    breaking("kl_divergence_", raising)
    code, tables, text = run(capsys)
    assert code == 1
    assert "A kernel fails here" in tables
    failed = {line.split()[2]: line for line in text.splitlines() if line.startswith("test cpu")}
    failed = {op: line for op, line in failed.items() if "passed" not in line}
    assert failed.keys() == {"masked_ffn", "kl_divergence_"}
    assert "relative error 0.0001, at most 1e-05" in failed["masked_ffn"]
    assert "RuntimeError: in " in failed["kl_divergence_"]
    assert str(Path.home()) not in text
    assert socket.gethostname() not in text


def masked_ffn(gate, up, mask, row_ids, activation, layout):
    """The op, out of the reference."""
    activation = nk.ACTIVATIONS[activation]
    if layout == reference.Layout.PLAIN:
        return reference.masked_act(gate, mask, row_ids, activation)
    if layout == reference.Layout.SEPARATE:
        return reference.masked_glu(gate, up, mask, row_ids, activation)
    interleaved = layout == reference.Layout.INTERLEAVED
    return reference.masked_glu_packed(gate, mask, row_ids, activation, interleaved)


def halves_only(gate, up, mask, row_ids, activation, layout):
    """Takes interleaved activations for halves."""
    if layout == reference.Layout.INTERLEAVED:
        layout = reference.Layout.HALVES
    return masked_ffn(gate, up, mask, row_ids, activation, layout)


def no_mask_gradient(grad, gate, up, mask, *rest):
    return grad, grad, torch.zeros_like(mask)


def next_float(scores, ids, step, seed, layer, temperature, gamma, zeta, training):
    gates = reference.hard_concrete(scores, ids, seed, step, layer, temperature, (gamma, zeta), training)
    return torch.nextafter(gates, torch.full_like(gates, 2.0))


def next_neuron(scores, widths, budget, threshold, gamma, zeta):
    by = {"budget": budget} if budget is not None else {"threshold": threshold}
    indptr, indices, gains = reference.select_muted(scores, widths, stretch=(gamma, zeta), **by)
    return indptr, indices + 1, gains


def other_losses(logits, targets):
    losses, slopes = reference.cross_entropy(logits, targets)
    logits.copy_(slopes)
    return losses + 0.001


@pytest.mark.parametrize(
    ("op", "broken", "error"),
    [
        ("hard_concrete", next_float, "gates differ"),
        ("hard_concrete_backward", lambda grad, *rest: 1.001 * grad.sum(0), "gradient"),
        ("select_muted", next_neuron, "indices by budget"),
        ("cross_entropy_", other_losses, "losses"),
        ("mute_", lambda *arguments: None, "bits differ"),
        ("masked_ffn_backward", no_mask_gradient, "gradient"),
        ("masked_ffn", halves_only, "interleaved"),
    ],
)
def test_what_is_a_little_wrong_fails(op, broken, error, breaking):
    breaking(op, broken)
    found = {result.op: result.error for result in selftest.run("cpu") if result.error}
    (name,) = found
    assert op.startswith(name.removesuffix("_"))
    assert error in found[name]


def test_paths_and_names_are_left_out():
    home, host = Path.home(), socket.gethostname()
    text = f"'{home}/a b/x y.py' at /usr/lib/python3/x.py:12 on {host}; C:\\Users\\ada\\y.txt; 3/4 of 1e-5"
    assert doctor.without_names(text) == "'…/x y.py' at …/x.py:12 on HOST; …/y.txt; 3/4 of 1e-5"


def test_contenders_take_turns(monkeypatch):
    calls = []
    monkeypatch.setattr(doctor, "SECONDS", 0.0)
    monkeypatch.setitem(doctor.PROBLEM, "cpu", (64, 256, torch.float32))
    monkeypatch.setattr(doctor, "_timed", lambda call, device: calls.append(call) or 1.0 + len(calls) % 3)
    monkeypatch.setattr(doctor, "devices", lambda: ["cpu"])
    (speed,) = doctor.speed_check()
    assert (speed.ours, speed.eager, speed.copy) == (2.0, 3.0, 1.0)
    assert (speed.ratio, speed.share) == (1.5, 0.5)
    assert calls[:3] == calls[3:6]
