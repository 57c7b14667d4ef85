"""One task over one model: items in windows, the records of each window kept at once, figures at the end."""

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
"""Items that are asked together. Rounding depends on what shares a batch, so windows are cut by the items' numbers alone."""


def evaluate_task(
    model: TaskModel,
    task: LoadedTask,
    *,
    code_sandbox: Sandbox | None = None,
    kept: Sequence[Record] = (),
    keep: Callable[[Sequence[dict[str, Any]]], None] | None = None,
) -> TaskResult:
    """Ask the model every item, and return the figures.

    kept: what an earlier call found of the first items, whole windows of them; keep: is given what is found of each window. Raises
    UsageError for a task that runs programs without `code_sandbox`, and whatever the model raises for a text it cannot take.
    """
    if task.task.kind is TaskKind.CODE:
        check_allowed(task.task.name, code_sandbox)
    records: list[Record] = list(kept)
    for begin in range(len(records), len(task.items), WINDOW_ITEMS):
        found = numbered(begin, _ask(model, task, begin, code_sandbox))
        if keep is not None:
            keep(found)
        records += found
    return summarize(task, model.direction, records)


def _ask(model: TaskModel, task: LoadedTask, begin: int, code_sandbox: Sandbox | None) -> list[dict[str, Any]]:
    """Return what is found of each item of the window from `begin` on; an error of the model's scores names the item."""

    def ask(items: Sequence[Item]) -> list[dict[str, Any]]:
        """Return what is found of some items."""
        if task.task.kind is TaskKind.CHOICE:
            return score_choices(model, task, items)
        return write_answers(model, task, items, code_sandbox=code_sandbox)

    items = task.items[begin : begin + WINDOW_ITEMS]
    try:
        return ask(items)
    except NotFiniteError as whole:
        for number, item in enumerate(items, begin):
            try:
                ask([item])
            except NotFiniteError as error:
                raise NotFiniteError(f"item {number}: {error}") from error
        raise NotFiniteError(f"items {begin} to {begin + len(items) - 1}: {whole}") from whole
