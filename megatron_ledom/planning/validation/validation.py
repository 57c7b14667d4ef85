"""How far the planner is off on published runs: fitted on a few, judged by the others.

The worked examples of the project's README, and how marked parts of documents are kept equal to what scripts print.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ledom.config.load import load_config
from megatron_ledom.planning.hardware import Hardware, load_hardware
from megatron_ledom.planning.memory import GIB, activation_bytes, stage_memory, state_bytes
from megatron_ledom.planning.plan import Plan, name_layout
from megatron_ledom.planning.search import needed_gib, search
from megatron_ledom.planning.shapes import Layout
from megatron_ledom.planning.step_time import Software, layer_cost, step_time
from megatron_ledom.planning.validation.published import (
    KORTHIKANTI,
    MEGATRON_TESTS,
    SOFTWARE,
    MeasuredPeak,
    OpenPoint,
    Point,
    layer_points,
    measured_peaks,
    open_points,
    points,
)

CONFIG = "ledom_7b"
HARDWARE = ("a100-80", "h100-sxm")


def worked_examples() -> str:
    """The best layouts of the 7B on 64 devices of each kind, and what the first of them needs and takes."""
    lines = ["| on 64 | layout | s/iteration | MFU | GiB a device |", "|---|---|---:|---:|---:|"]
    best: list[Plan] = []
    for name in HARDWARE:
        found = search(load_config(CONFIG), 64, load_hardware(name))
        best.append(found.ranked[0][1])
        for _, plan in found.ranked[:3]:
            cells = f"{plan.time.total:.1f} | {plan.mfu:.1%} | {plan.needed_gib:.1f}"
            lines.append(f"| {plan.hardware.name} | {name_layout(plan.layout)} | {cells} |")
    lines += ["", "| the best of them | " + " | ".join(plan.hardware.name for plan in best) + " |", "|---|---:|---:|"]
    rows = {
        "s/iteration, interval": [f"{plan.interval[0]:.1f} to {plan.interval[1]:.1f}" for plan in best],
        "tokens/s a device": [f"{plan.tokens_per_second_per_device:,.0f}" for plan in best],
        "days for 435.37 B tokens": [f"{plan.seconds / 86400:.1f}" for plan in best],
        "device-hours": [f"{plan.device_hours:,.0f}" for plan in best],
        "GiB: weights, gradients, optimizer": [f"{plan.stages[0].state / GIB:.1f}" for plan in best],
        "GiB: activations and logits": [f"{(plan.stages[0].activations + plan.stages[0].logits) / GIB:.1f}" for plan in best],
        "matrix products": [f"{plan.time.passes.matmul / plan.time.total:.0%}" for plan in best],
        "attention": [f"{plan.time.passes.attention / plan.time.total:.0%}" for plan in best],
        "element-wise kernels": [f"{plan.time.passes.memory / plan.time.total:.0%}" for plan in best],
        "tensor-parallel traffic": [f"{plan.time.passes.tensor_comm / plan.time.total:.0%}" for plan in best],
    }
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


Numbers = npt.NDArray[np.float64]
PRIORS = {
    "matmul_efficiency": (0.78, 0.10),
    "matmul_half_depth": (256.0, 0.70),
    "memory_efficiency": (0.85, 0.10),
    "collective_efficiency": (0.80, 0.12),
    "overlap_efficiency": (0.60, 0.30),
    "iteration_ms": (25.0, 0.70),
}
"""Numbers of a hardware file that the fit decides: what they usually are, and by how much (standard deviation of the logarithm)."""
NOISE = 0.015
"""Standard deviation of a published time, as a share."""
HIGHEST = 0.98
"""Of an efficiency."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A published iteration beside the planner's."""

    point: Point
    predicted: float

    @property
    def error(self) -> float:
        """Relative: 0.02 is two per cent too slow."""
        return self.predicted / self.point.seconds - 1


def judge(hardware: Hardware) -> list[Judged]:
    """Every published point with the planner's time; the scaled ones have their family's slowdown taken out of the first."""
    known, slowdown, found = points(), dict.fromkeys(SOFTWARE, 1.0), []
    for point in known:
        if point.use == "scaled":
            slowdown[point.family] = family_slowdown(hardware, point)
    for point in known:
        software = replace(SOFTWARE[point.family], slowdown=slowdown[point.family])
        found.append(Judged(point, step_time(point.model, point.layout, hardware, software).total))
    return found


def family_slowdown(hardware: Hardware, point: Point) -> float:
    """How much longer passes take in the program and cluster of a point than on the fitted hardware."""
    software = SOFTWARE[point.family]
    plain = step_time(point.model, point.layout, hardware, software)
    return (point.seconds - (plain.total - plain.pipeline)) / plain.pipeline


def residuals(hardware: Hardware) -> Iterator[float]:
    """Logarithms of predicted over measured: passes of a 22B layer, and the 22B's iterations."""
    software: Software = SOFTWARE["Korthikanti 2022"]
    model = KORTHIKANTI["22B"][0]
    for layer in layer_points():
        forward, backward, core = layer_cost(model, layer.layout, hardware, software)
        again = core.total if layer.layout.recompute == "selective" else 0.0
        yield math.log(1e3 * forward.total / layer.forward)
        yield math.log(1e3 * (backward.total + again) / layer.backward)
    for point in points():
        if point.use == "fitted":
            yield math.log(step_time(point.model, point.layout, hardware, software).total / point.seconds)


def fit(hardware: Hardware, rounds: int = 30) -> Hardware:
    """The likeliest hardware given the fitted points and PRIORS, by Levenberg and Marquardt's steps over logarithms."""
    names, damping = list(PRIORS), 1e-2
    place = np.log([PRIORS[name][0] for name in names])
    found = _deviations(hardware, names, place)
    for _ in range(rounds):
        columns = [(_deviations(hardware, names, place + 1e-4 * unit) - found) / 1e-4 for unit in np.eye(len(names))]
        jacobian = np.stack(columns, 1)
        normal = jacobian.T @ jacobian
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -jacobian.T @ found)
        tried = _deviations(hardware, names, place + step)
        if tried @ tried < found @ found:
            place, found, damping = place + step, tried, damping / 3
        else:
            damping *= 4
    return _placed(hardware, names, place)


def _placed(hardware: Hardware, names: list[str], place: Numbers) -> Hardware:
    """The hardware with the numbers whose logarithms are `place`."""
    values = dict(zip(names, map(float, np.exp(place)), strict=True))
    limited: dict[str, Any] = {name: min(v, HIGHEST) if name.endswith("efficiency") else v for name, v in values.items()}
    return replace(hardware, **limited)


def _deviations(hardware: Hardware, names: list[str], place: Numbers) -> Numbers:
    """Residuals in standard deviations, the priors' among them."""
    usual = [(place[index] - math.log(PRIORS[name][0])) / PRIORS[name][1] for index, name in enumerate(names)]
    return np.array([*(value / NOISE for value in residuals(_placed(hardware, names, place))), *usual])


def errors(judged: Sequence[Judged], *uses: str) -> tuple[float, float]:
    """Mean and largest absolute relative error of points of these uses."""
    found = [abs(one.error) for one in judged if one.point.use in uses]
    return sum(found) / len(found), max(found)


def interval(point: OpenPoint) -> tuple[float, float]:
    """Seconds of an iteration between the quickest and the slowest that the point may have been, of those that fit."""
    hardware = load_hardware(point.hardware)
    fitting = [one for one in point.variants if needed_gib(point.model, one[0], hardware) <= hardware.memory_gib]
    found = [step_time(point.model, layout, hardware, software).total for layout, software in fitting or point.variants]
    return min(found) * (1 - hardware.uncertainty), max(found) * (1 + hardware.uncertainty)


EXACT = {  # GiB a device: parameters and optimizer, activations, activations with sequence parallelism and selective recompute
    "22B": (45.56, 59.25, 9.56),
    "175B": (45.56, 66.84, 12.35),
    "530B": (31.64, 114.02, 23.08),
    "1T": (32.96, 131.25, 26.56),
}
"""Recomputed from the formulas of arXiv 2205.05198 for the models of its table 3."""


def exact_memory(name: str) -> tuple[float, float, float]:
    """The planner's numbers for a line of EXACT; weights are those of the layers' matrices, as there."""
    model, shape = KORTHIKANTI[name]
    plain, saving = Layout(**shape), Layout(**shape, sequence_parallel=True, recompute="selective")
    matrices = 12 * model.num_layers * model.hidden_size**2 // (plain.tensor * plain.pipeline)
    activations = [activation_bytes(model, layout, 0, "published")[0] / GIB for layout in (plain, saving)]
    return sum(state_bytes(model, plain, matrices)) / GIB, activations[0], activations[1]


def planned_peak(peak: MeasuredPeak) -> int:
    """The planner's bytes of tensors on the last pipeline stage, whose rank the measured peak is of."""
    return stage_memory(peak.model, peak.layout, peak.layout.pipeline - 1).allocated


def validation_page(hardware: Hardware) -> str:
    """The tables of VALIDATION.md."""
    judged = judge(hardware)
    lines = ["| point | source | measured s | planned s | error | use |", "|---|---|---:|---:|---:|---|"]
    lines += [
        f"| {one.point.name} | {one.point.source} | {one.point.seconds:.2f} | {one.predicted:.2f} | {one.error:+.1%} | {one.point.use} |"
        for one in judged
    ]
    (mean, most), (fitted_mean, fitted_most) = errors(judged, "unfitted"), errors(judged, "fitted")
    count = sum(one.point.use == "unfitted" for one in judged)
    lines += [
        "",
        f"On the {count} unfitted points the mean error is {mean:.1%} (goal: 3 %), the largest {most:.1%} (goal: 8 %); on the fitted"
        f" ones {fitted_mean:.1%} and {fitted_most:.1%}.",
        "",
        "Where inputs are unknown, an interval over what they may have been:",
        "",
        "| point | source | unknown | measured s | planned between | verdict |",
        "|---|---|---|---:|---:|---|",
    ]
    for point in open_points():
        low, high = interval(point)
        middle = f"{point.seconds:.2f} | {low:.2f} and {high:.2f}"
        lines.append(f"| {point.name} | {point.source} | {point.unknown} | {middle} | {_verdict(point.seconds, low, high)} |")
    lines += ["", "Memory, GiB a device (published / planned):", ""]
    lines += ["| model | parameters and optimizer | activations | with SP and selective recompute |", "|---|---:|---:|---:|"]
    for name, exact in EXACT.items():
        cells = [f"{there:.2f} / {here:.2f}" for there, here in zip(exact, exact_memory(name), strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Measured peaks of tensors on the last rank, none of which was fitted (goal: 5 %):", ""]
    lines += ["| point | GPU | source | measured GiB | planned GiB | error |", "|---|---|---|---:|---:|---:|"]
    for peak in measured_peaks():
        planned = planned_peak(peak)
        numbers = f"{peak.num_bytes / GIB:.2f} | {planned / GIB:.2f} | {planned / peak.num_bytes - 1:+.1%}"
        lines.append(f"| {peak.name} | {peak.gpu} | {MEGATRON_TESTS} | {numbers} |")
    return "\n".join(lines) + "\n"


def _verdict(seconds: float, low: float, high: float) -> str:
    if low <= seconds <= high:
        return "inside"
    return f"{seconds / high - 1:.1%} above" if seconds > high else f"{1 - seconds / low:.1%} below"
