"""Calibration: it recovers known efficiencies from measurements, and writes a file that the planner can load."""

import timeit
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ledom.planning import calibration
from megatron_ledom.planning.calibration import Measurement, calibrate, describe, fit_kernels
from megatron_ledom.planning.hardware import load_hardware
from megatron_ledom.planning.step_time import Group, all_reduce_seconds, flash_seconds, matmul_seconds, memory_seconds

TRUTH = replace(
    load_hardware("a100-80"),
    matmul_efficiency=0.66,
    matmul_half_depth=128.0,
    memory_efficiency=0.71,
    attention_efficiency=0.5,
    attention_backward_efficiency=0.4,
    collective_efficiency=0.6,
    latency_us=1e-6,
)


def measurements_of(hardware: object) -> list[Measurement]:
    """Return the measurements of a machine that is exactly `hardware`."""
    found = []
    for index, depth in enumerate((256, 1024, 4096, 8192)):
        planned = lambda machine, depth=depth: matmul_seconds(machine, 8192, 8192, depth)  # noqa: E731
        found.append(Measurement(f"product of depth {depth}", planned(hardware), planned, index % 2 == 0))
    kernels = {
        "addition": lambda machine: memory_seconds(machine, 1e9),
        "attention forwards": lambda machine: flash_seconds(machine, 1e12)[0],
        "attention backwards": lambda machine: flash_seconds(machine, 1e12)[1],
        "all-reduce": lambda machine: all_reduce_seconds(machine, Group(16, 8), 1e9),
    }
    return found + [Measurement(name, planned(hardware), planned, True) for name, planned in kernels.items()]


def test_fit_recovers_the_efficiencies_that_made_the_measurements() -> None:
    guessed = replace(load_hardware("a100-80"), latency_us=1e-6)
    found = fit_kernels(guessed, measurements_of(TRUTH))
    assert found.matmul_half_depth == 128.0
    for name in ("matmul", "memory", "attention", "attention_backward", "collective"):
        assert getattr(found, f"{name}_efficiency") == pytest.approx(getattr(TRUTH, f"{name}_efficiency"), rel=1e-6)
    assert "not fitted: 0.0% off on average" in describe(found, measurements_of(TRUTH), "own.yaml")


def bf16_tflops(side: int = 256) -> float:
    """Return the TFLOP/s of a square bf16 product here, the best of three. Without bf16 instructions it is below 0.001."""
    factor = torch.randn(side, side).bfloat16()
    best = min(timeit.repeat(lambda: factor @ factor, number=1, repeat=4)[1:])
    return 2 * side**3 / best / 1e12


def test_calibration_writes_a_hardware_file_for_the_planner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calibration.SIDES, "cpu", (64, 96, 128))
    own = tmp_path / "own.yaml"
    text = calibrate("cpu", str(own))
    hardware = load_hardware(str(own))
    assert hardware.is_cpu
    assert 0.03 < hardware.peak_tflops / bf16_tflops() < 30  # a busy machine, another shape; but the right unit
    assert hardware.matmul_efficiency > 0.001
    assert "not fitted: " in text
    assert text.rstrip().endswith(f"ledom plan-run --hardware {own}")
