"""Tables of bench_preprocess.py: costs, the floor, goals and a projection, all from the figures of one run."""

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
SMALLEST_SHARE = 0.05  # of a run's CPU seconds; below it, "without start-up" says nothing
CLASSIC_WORKERS = 30  # where the classic tool's one parent was measured to be busy all the time


@dataclass(slots=True)
class Figures:
    """What was measured, by name of the competitor."""

    usages: dict[str, list[Usage]] = field(default_factory=dict)
    start_up: dict[str, Usage] = field(default_factory=dict)
    """On one document."""
    steps: list[dict[str, dict[str, float]]] = field(default_factory=list)
    """The floor's times by round: cpu and wall, by step."""
    verdicts: dict[str, str] = field(default_factory=dict)
    """What the comparison of bytes said."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why one did not run."""

    def cpu(self, name: str) -> float:
        """Median CPU seconds, start-up included."""
        return statistics.median(usage.cpu_seconds for usage in self.usages[name])

    def wall(self, name: str) -> float:
        """Median wall seconds."""
        return statistics.median(usage.wall_seconds for usage in self.usages[name])

    def steady_cpu(self, name: str) -> float:
        """Median CPU seconds without those of a run on one document; NaN where noise hides them, on too small a corpus."""
        seconds = self.cpu(name) - self.start_up[name].cpu_seconds
        return seconds if seconds > SMALLEST_SHARE * self.cpu(name) else math.nan

    def cpu_ratio(self, name: str, base: str) -> float:
        """CPU seconds of `name` over those of `base`: the median over rounds of the ratio within a round."""
        pairs = zip(self.usages[name], self.usages[base], strict=True)
        return statistics.median(usage.cpu_seconds / other.cpu_seconds for usage, other in pairs)

    def wall_ratio(self, name: str, base: str) -> float:
        """As `cpu_ratio`, in wall seconds."""
        pairs = zip(self.usages[name], self.usages[base], strict=True)
        return statistics.median(usage.wall_seconds / other.wall_seconds for usage, other in pairs)

    def floor_sum(self) -> float:
        """Median over rounds of the CPU seconds of all steps but loading the vocabulary."""
        return statistics.median(sum(row["cpu"].get(step, 0.0) for step in STEPS) for row in self.steps)

    def has(self, *names: str) -> bool:
        """Whether all of these ran."""
        return all(self.usages.get(name) for name in names)


def machine() -> str:
    """Processor, cores, memory and system of this machine; no host name."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory_kb = int(Path("/proc/meminfo").read_text().split()[1])
    model = models[0].partition(":")[2].strip() if models else platform.machine()
    return (
        f"{len(os.sched_getaffinity(0))} cores of {model}, {memory_kb / 1e6:.0f} GB, Linux {platform.release()},"
        f" Python {platform.python_version()}"
    )


def cost_table(figures: Figures, suites: dict[str, Suite]) -> str:
    """One row a competitor; ratios are to ours with one worker and the same tokenizer."""
    rows = [
        "| tool | CPU s | of these start-up | wall s | CPU / ours | MB/s a core | M tokens/s a core | largest process | all |"
        " output |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for competitor in COMPETITORS:
        if competitor.name in figures.missing:
            rows.append(f"| {competitor.title} | {figures.missing[competitor.name]} |" + " |" * 8)
        elif figures.has(competitor.name) and competitor.kind != "floor":
            rows.append(_cost_row(figures, competitor, suites[competitor.suite]))
    rows.append("")
    rows.append("Per core: without start-up. Memory: RSS of the largest process, and the sampled peak of the sum over all.")
    return "\n".join(rows)


def _cost_row(figures: Figures, competitor: Competitor, suite: Suite) -> str:
    name, base = competitor.name, "ours-sp" if competitor.suite == "sentencepiece" else "ours-1"
    ratio = f"{figures.cpu_ratio(name, base):.2f}" if figures.has(base) else "-"
    steady = figures.steady_cpu(name)
    largest = max(usage.peak_process_bytes for usage in figures.usages[name])
    tree = max(usage.peak_tree_bytes for usage in figures.usages[name])
    return (
        f"| {competitor.title} | {figures.cpu(name):.2f} | {figures.start_up[name].cpu_seconds:.2f} | {figures.wall(name):.2f} |"
        f" {ratio} | {_number(suite.manifest['text_bytes'] / 1e6 / steady, 1)} |"
        f" {_number(suite.manifest['num_tokens'] / 1e6 / steady, 2)} |"
        f" {largest / 1e6:.0f} MB | {tree / 1e6:.0f} MB | {figures.verdicts.get(name, '')} |"
    )


def floor_table(figures: Figures, suite: Suite) -> str:
    """The steps alone, their sum, and ours beside it."""
    rows = ["| step alone, one thread | CPU s | wall s | MB/s of text |", "|---|---|---|---|"]
    megabytes = suite.manifest["text_bytes"] / 1e6
    for step in ("load", *STEPS):
        cpu = [row["cpu"][step] for row in figures.steps if step in row["cpu"]]
        if not cpu:
            continue
        wall = statistics.median(row["wall"][step] for row in figures.steps)
        rate = "once a run" if step == "load" else f"{megabytes / statistics.median(cpu):.0f}"
        rows.append(f"| {step} | {statistics.median(cpu):.3f} | {wall:.3f} | {rate} |")
    total = figures.floor_sum()
    rows.append(f"| **sum without load** | **{total:.3f}** | | **{megabytes / total:.0f}** |")
    if figures.has("ours-1"):
        rows.append(f"| ours, 1 worker, without start-up | {figures.steady_cpu('ours-1'):.3f} | | |")
        rows.append(f"| ours, 1 worker | {figures.cpu('ours-1'):.3f} | {figures.wall('ours-1'):.3f} | |")
    return "\n".join(rows)


def goal_table(figures: Figures) -> str:
    """What the project promised, and what this run says. The goals are for 100 MB."""
    rows = ["| goal, on 100 MB of text | wanted | measured |", "|---|---|---|"]
    for name, base, wanted in (
        ("classic", "ours-1", 20),
        ("gigatoken", "ours-1", 2.5),
        ("datatrove", "ours-1", 18),
        ("sentencepiece", "ours-sp", 4),
    ):
        if figures.has(name, base):
            ratio = figures.cpu_ratio(name, base)
            rows.append(f"| CPU s of {name} / ours | >= {wanted} | {_judged(ratio, ratio >= wanted)} |")
    if figures.steps and figures.has("ours-1"):
        for label, cpu in (("", figures.cpu("ours-1")), (" without start-up", figures.steady_cpu("ours-1"))):
            ratio = cpu / figures.floor_sum()
            rows.append(f"| CPU s of ours{label} / sum of the floor | <= 1.2 | {_judged(ratio, ratio <= 1.2)} |")
    if figures.has("ours-1", "ours-2"):
        ratio = figures.wall_ratio("ours-1", "ours-2")
        rows.append(f"| wall of 1 worker / 2 workers | >= 1.8 | {_judged(ratio, ratio >= 1.8)} |")
        start = figures.start_up["ours-1"].wall_seconds, figures.start_up["ours-2"].wall_seconds
        ratio = (figures.wall("ours-1") - start[0]) / (figures.wall("ours-2") - start[1])
        rows.append(f"| the same without start-up | >= 1.8 | {_judged(ratio, ratio >= 1.8)} |")
        # a process holds its share of code and vocabulary, so the largest one is the fair figure for "a worker"
        largest = max(usage.peak_process_bytes for usage in figures.usages["ours-2"]) / 1e6
        rows.append(f"| MB of the largest process, 2 workers | < 400 | {_judged(largest, largest < 400)} |")
    return "\n".join(rows)


def _judged(value: float, is_met: bool) -> str:
    return f"{value:.2f} {'met' if is_met else '**missed**'}"


def projection_table(figures: Figures, suites: dict[str, Suite]) -> str:
    """Time for 435B tokens if every core were one of these and storage kept up; start-up is left out."""
    rows = [
        f"| {PROJECTED_TOKENS / 1e9:.0f}B tokens, nodes of {CORES_A_NODE} cores | core-hours |"
        + "".join(f" {nodes} node{'s' if nodes > 1 else ''} |" for nodes in NODES),
        "|---|---|" + "---|" * len(NODES),
    ]
    for competitor in COMPETITORS:
        if competitor.kind == "floor" or competitor.workers > 1 or not figures.has(competitor.name):
            continue
        tokens = suites[competitor.suite].manifest["num_tokens"]
        seconds = PROJECTED_TOKENS * figures.steady_cpu(competitor.name) / tokens
        times = "".join(f" {_duration(seconds / CORES_A_NODE / nodes)} |" for nodes in NODES)
        rows.append(f"| {competitor.title} | {_number(seconds / 3600, 1)} |{times}")
    manifest = next(iter(suites.values())).manifest
    read = PROJECTED_TOKENS * manifest["text_bytes"] / manifest["num_tokens"]
    written = PROJECTED_TOKENS * (2 if manifest["dtype"] == "uint16" else 4)
    rows += [
        "",
        f"Cores only: {read / 1e12:.2f} TB of text are read and {written / 1e12:.2f} TB of ids written, so storage has to keep up;"
        f" the re-created classic tool would also need a task for every {CLASSIC_WORKERS} cores, its parent does no more.",
    ]
    if figures.has("ours-1"):
        node_seconds = PROJECTED_TOKENS * figures.steady_cpu("ours-1") / manifest["num_tokens"] / CORES_A_NODE
        rows.append(f"Ours asks {(read + written) / node_seconds / 1e9:.1f} GB/s of storage for each node at that speed.")
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
