"""Check that ten steps of a tiny model have the recorded losses on the CPU, and the CPU's on this device. On GPUs: not yet run on hardware.

`golden_losses.json` holds the losses of torch's layers on a CPU; `python -m tests.golden.record` writes it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ledom.hardware_check.check import Outcome, Setting, failed, passed
from megatron_ledom.hardware_check.curves import Difference, Record, compare, compare_each, largest, numbers_of
from megatron_ledom.hardware_check.training_runs import STEPS, TrainingRuns, own_layers

TOLERANCE = Difference(loss=2e-5, grad_norm=2e-4)
"""Relative tolerances in fp32 for ten steps: other kernels add in another order. TF32 would exceed them: it has three bits more than
bf16, which differs by 1e-3 of the loss and 6e-3 of the gradient norm."""
RECORD_TOLERANCE = Difference(loss=1e-5, grad_norm=1e-4)
"""Relative tolerances of the CPU against the recorded losses: other CPUs and versions of torch add in another order."""
DEVICE_RECORD_TOLERANCE = Difference(TOLERANCE.loss + RECORD_TOLERANCE.loss, TOLERANCE.grad_norm + RECORD_TOLERANCE.grad_norm)
"""Those of the device against the recorded losses, so that two runs within the others are never outside this one."""
TORCH = "model.transformer_impl=torch"
REFERENCE = "torch_on_cpu"
RECORDED = Path(__file__).with_name("golden_losses.json")


@dataclass(frozen=True, slots=True)
class Golden:
    """The reference: losses and gradient norms of each step, and the sha256 of the training data."""

    data_sha256: str
    steps: list[Record]


def recorded() -> Golden:
    """Return the recorded losses."""
    return Golden(**json.loads(RECORDED.read_text(encoding="utf-8")))


def check_golden(setting: Setting) -> Outcome:
    """Train with torch's layers on the CPU, and on the device with each kind of layers; compare every step, also with the record.

    On a CPU torch's layers would be compared with themselves, so only the other kinds run there.
    """
    kinds = kinds_of_layers(setting.device)
    runs, reference = TrainingRuns(setting), {REFERENCE: [TORCH]}
    launches = {"cpu": {**reference, **kinds}} if setting.device == "cpu" else {"cpu": reference, setting.device: kinds}
    for device in launches:
        runs.prepare(1, device)
    records: dict[str, list[Record]] = {}
    for device, same in launches.items():
        records |= runs.train(same, device=device)
    return judge(Golden(runs.data_sha256(), records.pop(REFERENCE)), records, recorded(), setting.device)


def judge(cpu: Golden, found: Mapping[str, Sequence[Record]], record: Golden, device: str) -> Outcome:
    """Return the outcome: failed if the CPU differs from the record, or a kind of layers from the CPU; the reason says which did.

    cpu: torch's layers on the CPU. found: the records of the device by kind of layers.
    """
    from_record = compare(cpu.steps, record.steps)
    of_kinds = {name: compare(steps, record.steps) for name, steps in found.items()}
    differences, problems = compare_each(found, cpu.steps, TOLERANCE)
    same_data = cpu.data_sha256 == record.data_sha256
    numbers = {
        "steps": STEPS,
        "differences": numbers_of(differences),
        "differences_from_the_record": {REFERENCE: from_record.numbers(), **numbers_of(of_kinds)},
        "data_of_the_record": same_data,
    }
    tested = "the GPU" if device == "cuda" else "the CPU with other layers"
    against = "torch's layers on the CPU"
    if from_record.exceeds(RECORD_TOLERANCE):
        has_record = not largest(of_kinds.values()).exceeds(DEVICE_RECORD_TOLERANCE)
        cause = _cause(tested, problems, same_data=same_data, has_record=has_record)
        return failed(
            f"{against} differ from the recorded losses: {from_record.sentence(RECORD_TOLERANCE)}; {cause}", **numbers
        )
    if problems:
        return failed(
            f"{tested} differs from {against}, which have the recorded losses, so the cause is the device, its libraries or its"
            f" operators: {'; '.join(problems)}",
            **numbers,
        )
    names = ", ".join(name.replace("_", " ") for name in found)
    where = " (this device is the CPU, so torch's own layers are not compared)" if device == "cpu" else ""
    return passed(
        f"{STEPS} steps in fp32 with {names} against {against}{where}: {largest(differences.values()).sentence(TOLERANCE)};"
        f" {against} against the recorded losses: {from_record.sentence(RECORD_TOLERANCE)}",
        **numbers,
    )


def _cause(tested: str, problems: Sequence[str], *, same_data: bool, has_record: bool) -> str:
    """Return the likely cause if the CPU differs from the record, from the results of the device."""
    if not same_data:
        return "the training data are not those of the record, so the cause is the installation (tokenizers, preprocessing)"
    if not problems:
        return f"{tested} agrees with them, so the cause is the installation, not the device"
    if has_record:
        return f"{tested} has the recorded losses, so the cause is the CPU or its libraries"
    return f"look into the installation first; {tested} also differs from them: {'; '.join(problems)}"


def kinds_of_layers(device: str) -> dict[str, list[str]]:
    """Return the overrides of each kind of layers to compare on a device, by name."""
    kinds = {"torch": [TORCH], "unfused_attention": [TORCH, "model.attention_backend=unfused"]}
    if (fused := own_layers(device)) != TORCH:
        kinds["fused_operators"] = [fused]
    return {name: overrides for name, overrides in kinds.items() if device != "cpu" or name != "torch"}
