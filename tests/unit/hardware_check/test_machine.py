"""The description of the machine: a driver or a GPU that does not answer is named, and does not end the check that all others need."""

from pathlib import Path

import pytest

from megatron_ledom.hardware_check import machine
from megatron_ledom.hardware_check.machine import chosen_device, driver, gpu


def nvidia_smi(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program called nvidia-smi on the PATH."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_driver_is_that_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, "echo 570.86.10\necho 570.86.10", monkeypatch)
    assert driver() == "570.86.10"


@pytest.mark.parametrize("text", ["exec tail -f /dev/null", "exit 9"])
def test_nvidia_smi_that_does_not_answer_leaves_the_driver_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(machine, "SMI_SECONDS", 0.2)
    nvidia_smi(tmp_path, text, monkeypatch)
    assert driver() == "unknown"


def test_gpu_that_cuda_cannot_use_is_a_problem_and_not_an_error() -> None:
    """Tests hide GPUs, so there is no GPU 0."""
    described, problems = gpu(0)
    assert described == {"name": "unknown"}
    assert len(problems) == 1
    assert problems[0].startswith("GPU 0 cannot be used: ")


@pytest.mark.parametrize(
    ("wanted", "found", "loaded", "visible", "device"),
    [
        ("auto", 2, True, None, "cuda"),
        ("auto", 0, True, None, "cuda"),  # torch without CUDA, or a broken driver: the check fails
        ("auto", 0, True, "", "cpu"),
        ("auto", 0, False, None, "cpu"),
        ("cpu", 2, True, None, "cpu"),
        ("cuda", 0, False, None, "cuda"),
    ],
)
def test_a_machine_with_a_driver_is_not_checked_on_its_cpu_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, found: int, loaded: bool, visible: str | None, device: str
) -> None:
    monkeypatch.setattr(machine, "NVIDIA_DRIVER", str(tmp_path if loaded else tmp_path / "absent"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert chosen_device(wanted, found) == device
