"""Tables of bench_preprocess.py: costs, floor, goals and a projection, all from one run."""

import math
import os
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from preprocess_competitors import COMPETITORS, Competitor, Suite
from preprocess_floor import STEPS
from process_tree import Usage

PROJECTED_TOKENS, CORES_A_NODE, NODES = 435e9, 64, (1, 10, 100)
SMALLEST_SHARE = 0.05  # of a run's CPU seconds; below it, noise hides the time without start-up
CLASSIC_WORKERS = 30  # with which the single parent of the classic tool was measured to be always busy


@dataclass(slots=True)
class Results:
    """Measurements by name of the competitor."""

    usages: dict[str, list[Usage]] = field(default_factory=dict)
    start_up: dict[str, Usage] = field(default_factory=dict)
    """Usage on one document."""
    steps: list[dict[str, dict[str, float]]] = field(default_factory=list)
    """Times of the floor in each round: cpu and wall, by step."""
    verdicts: dict[str, str] = field(default_factory=dict)
    """`equal`, or the files that differ from the expected ones."""
    missing: dict[str, str] = field(default_factory=dict)
    """Reason why a competitor did not run."""

    def cpu(self, name: str) -> float:
        """Return median CPU seconds, with start-up."""
        return statistics.median(usage.cpu_seconds for usage in self.usages[name])

    def wall(self, name: str) -> float:
        """Return median wall seconds."""
        return statistics.median(usage.wall_seconds for usage in self.usages[name])

    def steady_cpu(self, name: str) -> float:
        """Return median CPU seconds without start-up; NaN if the corpus is so small that noise hides them."""
        seconds = self.cpu(name) - self.start_up[name].cpu_seconds
        return seconds if seconds > SMALLEST_SHARE * self.cpu(name) else math.nan

    def cpu_ratio(self, name: str, base: str) -> float:
        """Return the median over rounds of CPU seconds of `name` / CPU seconds of `base`."""
        pairs = zip(self.usages[name], self.usages[base], strict=True)
        return statistics.median(usage.cpu_seconds / other.cpu_seconds for usage, other in pairs)

    def wall_ratio(self, name: str, base: str) -> float:
        """Return the same ratio in wall seconds."""
        pairs = zip(self.usages[name], self.usages[base], strict=True)
        return statistics.median(usage.wall_seconds / other.wall_seconds for usage, other in pairs)

    def floor_sum(self) -> float:
        """Return median CPU seconds of all steps of the floor except loading the vocabulary."""
        return statistics.median(sum(row["cpu"].get(step, 0.0) for step in STEPS) for row in self.steps)

    def has(self, *names: str) -> bool:
        """Return True if all of these ran."""
        return all(self.usages.get(name) for name in names)


def machine() -> str:
    """Return processor, cores, memory and system of this machine, without its host name."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory_kb = int(Path("/proc/meminfo").read_text().split()[1])
    model = models[0].partition(":")[2].strip() if models else platform.machine()
    return (
        f"{len(os.sched_getaffinity(0))} cores of {model}, {memory_kb / 1e6:.0f} GB, Linux {platform.release()},"
        f" Python {platform.python_version()}"
    )


def cost_table(results: Results, suites: dict[str, Suite]) -> str:
    """Return a table with one row per competitor; ratios are to ours with one worker and the same tokenizer."""
    rows = [
        "| tool | CPU s | of these start-up | wall s | CPU / ours | MB/s per core | M tokens/s per core | largest process | all |"
        " output |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for competitor in COMPETITORS:
        if competitor.name in results.missing:
            rows.append(f"| {competitor.title} | {results.missing[competitor.name]} |" + " |" * 8)
        elif results.has(competitor.name) and competitor.kind != "floor":
            rows.append(_cost_row(results, competitor, suites[competitor.suite]))
    rows.append("")
    rows.append(
        "Values per core do not include start-up. Memory: RSS of the largest process, and the sampled peak of the sum over all."
    )
    return "\n".join(rows)


def _cost_row(results: Results, competitor: Competitor, suite: Suite) -> str:
    name, base = competitor.name, "ours-sp" if competitor.suite == "sentencepiece" else "ours-1"
    ratio = f"{results.cpu_ratio(name, base):.2f}" if results.has(base) else "-"
    steady = results.steady_cpu(name)
    largest = max(usage.peak_process_bytes for usage in results.usages[name])
    tree = max(usage.peak_tree_bytes for usage in results.usages[name])
    return (
        f"| {competitor.title} | {results.cpu(name):.2f} | {results.start_up[name].cpu_seconds:.2f} | {results.wall(name):.2f} |"
        f" {ratio} | {_number(suite.manifest['text_bytes'] / 1e6 / steady, 1)} |"
        f" {_number(suite.manifest['num_tokens'] / 1e6 / steady, 2)} |"
        f" {largest / 1e6:.0f} MB | {tree / 1e6:.0f} MB | {results.verdicts.get(name, '')} |"
    )


def floor_table(results: Results, suite: Suite) -> str:
    """Return a table of the steps alone, their sum, and ours."""
    rows = ["| step alone, one thread | CPU s | wall s | MB/s of text |", "|---|---|---|---|"]
    megabytes = suite.manifest["text_bytes"] / 1e6
    for step in ("load", *STEPS):
        cpu = [row["cpu"][step] for row in results.steps if step in row["cpu"]]
        if not cpu:
            continue
        wall = statistics.median(row["wall"][step] for row in results.steps)
        rate = "once per run" if step == "load" else f"{megabytes / statistics.median(cpu):.0f}"
        rows.append(f"| {step} | {statistics.median(cpu):.3f} | {wall:.3f} | {rate} |")
    total = results.floor_sum()
    rows.append(f"| **sum without load** | **{total:.3f}** | | **{megabytes / total:.0f}** |")
    if results.has("ours-1"):
        rows.append(f"| ours, 1 worker, without start-up | {results.steady_cpu('ours-1'):.3f} | | |")
        rows.append(f"| ours, 1 worker | {results.cpu('ours-1'):.3f} | {results.wall('ours-1'):.3f} | |")
    return "\n".join(rows)


def goal_table(results: Results) -> str:
    """Return the table of the project's goals, which are for 100 MB, with the results of this run."""
    rows = ["| goal, on 100 MB of text | wanted | measured |", "|---|---|---|"]
    for name, base, wanted in (
        ("classic", "ours-1", 20),
        ("gigatoken", "ours-1", 2.5),
        ("datatrove", "ours-1", 18),
        ("sentencepiece", "ours-sp", 4),
    ):
        if results.has(name, base):
            ratio = results.cpu_ratio(name, base)
            rows.append(f"| CPU s of {name} / ours | >= {wanted} | {_judged(ratio, ratio >= wanted)} |")
    if results.steps and results.has("ours-1"):
        for label, cpu in (("", results.cpu("ours-1")), (" without start-up", results.steady_cpu("ours-1"))):
            ratio = cpu / results.floor_sum()
            rows.append(f"| CPU s of ours{label} / sum of the floor | <= 1.2 | {_judged(ratio, ratio <= 1.2)} |")
    if results.has("ours-1", "ours-2"):
        ratio = results.wall_ratio("ours-1", "ours-2")
        rows.append(f"| wall of 1 worker / 2 workers | >= 1.8 | {_judged(ratio, ratio >= 1.8)} |")
        start = results.start_up["ours-1"].wall_seconds, results.start_up["ours-2"].wall_seconds
        ratio = (results.wall("ours-1") - start[0]) / (results.wall("ours-2") - start[1])
        rows.append(f"| the same without start-up | >= 1.8 | {_judged(ratio, ratio >= 1.8)} |")
        # each process has its own code and vocabulary, so a worker needs as much as the largest one
        largest = max(usage.peak_process_bytes for usage in results.usages["ours-2"]) / 1e6
        rows.append(f"| MB of the largest process, 2 workers | < 400 | {_judged(largest, largest < 400)} |")
    return "\n".join(rows)


def _judged(value: float, is_met: bool) -> str:
    return f"{value:.2f} {'met' if is_met else '**missed**'}"


def projection_table(results: Results, suites: dict[str, Suite]) -> str:
    """Return the time for 435B tokens without start-up, if every core were as fast and storage kept up."""
    rows = [
        f"| {PROJECTED_TOKENS / 1e9:.0f}B tokens, nodes of {CORES_A_NODE} cores | core-hours |"
        + "".join(f" {nodes} node{'s' if nodes > 1 else ''} |" for nodes in NODES),
        "|---|---|" + "---|" * len(NODES),
    ]
    for competitor in COMPETITORS:
        if competitor.kind == "floor" or competitor.workers > 1 or not results.has(competitor.name):
            continue
        tokens = suites[competitor.suite].manifest["num_tokens"]
        seconds = PROJECTED_TOKENS * results.steady_cpu(competitor.name) / tokens
        times = "".join(f" {_duration(seconds / CORES_A_NODE / nodes)} |" for nodes in NODES)
        rows.append(f"| {competitor.title} | {_number(seconds / 3600, 1)} |{times}")
    manifest = next(iter(suites.values())).manifest
    read = PROJECTED_TOKENS * manifest["text_bytes"] / manifest["num_tokens"]
    written = PROJECTED_TOKENS * (2 if manifest["dtype"] == "uint16" else 4)
    rows += [
        "",
        f"Cores only: {read / 1e12:.2f} TB of text are read and {written / 1e12:.2f} TB of ids written, so storage has to keep up."
        f" The re-created classic tool also needs one task per {CLASSIC_WORKERS} cores, because its parent serves no more.",
    ]
    if results.has("ours-1"):
        node_seconds = PROJECTED_TOKENS * results.steady_cpu("ours-1") / manifest["num_tokens"] / CORES_A_NODE
        rows.append(f"Ours needs {(read + written) / node_seconds / 1e9:.1f} GB/s of storage for each node at that speed.")
    return "\n".join(rows)


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
