"""The planner's error on published runs. A few fit its numbers, the others test it. Also the tables of docs/planner.md."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ledom.config.load import load_config
from megatron_ledom.errors import ConfigError
from megatron_ledom.planning.hardware import Hardware, load_hardware
from megatron_ledom.planning.memory import GIB, activation_bytes, stage_memory, state_bytes
from megatron_ledom.planning.plan import Plan, name_layout
from megatron_ledom.planning.search import needed_gib, search
from megatron_ledom.planning.shapes import Layout
from megatron_ledom.planning.step_time import StepTime, layer_cost, step_time
from megatron_ledom.planning.validation.published import Point, UncertainPoint, published
from megatron_ledom.tables import markdown_table

CONFIG = "ledom_7b"
HARDWARE = ("a100-80", "h100-sxm")
Numbers = npt.NDArray[np.float64]
USUAL = {
    "matmul_efficiency": (0.78, 0.10),
    "matmul_half_depth": (256.0, 0.70),
    "memory_efficiency": (0.85, 0.10),
    "collective_efficiency": (0.80, 0.12),
    "overlap_efficiency": (0.60, 0.30),
    "iteration_ms": (25.0, 0.70),
}
PRIORS = {
    "a100-80": USUAL,
    "h100-sxm": {**USUAL, "matmul_efficiency": (0.64, 0.10), "matmul_half_depth": (400.0, 0.70)},
}
"""Fitted numbers of each hardware file: usual value, and standard deviation of its logarithm."""
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


def file_of(hardware: Hardware) -> str:
    """Return the name of the hardware file that describes the same GPU. Raises ConfigError if no published run used it."""
    for name in HARDWARE:
        if load_hardware(name).name == hardware.name:
            return name
    raise ConfigError(f"no published run used {hardware.name}; choose one of {', '.join(HARDWARE)}, or a file with such a name")


def points_of(hardware: Hardware) -> list[Point]:
    """Return the published points of a GPU."""
    return [point for point in published().points if point.hardware == file_of(hardware)]


def compare_points(hardware: Hardware) -> list[Comparison]:
    """Return every published point of this GPU with the planner's time.

    The first point of a scaled family sets the slowdown of the family.
    """
    slowdown: dict[str, float] = {}
    found = []
    for point in points_of(hardware):
        if point.use == "scaled":
            slowdown[point.family] = family_slowdown(hardware, point)
        found.append(Comparison(point, seconds_of(point, hardware, slowdown.get(point.family, 1.0))))
    return found


def seconds_of(point: Point, hardware: Hardware, slowdown: float = 1.0) -> float:
    """Return the planned seconds of an iteration of a point."""
    return step_time(point.model, point.layout, hardware, replace(point.software, slowdown=slowdown)).total


def family_slowdown(hardware: Hardware, point: Point) -> float:
    """Return the factor by which passes of the point's program and cluster are slower than on the fitted hardware."""
    plain = step_time(point.model, point.layout, hardware, point.software)
    return (point.seconds - (plain.total - plain.pipeline)) / plain.pipeline


def residuals(hardware: Hardware, points: Sequence[Point]) -> Iterator[float]:
    """Yield log(predicted / measured) for the points, and on the A100 for the passes of a layer of the 22B."""
    if file_of(hardware) == "a100-80":
        model, software = published().table_3["22B"][0], points[0].software
        for layer in published().layers:
            forward, backward, core = layer_cost(model, layer.layout, hardware, software)
            again = core.total if layer.layout.recompute == "selective" else 0.0
            yield math.log(1e3 * forward.total / layer.forward)
            yield math.log(1e3 * (backward.total + again) / layer.backward)
    for point in points:
        yield math.log(seconds_of(point, hardware) / point.seconds)


def fitted_points(hardware: Hardware) -> list[Point]:
    """Return the points of this GPU that set its numbers."""
    return [point for point in points_of(hardware) if point.use == "fitted"]


def fit(hardware: Hardware, points: Sequence[Point] | None = None, rounds: int = 30) -> Hardware:
    """Return the most likely hardware given the points (default: the fitted ones) and PRIORS.

    The method is Levenberg-Marquardt on logarithms; it ends when a step changes almost nothing.
    """
    points = fitted_points(hardware) if points is None else points
    priors, damping = PRIORS[file_of(hardware)], 1e-2
    names = list(priors)
    logarithms = np.log([priors[name][0] for name in names])
    found = _deviations(hardware, points, logarithms)
    for _ in range(rounds):
        moved = [_deviations(hardware, points, logarithms + 1e-4 * unit) for unit in np.eye(len(names))]
        jacobian = np.stack([(one - found) / 1e-4 for one in moved], 1)
        normal = jacobian.T @ jacobian
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -jacobian.T @ found)
        tried = _deviations(hardware, points, logarithms + step)
        if tried @ tried >= found @ found:
            damping *= 4
            continue
        logarithms, gain, found, damping = logarithms + step, 1 - tried @ tried / (found @ found), tried, damping / 3
        if gain < 1e-5:
            break
    return _with_numbers(hardware, names, logarithms)


def _with_numbers(hardware: Hardware, names: list[str], logarithms: Numbers) -> Hardware:
    """Return the hardware with the numbers `names`, given as logarithms."""
    values = dict(zip(names, map(float, np.exp(logarithms)), strict=True))
    limited: dict[str, Any] = {name: min(v, HIGHEST) if name.endswith("efficiency") else v for name, v in values.items()}
    return replace(hardware, **limited)


def _deviations(hardware: Hardware, points: Sequence[Point], logarithms: Numbers) -> Numbers:
    """Return the residuals of measurements and priors, in standard deviations."""
    priors = PRIORS[file_of(hardware)]
    usual = [(value - math.log(prior)) / spread for value, (prior, spread) in zip(logarithms, priors.values(), strict=True)]
    changed = _with_numbers(hardware, list(priors), logarithms)
    return np.array([*(value / NOISE for value in residuals(changed, points)), *usual])


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


def judge(point: UncertainPoint, hardware: Hardware) -> tuple[StepTime, Layout, float]:
    """Return the plan and the layout of the point's fastest variant that fits into memory, and the seconds of the slowest."""
    fitting = [one for one in point.variants if needed_gib(point.model, one[0], hardware) <= hardware.memory_gib]
    plans = [(step_time(point.model, layout, hardware, software), layout) for layout, software in fitting]
    best = min(plans, key=lambda plan: plan[0].total)
    return *best, max(time.total for time, _ in plans)


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


def validation_page(own: Hardware | None = None) -> str:
    """Return the tables of VALIDATION.md. own: numbers to use for its GPU instead of those of this package."""
    numbers = {name: load_hardware(name) for name in HARDWARE}
    if own is not None:
        numbers[file_of(own)] = own
    parts = []
    for name in HARDWARE:
        parts += [f"### {numbers[name].name}", *_gpu_parts(numbers[name])]
    parts += [
        "### Other tables",
        "Points with unknown inputs, and the interval over the possible inputs:",
        _interval_table(),
        "Refused by name, and not planned:",
        markdown_table([["run", "source", "reason"], *([*row.values()] for row in published().refused)], "lll"),
        "Memory, GiB a device (published / planned):",
        _memory_table(),
        "Measured peaks of tensors on the last rank; none was fitted (goal: 5 %):",
        _peak_table(),
    ]
    return "\n\n".join(parts) + "\n"


def _gpu_parts(hardware: Hardware) -> Iterator[str]:
    """Yield the tables and sentences about one GPU."""
    comparisons, name = compare_points(hardware), file_of(hardware)
    layers = 2 * len(published().layers) if name == "a100-80" else 0
    fitted = sum(one.point.use == "fitted" for one in comparisons)
    known = f"{fitted} rows{f' and {layers} passes of one layer' if layers else ''}"
    yield f"{len(PRIORS[name])} numbers are fitted on {known}. Errors by series:"
    yield _series_table(comparisons)
    yield _comparison_table(comparisons)
    judged = [point for point in published().judged if point.hardware == name]
    if judged:
        yield "Judged runs, on which nothing was fitted. The plan is that of the fastest variant that fits into memory:"
        yield _judged_table(judged, hardware)
        yield "The same run in the same layout in several releases of its program:"
        yield _release_table()


def _series_table(comparisons: Sequence[Comparison]) -> str:
    """Return the mean and the largest error of each series and use."""
    rows = [["series", "use", "rows", "mean error", "largest"]]
    keys = dict.fromkeys((one.point.family, one.point.use) for one in comparisons)
    groups = [
        (family, use, [one for one in comparisons if (one.point.family, one.point.use) == (family, use)])
        for family, use in keys
    ]
    groups.append(("all", "unfitted", [one for one in comparisons if one.point.use == "unfitted"]))
    for family, use, chosen in groups:
        mean, most = errors(chosen, use)
        rows.append([family, use, str(len(chosen)), f"{mean:.1%}", f"{most:.1%}"])
    return markdown_table(rows, "llrrr")


def _judged_table(points: Sequence[UncertainPoint], hardware: Hardware) -> str:
    """Return the judged runs, and their mean and largest error."""
    rows = [["run", "GPUs", "variant", "measured s", "planned s", "error", "slowest variant"]]
    found = []
    for point in points:
        time, layout, slowest = judge(point, hardware)
        found.append(time.total / point.seconds - 1)
        numbers = [f"{point.seconds:.3f}", f"{time.total:.3f}", f"{found[-1]:+.1%}", f"{slowest / point.seconds - 1:+.1%}"]
        variant = f"micro-batch {layout.micro_batch_size}{f', {layout.chunks} chunks' if layout.pipeline > 1 else ''}"
        rows.append([point.name, f"{layout.num_ranks:,}", variant, *numbers])
    sizes = [abs(one) for one in found]
    words = f"Of these {len(sizes)} the mean error is {sum(sizes) / len(sizes):.1%}, the largest {max(sizes):.1%} (goal: 5 % and 10 %)."
    return f"{markdown_table(rows, 'lrlrrrr')}\n\n{words} They are of {points[0].source}."


def _release_table() -> str:
    releases = sorted({name for row in published().other_releases for name in row["seconds"]})
    rows = [["run", "GPUs", *(f"NeMo {name}, s" for name in releases), "range"]]
    for row in published().other_releases:
        seconds = row["seconds"]
        cells = [f"{seconds[name]:.2f}" if name in seconds else "" for name in releases]
        rows.append([row["name"], str(row["ranks"]), *cells, f"{max(seconds.values()) / min(seconds.values()) - 1:.1%}"])
    return markdown_table(rows, f"lr{'r' * len(releases)}r")


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
