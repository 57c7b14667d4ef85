"""Fit the planner's numbers of the A100 and the H100 on published runs, test them on the others, and write VALIDATION.md.

Reads megatron_ledom/planning/validation/published*.yaml, needs no network and no GPU, and takes half a minute on one core. Exits with 1
if a hardware file does not have the fitted numbers.

    python -m tests.benchmarks.fit_planner
"""

import math
import statistics
import sys

from megatron_ledom.markdown import write_between
from megatron_ledom.planning.hardware import Hardware, load_hardware
from megatron_ledom.planning.step_time import num_data_nodes
from megatron_ledom.planning.validation.accuracy import (
    HARDWARE,
    PRIORS,
    Comparison,
    fit,
    fitted_points,
    points_of,
    seconds_of,
    validation_page,
)
from megatron_ledom.planning.validation.published import Point
from megatron_ledom.tables import markdown_table
from tests.support.paths import ROOT

PAGE = ROOT / "megatron_ledom/planning/validation/VALIDATION.md"
H100 = "h100-sxm"
TOLERANCE = 2e-3
"""Largest relative difference between a hardware file and a new fit."""


def model_of(point: Point) -> str:
    """Return the name of the model without its number of layers."""
    return point.run.split(",")[0]


def errors_without_each(hardware: Hardware) -> list[tuple[str, int, list[Comparison]]]:
    """Return for each model of the fitted series: its name, the rows of the fit without it, and its rows with their plans."""
    fitted = fitted_points(hardware)
    families = {point.family for point in fitted}
    found = []
    for model in dict.fromkeys(map(model_of, fitted)):
        others = [point for point in fitted if model_of(point) != model]
        numbers = fit(hardware, others)
        chosen = [point for point in points_of(hardware) if model_of(point) == model and point.family in families]
        found.append((model, len(others), [Comparison(point, seconds_of(point, numbers)) for point in chosen]))
    return found


def table_without_each(found: list[tuple[str, int, list[Comparison]]]) -> str:
    """Return the errors on each model by a fit on the others."""
    rows = [["skipped", "fitted rows", "tested rows", "mean error", "largest"]]
    every: list[float] = []
    for model, count, comparisons in found:
        sizes = [abs(one.error) for one in comparisons]
        every += sizes
        rows.append([model, str(count), str(len(sizes)), f"{statistics.mean(sizes):.1%}", f"{max(sizes):.1%}"])
    rows.append(["all", "", str(len(every)), f"{statistics.mean(every):.1%}", f"{max(every):.1%}"])
    return markdown_table(rows, "lrrrr")


def growth(points: list[Point], hardware: Hardware) -> dict[str, list[float]]:
    """Return for each run with several numbers of GPUs: nodes of its data-parallel group, first and last, and measured growth a doubling."""
    found = {}
    for family, run in dict.fromkeys((point.family, point.run) for point in points):
        chosen = [point for point in points if (point.family, point.run) == (family, run)]
        nodes = [num_data_nodes(point.layout, hardware) for point in chosen]
        if nodes[-1] > nodes[0]:
            each = (chosen[-1].seconds / chosen[0].seconds - 1) / math.log2(nodes[-1] / nodes[0])
            found[f"{run}, {family}"] = [nodes[0], nodes[-1], each]
    return found


def growth_table(found: dict[str, list[float]]) -> str:
    """Return the growth of an iteration a doubling of the nodes of its data-parallel group, and the median."""
    rows = [["run", "nodes of its data-parallel group", "longer a doubling"]]
    rows += [[name, f"{first:.0f} to {last:.0f}", f"{each:.2%}"] for name, (first, last, each) in found.items()]
    rows.append(["median", "", f"{statistics.median(each for _, _, each in found.values()):.2%}"])
    return markdown_table(rows, "lrr")


def drift(name: str) -> dict[str, tuple[float, float]]:
    """Return the numbers of a hardware file that differ from a new fit: in the file, and fitted."""
    hardware = load_hardware(name)
    fitted = fit(hardware)
    pairs = {key: (getattr(hardware, key), getattr(fitted, key)) for key in PRIORS[name]}
    return {key: pair for key, pair in pairs.items() if abs(pair[0] / pair[1] - 1) > TOLERANCE}


def cross_validation() -> str:
    """Return the part of VALIDATION.md that needs further fits."""
    hardware = load_hardware(H100)
    return "\n\n".join(
        [
            f"The {hardware.name}'s numbers fitted without one model, and tested on the rows of that model:",
            table_without_each(errors_without_each(hardware)),
            "Measured growth of an iteration with the number of nodes, for `congestion` in a hardware file:",
            growth_table(growth(points_of(hardware), hardware)) + "\n",
        ]
    )


def main() -> int:
    """Write the tables of VALIDATION.md and compare the hardware files with new fits."""
    differing = 0
    for name in HARDWARE:
        for key, (there, here) in drift(name).items():
            print(f"{name}.yaml: {key} is {there:g}, but the fit gives {here:.4g}; write {here:.4g}", file=sys.stderr)
            differing = 1
    write_between(str(PAGE), "validation", validation_page())
    write_between(str(PAGE), "cross", cross_validation())
    return differing


if __name__ == "__main__":
    sys.exit(main())
