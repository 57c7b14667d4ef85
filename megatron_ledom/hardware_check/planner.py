"""Check the planner on this machine: kernels, collectives, and a training step and its memory. On GPUs: not yet run on hardware."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ledom.hardware_check.check import Outcome, Setting, failed, passed
from megatron_ledom.hardware_check.collectives import MEASURED
from megatron_ledom.hardware_check.ranks import Ranks, end_of_log, free_ports
from megatron_ledom.hardware_check.speed import chosen_config, described, hardware_here, peak_memory, train_steps
from megatron_ledom.planning.calibration import mean_and_largest_error, measure_hardware
from megatron_ledom.planning.hardware import Hardware
from megatron_ledom.planning.memory import GIB
from megatron_ledom.planning.plan import Plan, make_plan
from megatron_ledom.platform.device import prepare_platform
from megatron_ledom.platform.launch import ALONE

MEMORY_FACTOR = 1.25
"""Largest ratio of planned and allocated memory, GPUs only. The bytes that a layer keeps are planned within 1 %, but the working memory
and the workspaces of libraries only roughly; a plan that is further off chooses layouts that do not fit."""
STEP_FACTOR = {"cuda": 1.5, "cpu": 10.0}
"""Largest ratio of planned and measured seconds of a step. Published runs on A100 are planned within 1.06, with efficiencies of that
GPU; here they are fitted on kernels of this machine alone, and the plan does not have the time in which Python starts kernels. On a
CPU other programs may run during one measurement and not during the other, so only an order of magnitude is wrong."""
KERNEL_ERROR = {"cuda": 0.5, "cpu": 10.0}
"""Largest mean error of kernels that the fit has not seen. On a GPU a measured call has its start and a wait, about half of the
shortest kernels. On a CPU other programs lengthen single kernels: beside 60 to 100 busy processes on two cores, two runs were 64 % and
340 % off, and their steps 25 % and 126 %."""
COLLECTIVES_PART = 0.4
"""Part of the time limit for the collectives; that of the steps is as large."""
EFFICIENCIES = (
    "matmul_efficiency",
    "matmul_half_depth",
    "memory_efficiency",
    "attention_efficiency",
    "attention_backward_efficiency",
)


def check_planner(setting: Setting) -> Outcome:
    """Calibrate the planner and compare its kernels, and a step of the model of `speed`, with what is measured here.

    With several ranks the collectives between them are measured and fitted too.
    """
    platform = prepare_platform(None if setting.device == "cuda" else 1, ALONE)
    hardware, measurements = measure_hardware(hardware_here(platform), platform, ALONE)
    collectives, problems = measure_collectives(hardware, setting)  # before the steps, which fill the memory of a GPU
    config = chosen_config(platform, hardware)
    plan = make_plan(config, 1, hardware)
    steps = train_steps(config, platform, 0.4 * setting.seconds)
    memory = peak_memory(platform)
    errors = {
        words: dict(zip(("mean", "largest"), mean_and_largest_error(hardware, measurements, is_fitted=is_fitted), strict=True))
        for words, is_fitted in (("fitted_kernels", True), ("other_kernels", False))
    }
    numbers = {
        **described(config),
        "errors_of_kernels": errors,
        "planned_step_seconds": plan.time.total,
        "step_seconds": steps.median,
        "error_of_step": plan.time.total / steps.median - 1,
        "planned_gib": planned_gib(plan),
        **memory,
        "hardware": {key: getattr(hardware, key) for key in ("peak_tflops", "memory_gb_per_second", *EFFICIENCIES)},
    }
    sentence = (
        f"a planned step takes {plan.time.total:.4g} s, a measured one {steps.median:.4g} s ({numbers['error_of_step']:+.0%});"
        f" kernels are {errors['other_kernels']['mean']:.0%} off on average"
    )
    if collectives:
        numbers |= collectives
        sentence += f"; all-reduces of {setting.num_gpus} ranks reach {collectives['collective_efficiency']:.0%} of the links' bandwidth"
    problems += judge(
        setting.device,
        step_ratio=plan.time.total / steps.median,
        kernel_error=errors["other_kernels"]["mean"],
        memory_ratio=planned_gib(plan) / memory["allocated_gib"] if memory else None,
    )
    return failed("; ".join(problems), **numbers) if problems else passed(sentence, **numbers)


def judge(device: str, *, step_ratio: float, kernel_error: float, memory_ratio: float | None) -> list[str]:
    """Return a sentence for each part of the plan that is clearly wrong.

    step_ratio, memory_ratio: planned / measured; None if memory is not measured. kernel_error: mean relative error, without
    sign, of the kernels that the fit has not seen.
    """
    problems = []
    for subject, ratio, factor in (
        ("time of a step", step_ratio, STEP_FACTOR[device]),
        ("memory", memory_ratio, MEMORY_FACTOR),
    ):
        if ratio is not None and not 1 / factor <= ratio <= factor:
            problems.append(
                f"the planned {subject} is {ratio:.2f} of the measured one (allowed {1 / factor:.2f} to {factor:.2f})"
            )
    if not kernel_error <= KERNEL_ERROR[device]:
        problems.append(
            f"kernels that the fit has not seen are {kernel_error:.0%} off on average (tolerance {KERNEL_ERROR[device]:.0%})"
        )
    return problems


def planned_gib(plan: Plan) -> float:
    """Return the planned memory of the tensors, in GiB."""
    return max(stage.allocated for stage in plan.stages) / GIB


def measure_collectives(hardware: Hardware, setting: Setting) -> tuple[dict[str, Any], list[str]]:
    """Start ranks that measure all-reduces, if there is more than one; return what they found, and a sentence if they failed.

    They find the fitted `collective_efficiency`, and `collectives`, a row for each size.
    """
    if setting.num_gpus < 2:
        return {}, []
    path, seconds = Path(setting.folder, "collectives.json"), COLLECTIVES_PART * setting.seconds
    ranks = Ranks("megatron_ledom.hardware_check.collectives", path, setting.num_gpus, setting.device)
    work = {"port": free_ports(1)[0], "hardware": asdict(hardware)}
    codes = ranks.run(work, time.monotonic() + seconds)
    subject = f"the collectives of {setting.num_gpus} ranks"
    if codes is None:
        return {}, [f"{subject} did not end in {seconds:.0f} s: {end_of_log(ranks.log_file)}; allow more time"]
    if any(codes):
        return {}, [f"{subject} {ranks.failure(codes)}"]
    return json.loads(Path(f"{path}{MEASURED}").read_text(encoding="utf-8")), []
