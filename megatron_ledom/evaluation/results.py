"""Compute metrics with intervals from the records of the items, and write them to files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ledom.direction import Direction
from megatron_ledom.evaluation.intervals import LEVEL, bootstrap_interval
from megatron_ledom.evaluation.multiple_choice import MAIN_WAY, NORMALIZATIONS, chosen
from megatron_ledom.evaluation.tasks.task import LoadedTask, TaskKind
from megatron_ledom.storage.files import write_file, write_json
from megatron_ledom.tables import markdown_table

Record = Mapping[str, Any]
"""The result of one item."""
NUM_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Metric:
    """A fraction of the items. stderr: standard error of the mean, None for a single item.

    low, high: 95 % interval, by Wilson's formula, or by a bootstrap over clusters for items in clusters.
    """

    value: float
    stderr: float | None
    low: float
    high: float
    num_items: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """The metrics of one task. main: the name of the one to quote; about: the settings on which they depend."""

    task: str
    main: str
    metrics: Mapping[str, Metric]
    about: Mapping[str, Any] = field(default_factory=dict)

    def metric_values(self) -> dict[str, float]:
        """Return `task/metric` -> value, for a log of metrics."""
        return {f"{self.task}/{name}": metric.value for name, metric in self.metrics.items()}


def share(are_right: Sequence[bool], clusters: Sequence[str] | None = None) -> Metric:
    """Return the fraction of True values, with the standard error and the Wilson interval of scipy (Wilson 1927, eq. 4).

    clusters: the name of each item's subject, if several items have the same subject and are therefore not independent.
    """
    from scipy.stats import sem

    values = [float(right) for right in are_right]
    value = math.fsum(values) / len(values)
    if clusters is not None:
        return Metric(value, *_spread_of_clusters(values, clusters), len(values))
    stderr = float(sem(values)) if len(values) > 1 else None
    return Metric(value, stderr, *_wilson(sum(map(bool, are_right)), len(values)), len(values))


def _wilson(num_right: int, num: int) -> tuple[float, float]:
    from scipy.stats import binomtest

    interval = binomtest(num_right, num).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def _spread_of_clusters(values: Sequence[float], clusters: Sequence[str]) -> tuple[float | None, float, float]:
    """Return the standard error of a ratio of sums over clusters, and low and high of its bootstrap interval.

    If all clusters have the same mean, the bootstrap's interval has width 0. Wilson's is used then, with one item per
    cluster.
    """
    places = np.unique(np.asarray(clusters), return_inverse=True)[1]
    sums, sizes = np.bincount(places, values).astype(np.float64), np.bincount(places).astype(np.float64)
    num, mean = len(sums), sums.sum() / sizes.sum()
    stderr = None if num == 1 else math.sqrt(num / (num - 1) * ((sums - mean * sizes) ** 2).sum()) / float(sizes.sum())
    if np.ptp(sums / sizes) == 0:
        return stderr, *_wilson(round(float(mean) * num), num)
    low, high = bootstrap_interval(sums, sizes, num_resamples=NUM_RESAMPLES, seed=0)
    return stderr, low, high


def summarize(task: LoadedTask, direction: Direction, records: Sequence[Record]) -> TaskResult:
    """Return the metrics of a task from the records of all items, and the main metric for each group of items."""
    is_choice = task.task.kind is TaskKind.CHOICE
    main = f"{task.task.main_way or MAIN_WAY[direction]}/{task.task.normalization}" if is_choice else "accuracy"
    find = _choice_metrics if is_choice else _written_metrics
    metrics = find(records)
    for group in sorted({record["group"] for record in records if "group" in record}):
        metrics[f"{main}/{group}"] = find([record for record in records if record["group"] == group])[main]
    clusters = _clusters(records)
    about = {
        **({} if clusters is None else {"num_clusters": len(set(clusters))}),
        "num_fewshot": task.num_fewshot,
        "seed": task.seed,
        "files": dict(task.files),
        "content_sha256": task.content_sha256,
    }
    return TaskResult(task=task.task.name, main=main, metrics=metrics, about=about)


def _clusters(records: Sequence[Record]) -> list[str] | None:
    """Return the cluster of each item, or None if items have no clusters."""
    return [record["cluster"] for record in records] if all("cluster" in record for record in records) else None


def _written_metrics(records: Sequence[Record]) -> dict[str, Metric]:
    """Return the fractions of right answers and of items with an answer.

    For written questions, also the fractions that can be solved, that have the given answer by any steps, and that copy
    a trained question; such a copy is never right.
    """
    clusters = _clusters(records)
    found = {
        "accuracy": share([record["is_right"] for record in records], clusters),
        "answered": share([record["answer"] is not None for record in records], clusters),
    }
    if "is_copy" in records[0]:
        found["solvable"] = share([record["solved"] is not None for record in records])
        found["has_answer"] = share([record["has_answer"] for record in records])
        found["copied"] = share([record["is_copy"] for record in records])
    return found


def _choice_metrics(records: Sequence[Record]) -> dict[str, Metric]:
    """Return the accuracy of each way to score a choice, with each normalization."""
    clusters = _clusters(records)
    return {
        f"{way}/{normalization}": share(
            [chosen(record["scores"][way], normalization) == record["gold"] for record in records], clusters
        )
        for way in records[0]["scores"]
        for normalization in NORMALIZATIONS
    }


def write_summary(folder: Path, results: Sequence[TaskResult], about: Mapping[str, Any]) -> None:
    """Write `summary.json` and `summary.md`. about: the model, its direction and the other settings of all tasks."""
    tasks = {
        result.task: {
            "main": result.main,
            "metrics": {name: asdict(metric) for name, metric in result.metrics.items()},
            **result.about,
        }
        for result in results
    }
    write_json(folder / "summary.json", {**about, "tasks": tasks})
    write_file(folder / "summary.md", as_markdown(results, about))


def as_markdown(results: Sequence[TaskResult], about: Mapping[str, Any]) -> str:
    """Return Markdown with a table of the main metrics and one of all others."""
    settings = "\n".join(f"- {name}: {value}" for name, value in about.items())
    parts = ["# Evaluation", settings, _table([(result.task, result.main, result.metrics[result.main]) for result in results])]
    others = [
        (result.task, name, metric) for result in results for name, metric in result.metrics.items() if name != result.main
    ]
    parts += ["## Other metrics", _table(others)] if others else []
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[tuple[str, str, Metric]]) -> str:
    cells = [["task", "metric", "%", "standard error", "95 % interval", "items"]]
    for task, name, metric in rows:
        stderr = "" if metric.stderr is None else f"{100 * metric.stderr:.2f}"
        interval = f"{100 * metric.low:.1f} to {100 * metric.high:.1f}"
        cells.append([task, name, f"{100 * metric.value:.1f}", stderr, interval, str(metric.num_items)])
    return markdown_table(cells, "llrrrr")
