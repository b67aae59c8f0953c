"""The energy meter, on counters of our own making."""

import sys
from types import SimpleNamespace

import pytest
import torch
from neumuter import energy


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = tmp_path / "intel-rapl:0"
    folder.mkdir()
    (folder / "max_energy_range_uj").write_text("1000000000\n")
    return folder / "energy_uj"


def test_joules_of_a_package(package):
    package.write_text("999000000\n")
    joules = energy.meter()
    package.write_text("999500000\n")
    assert joules() == pytest.approx(0.5)
    package.write_text("2000000\n")  # it started again
    assert joules() == pytest.approx(3.0)


def test_unknown_where_nothing_counts(package):
    assert energy.meter()() is None  # no energy_uj
    package.mkdir()  # cannot be read
    assert energy.meter()() is None


def test_joules_of_a_gpu(package, monkeypatch):
    counted = [5000]
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-1-2": 0}[uuid],
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: counted[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="1-2"))
    joules = energy.meter()
    counted[0] = 7500
    assert joules() == pytest.approx(2.5)
