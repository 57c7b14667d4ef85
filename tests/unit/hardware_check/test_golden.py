"""The sentence of the check `golden` names the side that differs: the device, the CPU, the installation or the training data."""

from dataclasses import replace

import pytest

from megatron_ledom.hardware_check import golden
from megatron_ledom.hardware_check.check import Status
from megatron_ledom.hardware_check.curves import Record
from megatron_ledom.hardware_check.golden import Golden

RECORD = golden.recorded()
OTHER_DATA = "0" * 64


def planted(loss: float, grad_norm: float = 1.0, step: int = 7) -> list[Record]:
    """Return the recorded steps with the values of one step multiplied."""
    factors = {"lm_loss": loss, "grad_norm": grad_norm}
    return [
        {**record, **({key: record[key] * factor for key, factor in factors.items()} if record["iteration"] == step else {})}
        for record in RECORD.steps
    ]


@pytest.mark.parametrize(
    ("cpu", "device", "named"),
    [
        (planted(1), planted(1.001), "the GPU differs from torch's layers on the CPU, which have the recorded losses"),
        (planted(1), planted(1, 1.01), "so the cause is the device, its libraries or its operators: fused: losses differ by"),
        (planted(1.001), planted(1.001), "the GPU agrees with them, so the cause is the installation, not the device"),
        (planted(1, 1.01), planted(1), "the GPU has the recorded losses, so the cause is the CPU or its libraries"),
        (planted(1.001), planted(1.002), "look into the installation first; the GPU also differs from them: fused"),
        (planted(float("nan")), planted(1), "the GPU has the recorded losses"),
    ],
)
def test_the_reason_names_the_side_that_differs(cpu: list[Record], device: list[Record], named: str) -> None:
    outcome = golden.judge(replace(RECORD, steps=cpu), {"fused": device}, RECORD, "cuda")
    assert outcome.status is Status.FAILED
    assert named in outcome.reason


def test_the_numbers_have_every_difference_from_the_record() -> None:
    outcome = golden.judge(RECORD, {"fused": planted(1 + 1e-5)}, RECORD, "cuda")
    assert outcome.status is Status.PASSED
    assert "against the recorded losses: losses differ by 0.0e+00 (tolerance 1e-05)" in outcome.reason
    found = outcome.numbers["differences_from_the_record"]
    assert found["fused"]["loss_difference"] == pytest.approx(1e-5)
    assert found[golden.REFERENCE] == {"loss_difference": 0, "grad_norm_difference": 0}


def test_other_training_data_are_named() -> None:
    outcome = golden.judge(Golden(OTHER_DATA, planted(1.1)), {"fused": planted(1.1)}, RECORD, "cpu")
    assert outcome.status is Status.FAILED
    assert "torch's layers on the CPU differ from the recorded losses: losses differ by 1.0e-01" in outcome.reason
    assert "the training data are not those of the record" in outcome.reason


def test_two_runs_within_their_tolerances_are_within_that_of_the_record() -> None:
    """Otherwise a device could be said to differ from the record, although it agrees with a CPU that has it."""
    cpu, device = planted(1 + 0.99e-5), planted(1 + 2.9e-5)
    assert golden.judge(replace(RECORD, steps=cpu), {"fused": device}, RECORD, "cuda").status is Status.PASSED
    assert not golden.compare(device, RECORD.steps).exceeds(golden.DEVICE_RECORD_TOLERANCE)
