"""The planner's error on published runs. A few fit its numbers, the others test it. Also the tables of docs/planner.md."""

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
from megatron_ledom.planning.step_time import layer_cost, step_time
from megatron_ledom.planning.validation.published import Point, UncertainPoint, published
from megatron_ledom.tables import markdown_table

CONFIG = "ledom_7b"
HARDWARE = ("a100-80", "h100-sxm")
Numbers = npt.NDArray[np.float64]
PRIORS = {
    "matmul_efficiency": (0.78, 0.10),
    "matmul_half_depth": (256.0, 0.70),
    "memory_efficiency": (0.85, 0.10),
    "collective_efficiency": (0.80, 0.12),
    "overlap_efficiency": (0.60, 0.30),
    "iteration_ms": (25.0, 0.70),
}
"""Fitted numbers of a hardware file: usual value, and standard deviation of its logarithm."""
NOISE = 0.015
"""Relative standard deviation of a published time."""
HIGHEST = 0.98
"""Largest fitted efficiency."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A published time of an iteration, and the planner's."""

    point: Point
    predicted: float

    @property
    def error(self) -> float:
        """Return the relative error: 0.02 if the plan is two per cent too slow."""
        return self.predicted / self.point.seconds - 1


def compare_points(hardware: Hardware) -> list[Comparison]:
    """Return every published point with the planner's time.

    The first point of a scaled family sets the slowdown of the family.
    """
    known, software, found = published().points, dict(published().software), []
    for point in known:
        if point.use == "scaled":
            slowdown = family_slowdown(hardware, point)
            software[point.family] = replace(software[point.family], slowdown=slowdown)
    for point in known:
        found.append(Comparison(point, step_time(point.model, point.layout, hardware, software[point.family]).total))
    return found


def family_slowdown(hardware: Hardware, point: Point) -> float:
    """Return the factor by which passes of the point's program and cluster are slower than on the fitted hardware."""
    software = published().software[point.family]
    plain = step_time(point.model, point.layout, hardware, software)
    return (point.seconds - (plain.total - plain.pipeline)) / plain.pipeline


def residuals(hardware: Hardware) -> Iterator[float]:
    """Yield log(predicted / measured) for the passes of a layer of the 22B, and for the 22B's iterations."""
    software, model = published().software["Korthikanti 2022"], published().table_3["22B"][0]
    for layer in published().layers:
        forward, backward, core = layer_cost(model, layer.layout, hardware, software)
        again = core.total if layer.layout.recompute == "selective" else 0.0
        yield math.log(1e3 * forward.total / layer.forward)
        yield math.log(1e3 * (backward.total + again) / layer.backward)
    for point in published().points:
        if point.use == "fitted":
            yield math.log(step_time(point.model, point.layout, hardware, software).total / point.seconds)


def fit(hardware: Hardware, rounds: int = 30) -> Hardware:
    """Return the most likely hardware given the fitted points and PRIORS, by the Levenberg-Marquardt method on logarithms."""
    names, damping = list(PRIORS), 1e-2
    logarithms = np.log([PRIORS[name][0] for name in names])
    found = _deviations(hardware, names, logarithms)
    for _ in range(rounds):
        columns = [(_deviations(hardware, names, logarithms + 1e-4 * unit) - found) / 1e-4 for unit in np.eye(len(names))]
        jacobian = np.stack(columns, 1)
        normal = jacobian.T @ jacobian
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -jacobian.T @ found)
        tried = _deviations(hardware, names, logarithms + step)
        if tried @ tried < found @ found:
            logarithms, found, damping = logarithms + step, tried, damping / 3
        else:
            damping *= 4
    return _with_numbers(hardware, names, logarithms)


def _with_numbers(hardware: Hardware, names: list[str], logarithms: Numbers) -> Hardware:
    """Return the hardware with the numbers `names`, given as logarithms."""
    values = dict(zip(names, map(float, np.exp(logarithms)), strict=True))
    limited: dict[str, Any] = {name: min(v, HIGHEST) if name.endswith("efficiency") else v for name, v in values.items()}
    return replace(hardware, **limited)


def _deviations(hardware: Hardware, names: list[str], logarithms: Numbers) -> Numbers:
    """Return the residuals of measurements and priors, in standard deviations."""
    usual = [(logarithms[index] - math.log(PRIORS[name][0])) / PRIORS[name][1] for index, name in enumerate(names)]
    return np.array([*(value / NOISE for value in residuals(_with_numbers(hardware, names, logarithms))), *usual])


def errors(comparisons: Sequence[Comparison], *uses: str) -> tuple[float, float]:
    """Return the mean and the largest absolute relative error of the points with these uses."""
    found = [abs(one.error) for one in comparisons if one.point.use in uses]
    return sum(found) / len(found), max(found)


def interval(point: UncertainPoint) -> tuple[float, float]:
    """Return the interval of seconds of an iteration over the variants of a point that fit into memory."""
    hardware = load_hardware(point.hardware)
    fitting = [one for one in point.variants if needed_gib(point.model, one[0], hardware) <= hardware.memory_gib]
    found = [step_time(point.model, layout, hardware, software).total for layout, software in fitting or point.variants]
    return min(found) * (1 - hardware.uncertainty), max(found) * (1 + hardware.uncertainty)


def exact_memory(name: str) -> tuple[float, float, float]:
    """Return the planner's GiB for a model of `table_3`; like the table, it counts the weights of the layers' matrices only."""
    model, shape, _ = published().table_3[name]
    plain, saving = Layout(**shape), Layout(**shape, sequence_parallel=True, recompute="selective")
    matrices = 12 * model.num_layers * model.hidden_size**2 // (plain.tensor * plain.pipeline)
    activations = [activation_bytes(model, layout, 0, "published")[0] / GIB for layout in (plain, saving)]
    return sum(state_bytes(model, plain, matrices)) / GIB, activations[0], activations[1]


def planned_peak(peak: UncertainPoint) -> int:
    """Return the planner's bytes of tensors on the last pipeline stage, where the peak was measured."""
    ((layout, _),) = peak.variants
    return stage_memory(peak.model, layout, layout.pipeline - 1).allocated


def validation_page(hardware: Hardware) -> str:
    """Return the tables of VALIDATION.md."""
    comparisons = compare_points(hardware)
    (mean, most), (fitted_mean, fitted_most) = errors(comparisons, "unfitted"), errors(comparisons, "fitted")
    count = sum(one.point.use == "unfitted" for one in comparisons)
    parts = [
        _comparison_table(comparisons),
        f"On the {count} unfitted points the mean error is {mean:.1%} (goal: 3 %), the largest {most:.1%} (goal: 8 %); on the fitted"
        f" ones {fitted_mean:.1%} and {fitted_most:.1%}.",
        "Points with unknown inputs, and the interval over the possible inputs:",
        _interval_table(),
        "Memory, GiB a device (published / planned):",
        _memory_table(),
        "Measured peaks of tensors on the last rank; none was fitted (goal: 5 %):",
        _peak_table(),
    ]
    return "\n\n".join(parts) + "\n"


def _comparison_table(comparisons: Sequence[Comparison]) -> str:
    rows = [["point", "source", "measured s", "planned s", "error", "use"]]
    for one in comparisons:
        numbers = [f"{one.point.seconds:.2f}", f"{one.predicted:.2f}", f"{one.error:+.1%}"]
        rows.append([one.point.name, one.point.source, *numbers, one.point.use])
    return markdown_table(rows, "llrrr")


def _interval_table() -> str:
    rows = [["point", "source", "unknown", "measured s", "planned between", "verdict"]]
    for point in published().uncertain_points:
        low, high = interval(point)
        name = f"{point.name}, {point.gpu}" if point.gpu else point.name
        cells = [f"{point.seconds:.2f}", f"{low:.2f} and {high:.2f}", _verdict(point.seconds, low, high)]
        rows.append([name, point.source, point.unknown, *cells])
    return markdown_table(rows, "lllrr")


def _verdict(seconds: float, low: float, high: float) -> str:
    if low <= seconds <= high:
        return "inside"
    return f"{seconds / high - 1:.1%} above" if seconds > high else f"{1 - seconds / low:.1%} below"


def _memory_table() -> str:
    rows = [["model", "parameters and optimizer", "activations", "with SP and selective recompute"]]
    for name, (_, _, exact) in published().table_3.items():
        rows.append([name, *(f"{there:.2f} / {here:.2f}" for there, here in zip(exact, exact_memory(name), strict=True))])
    return markdown_table(rows, "lrrr")


def _peak_table() -> str:
    rows = [["point", "GPU", "source", "measured GiB", "planned GiB", "error"]]
    for peak in published().peaks:
        planned = planned_peak(peak)
        numbers = [f"{peak.num_bytes / GIB:.2f}", f"{planned / GIB:.2f}", f"{planned / peak.num_bytes - 1:+.1%}"]
        rows.append([peak.name, peak.gpu, peak.source, *numbers])
    return markdown_table(rows, "lllrrr")


def worked_examples() -> str:
    """Return tables of the best layouts of the 7B on 64 devices of each kind, and of the plan of the first."""
    best: list[Plan] = []
    layouts = [["on 64", "layout", "s/iteration", "MFU", "GiB a device"]]
    for name in HARDWARE:
        ranked = search(load_config(CONFIG), 64, load_hardware(name)).ranked
        best.append(ranked[0][1])
        for _, plan in ranked[:3]:
            cells = [f"{plan.time.total:.1f}", f"{plan.mfu:.1%}", f"{plan.needed_gib:.1f}"]
            layouts.append([plan.hardware.name, name_layout(plan.layout), *cells])
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
    numbers = [["the best of them", *(plan.hardware.name for plan in best)], *([name, *cells] for name, cells in rows.items())]
    return f"{markdown_table(layouts, 'llrrr')}\n\n{markdown_table(numbers, 'lrr')}\n"
