"""Multiple choice in the loop: the figures of tools/evaluate.py for the model that is being trained."""

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_ledom.data.sources import RUN_TOKENIZER
from megatron_ledom.errors import DataError
from megatron_ledom.evaluation.choices import asked_of, distinct_pairs
from megatron_ledom.evaluation.evaluate import evaluate_task
from megatron_ledom.evaluation.tasks import LoadedTask
from megatron_ledom.in_loop.chosen_tasks import TaskHashes, hashes_of, load_tasks
from megatron_ledom.in_loop.span_scoring import TrainingScorer
from megatron_ledom.inference.joint import JointTokenizer
from megatron_ledom.parallel.agreement import check_same
from megatron_ledom.training.state import TrainState

Figures = dict[str, float]


class TaskSet:
    """The tasks of a run, read once."""

    def __init__(self, scorer: TrainingScorer, tasks: Sequence[LoadedTask]) -> None:
        """Raises DataError for a text longer than a sample: that shall end the run before its first step."""
        self.scorer, self.tasks = scorer, tasks
        for task in tasks:
            asked = [asked_of(task.task, scorer.direction, item, task.demonstrations(item)) for item in task.items]
            for pair in distinct_pairs(asked):
                scorer.span(pair)

    def evaluate(self) -> dict[str, Figures]:
        """By task: `accuracy`, the main figure of the direction, and every other one by its name. The same on every rank."""
        results = [evaluate_task(self.scorer, task) for task in self.tasks]
        return {
            result.task: {
                "accuracy": result.metrics[result.main].value,
                **{name: metric.value for name, metric in result.metrics.items()},
                "num_items": float(len(task.items)),
            }
            for task, result in zip(self.tasks, results, strict=True)
        }


def load_task_set(state: TrainState, known: TaskHashes) -> TaskSet:
    """The tasks of the config, with the tokenizer that the run folder holds. Call on every rank, at the start.

    known: sha256 of the tasks' files as they were checked.
    """
    tokenizer = JointTokenizer.from_pretrained(Path(os.path.join(state.config.run_dir, RUN_TOKENIZER)))
    tasks = load_tasks(state.config)
    check_files(hashes_of(tasks), known, str(state.config.train.task_data))
    return TaskSet(TrainingScorer(state, tokenizer), tasks)


def check_files(found: TaskHashes, known: TaskHashes, folder: str) -> None:
    """Raise RuntimeError on every rank where ranks have read other files of tasks, DataError where all have read others than
    were checked: ranks that score other texts would wait for each other, or give figures of no set at all. Call on every rank.
    """
    advice = f"{folder} must hold the same files on all nodes, and nothing may change them: start again"
    check_same("the sha256 of the files of train.tasks", found, advice)
    if found != known:
        raise DataError(f"files of train.tasks in {folder} were replaced while the run started; start it again")
