"""Check that ten steps of a tiny model have the same losses on this device as on the CPU. On GPUs: not yet run on hardware."""

from megatron_ledom.hardware_check.check import Outcome, Setting, failed, passed
from megatron_ledom.hardware_check.curves import Difference, Record, compare_each, largest, numbers_of
from megatron_ledom.hardware_check.training_runs import STEPS, TrainingRuns, own_layers

TOLERANCE = Difference(loss=2e-5, grad_norm=2e-4)
"""Relative tolerances in fp32 for ten steps: other kernels add in another order. TF32 would exceed them: it has three bits more than
bf16, which differs by 1e-3 of the loss and 6e-3 of the gradient norm."""
TORCH = "model.transformer_impl=torch"
REFERENCE = "torch_on_cpu"


def check_golden(setting: Setting) -> Outcome:
    """Train with torch's layers on the CPU, and on the device with each kind of layers; compare every step.

    On a CPU torch's layers would be compared with themselves, so only the other kinds run there.
    """
    kinds = kinds_of_layers(setting.device)
    runs, reference = TrainingRuns(setting), {REFERENCE: [TORCH]}
    launches = {"cpu": {**reference, **kinds}} if setting.device == "cpu" else {"cpu": reference, setting.device: kinds}
    records: dict[str, list[Record]] = {}
    for device, same in launches.items():
        records |= runs.train(same, device=device)
    differences, problems = compare_each({name: records[name] for name in kinds}, records[REFERENCE], TOLERANCE)
    numbers = {"steps": STEPS, "differences": numbers_of(differences)}
    against = "torch's layers on the CPU"
    if problems:
        return failed(f"{STEPS} steps differ from {against}: {'; '.join(problems)}", **numbers)
    names = ", ".join(name.replace("_", " ") for name in kinds)
    where = " (this device is the CPU, so torch's own layers are not compared)" if setting.device == "cpu" else ""
    worst = largest(differences.values()).sentence(TOLERANCE)
    return passed(f"{STEPS} steps in fp32 with {names} against {against}{where}: {worst}", **numbers)


def kinds_of_layers(device: str) -> dict[str, list[str]]:
    """Return the overrides of each kind of layers to compare on a device, by name."""
    kinds = {"torch": [TORCH], "unfused_attention": [TORCH, "model.attention_backend=unfused"]}
    if (fused := own_layers(device)) != TORCH:
        kinds["fused_operators"] = [fused]
    return {name: overrides for name, overrides in kinds.items() if device != "cpu" or name != "torch"}
