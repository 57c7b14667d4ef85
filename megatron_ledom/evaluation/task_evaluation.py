"""Evaluate one model on one task: the items in windows, each window's records saved at once, the metrics at the end."""

from collections.abc import Callable, Sequence
from typing import Any

from megatron_ledom.errors import NotFiniteError
from megatron_ledom.evaluation.code.execution import check_allowed
from megatron_ledom.evaluation.code.sandbox import Sandbox
from megatron_ledom.evaluation.item_file import numbered
from megatron_ledom.evaluation.multiple_choice import score_choices
from megatron_ledom.evaluation.results import Record, TaskResult, summarize
from megatron_ledom.evaluation.task_model import TaskModel
from megatron_ledom.evaluation.tasks.task import Item, LoadedTask, TaskKind
from megatron_ledom.evaluation.written_answers import write_answers

WINDOW_ITEMS = 64
"""Items that are evaluated together.

Rounding depends on the other texts of a batch, so windows depend on the items' numbers alone.
"""


def evaluate_task(
    model: TaskModel,
    task: LoadedTask,
    *,
    code_sandbox: Sandbox | None = None,
    kept: Sequence[Record] = (),
    keep: Callable[[Sequence[dict[str, Any]]], None] | None = None,
) -> TaskResult:
    """Evaluate the model on every item, and return the metrics.

    kept: records of the first items from an earlier call, in whole windows. keep: called with the records of each
    window. Raises UsageError for a task that runs programs without `code_sandbox`; errors of the model, such as for a
    text that is too long, pass through.
    """
    if task.task.kind is TaskKind.CODE:
        check_allowed(task.task.name, code_sandbox)
    records: list[Record] = list(kept)
    for begin in range(len(records), len(task.items), WINDOW_ITEMS):
        found = numbered(begin, _records_of(model, task, begin, code_sandbox))
        if keep is not None:
            keep(found)
        records += found
    return summarize(task, model.direction, records)


def _records_of(model: TaskModel, task: LoadedTask, begin: int, code_sandbox: Sandbox | None) -> list[dict[str, Any]]:
    """Return the records of the window that starts at item `begin`. An error in the model's scores names the item."""

    def evaluate(items: Sequence[Item]) -> list[dict[str, Any]]:
        """Return the records of some items."""
        if task.task.kind is TaskKind.CHOICE:
            return score_choices(model, task, items)
        return write_answers(model, task, items, code_sandbox=code_sandbox)

    items = task.items[begin : begin + WINDOW_ITEMS]
    try:
        return evaluate(items)
    except NotFiniteError as whole:
        for number, item in enumerate(items, begin):
            try:
                evaluate([item])
            except NotFiniteError as error:
                raise NotFiniteError(f"item {number}: {error}") from error
        raise NotFiniteError(f"items {begin} to {begin + len(items) - 1}: {whole}") from whole
