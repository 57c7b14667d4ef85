"""Join the results of tasks that were evaluated one by one: `FOLDER/TASK/summary.json` of each task into `FOLDER/summary.json`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ledom.errors import DataError, MismatchError, UsageError, VerificationError
from megatron_ledom.evaluation.results import Metric, TaskResult, as_markdown, write_summary
from megatron_ledom.evaluation.tasks.loading import all_tasks
from megatron_ledom.storage.jobs import differences
from megatron_ledom.storage.locks import output_folder_lock

SUMMARY, TASKS = "summary.json", "tasks"
OF_A_TASK = ("batch_size", "surroundings")
"""Settings in which tasks of one model may differ; such a setting is then written with each task."""


@dataclass(frozen=True, slots=True)
class Joined:
    """Results of the finished tasks, their common settings, and the names of the tasks without a result."""

    results: Sequence[TaskResult]
    about: Mapping[str, Any]
    missing: Sequence[str]


def summarize_evaluation(folder: str) -> Joined:
    """Write `summary.json` and `summary.md` of all finished tasks into the folder and print the metrics.

    Raises VerificationError, after writing, if a task has no result yet, and MismatchError if tasks are of different models.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"{folder} is not a folder; give the OUTPUT of evaluate_tasks.sbatch, with one folder per task")
    if items := sorted(path.name for path in Path(folder).glob("*.items.jsonl")):
        raise UsageError(
            f"{folder} has {items[0]}, so one command evaluated its tasks together and {SUMMARY} has their results; give a folder"
            " with one folder per task"
        )
    with output_folder_lock(folder, "the folder"):
        joined = collect(Path(folder))
        if joined.results:
            write_summary(Path(folder), joined.results, joined.about)
    print(as_markdown(joined.results, joined.about) if joined.results else "no task is finished")
    if joined.missing:
        names = ",".join(joined.missing)
        raise VerificationError(
            f"{len(joined.missing)} of {len(joined.missing) + len(joined.results)} tasks have no result: {names}; unless they are"
            f" still running, evaluate them again with TASKS={names} and the same options: they resume"
        )
    return joined


def collect(folder: Path) -> Joined:
    """Return the results in `FOLDER/TASK`, for each subfolder with the name of a task, in the order of the table of tasks."""
    summaries: dict[str, dict[str, Any]] = {}
    missing = []
    for task in all_tasks():
        if (folder / task / SUMMARY).is_file():
            summaries[task] = _read(folder / task / SUMMARY, task)
        elif (folder / task).is_dir():
            missing.append(task)
    if not summaries and not missing:
        raise UsageError(
            f"{folder} has no folder of a task; give the OUTPUT of evaluate_tasks.sbatch, with one folder per task"
        )
    about = _common(folder, summaries)
    return Joined([_result(task, summary, about) for task, summary in summaries.items()], about, missing)


def _read(path: Path, task: str) -> dict[str, Any]:
    remedy = "evaluate the task again: the same command writes it from the finished items"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        [named] = summary[TASKS]
        metrics = {name: Metric(**metric) for name, metric in summary[TASKS][named]["metrics"].items()}
        if named != task or summary[TASKS][named]["main"] not in metrics:
            raise ValueError(f"it is of {named}")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not the summary of the task {task} alone ({error}); {remedy}") from error
    return dict(summary)


def _common(folder: Path, summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings that all tasks have in common. Raises MismatchError if the model or its direction differ."""
    first: tuple[str, dict[str, Any]] | None = None
    for task, summary in summaries.items():
        about = {name: value for name, value in summary.items() if name != TASKS}
        if first is None:
            first = task, about
        before, now = ({name: value for name, value in one.items() if name not in OF_A_TASK} for one in (first[1], about))
        if changed := differences(before, now):
            raise MismatchError(
                f"{folder / task} is of another model than {folder / first[0]} ({'; '.join(changed)}); evaluate both with one"
                " model, or give each model an OUTPUT of its own"
            )
    found = first[1] if first else {}
    return {name: value for name, value in found.items() if all(one.get(name) == value for one in summaries.values())}


def _result(task: str, summary: Mapping[str, Any], common: Mapping[str, Any]) -> TaskResult:
    own = {name: value for name, value in summary.items() if name != TASKS and name not in common}
    stored = dict(summary[TASKS][task])
    metrics = {name: Metric(**metric) for name, metric in stored.pop("metrics").items()}
    return TaskResult(task=task, main=stored.pop("main"), metrics=metrics, about={**own, **stored})
