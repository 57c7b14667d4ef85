"""Read and check the files of `train.tasks` at the start of a run. Does not import torch."""

from typing import TYPE_CHECKING

from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import ConfigError
from megatron_ledom.training.held_out import TaskHashes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_ledom.evaluation.tasks.task import LoadedTask


def load_tasks(config: RunConfig) -> "list[LoadedTask]":
    """Return the tasks of `train.tasks` with their items and demonstrations.

    Raises ConfigError for a task in which the model writes text, UsageError or DataError for files that cannot be read.
    """
    from megatron_ledom.evaluation.tasks.loading import load_task, task_named
    from megatron_ledom.evaluation.tasks.task import TaskKind

    train = config.train
    for name in train.tasks:
        if task_named(name).kind is not TaskKind.CHOICE:
            raise ConfigError(
                f"train.tasks names {name}, in which the model writes text: each token would cost a pass of the whole pipeline."
                " Remove it, and evaluate the exported checkpoint with ledom evaluate"
            )
    if train.task_data is None:
        raise ConfigError(
            "train.task_data=null, but train.tasks needs the folder of the task files (ledom evaluate --list names them)"
        )
    return [
        load_task(name, train.task_data, limit=train.task_limit, num_fewshot=train.task_num_fewshot, seed=train.seed)
        for name in dict.fromkeys(train.tasks)
    ]


def check_tasks(config: RunConfig, has_tokenizer: bool) -> TaskHashes:
    """Refuse tasks that cannot be evaluated. Returns the sha256 of each task's files."""
    if not config.train.tasks:
        return {}
    if not has_tokenizer:
        raise ConfigError("train.tasks needs the tokenizer, which was not found; set data.tokenizer")
    from megatron_ledom.evaluation.intervals import check_statistics

    check_statistics()
    return hashes_of(load_tasks(config))


def hashes_of(tasks: "Sequence[LoadedTask]") -> TaskHashes:
    """Return the sha256 of the files that tasks were read from, by task and file."""
    return {task.task.name: dict(task.files) for task in tasks}
