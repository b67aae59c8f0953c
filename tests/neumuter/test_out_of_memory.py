"""A lack of memory ends a command with advice, not with a traceback."""

import pytest
import torch

from neumuter.cli import app as cli


def no_gpu_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize(
    "work",
    [lambda: torch.empty(1 << 58), lambda: bytearray(1 << 62), no_gpu_memory],
    ids=["torch", "Python", "GPU"],
)
def test_a_lack_of_memory_ends_with_advice(work, monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", lambda arguments: work())
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    for word in ("--max-length", "--layout fsdp", "--recompute", "neumuter plan"):
        assert word in printed


def test_other_errors_end_without_it(monkeypatch, capsys):
    def work(arguments):
        raise ValueError("no such column")

    monkeypatch.setattr(cli, "app", work)
    with pytest.raises(SystemExit):
        cli.main([])
    assert capsys.readouterr().err.strip() == "error: no such column"
