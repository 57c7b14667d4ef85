"""Tasks for which a model writes text: an answer that is compared, a program that is run, or a question that is solved.

The task's template for the direction renders the prompt. In text order the answer is last in a forward model's text and first in
a reverse model's (`Template.read`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.evaluation.code.execution import check_allowed, run_program
from megatron_ledom.evaluation.code.sandbox import Sandbox
from megatron_ledom.evaluation.grading.answers import Comparison, comparison_by
from megatron_ledom.evaluation.synthetic.word_problems import solve
from megatron_ledom.evaluation.task_model import TaskModel
from megatron_ledom.evaluation.tasks.prompts import Prompt
from megatron_ledom.evaluation.tasks.task import Item, LoadedTask, TaskKind


def prompt_of(task: LoadedTask, direction: Direction, item: Item) -> Prompt:
    """Return the prompt of an item for a model of this direction."""
    return task.task.template_for(direction).render(direction, item.values, task.exemplars_for(item))


def write_answers(
    model: TaskModel, task: LoadedTask, items: Sequence[Item], *, code_sandbox: Sandbox | None = None
) -> list[dict[str, Any]]:
    """Return the record of each item: the written text, the answer in it, the accepted answers, and `is_right`.

    code_sandbox: the sandbox of programs. Raises UsageError for a task that runs programs without one.
    """
    direction = model.direction
    judge = _judge_of(task, code_sandbox)
    given = [prompt_of(task, direction, item).given for item in items]
    texts = model.write(given, max_new_tokens=task.max_new_tokens, stop_strings=_stop_strings(task, direction))
    return [
        {**item.kept, "written": written, **judge(task, direction, item, written)}
        for item, written in zip(items, texts, strict=True)
    ]


def _judge_of(task: LoadedTask, code_sandbox: Sandbox | None) -> Callable[[LoadedTask, Direction, Item, str], dict[str, Any]]:
    """Return the function that judges a written text of the task."""
    if task.task.kind is TaskKind.CODE:
        sandbox = check_allowed(task.task.name, code_sandbox)
        return partial(_judge_code, sandbox=sandbox)
    if task.task.kind is TaskKind.QUESTION:
        return _judge_question
    return partial(_judge_answer, comparison=comparison_by(task.task.answers))


def _stop_strings(task: LoadedTask, direction: Direction) -> list[str]:
    """Return the strings that end an answer: the separator of blocks, and the task's own for running text."""
    template = task.task.template_for(direction)
    return [template.block_separator, *(() if template.is_read_back else task.task.stop_strings)]


def _judge_answer(
    task: LoadedTask, direction: Direction, item: Item, written: str, *, comparison: Comparison
) -> dict[str, Any]:
    template = task.task.template_for(direction)
    answer = template.read(direction, written)[template.fields[-1].name]
    accepted = item.gold if isinstance(item.gold, tuple) else ()
    is_right = answer is not None and comparison.is_right(accepted, answer)
    return {"answer": answer, "gold": list(accepted), "is_right": is_right}


def _judge_question(task: LoadedTask, direction: Direction, item: Item, written: str) -> dict[str, Any]:
    """Judge a written question, the record's `answer`: it is right if its solution equals the item's, step by step."""
    assert isinstance(item.gold, tuple)
    template = task.task.template_for(direction)
    found = template.read(direction, written)[template.fields[-1].name]
    question = None if found is None else " ".join(found.split())
    solved = None if question is None else solve(question)
    return {
        "answer": question,
        "gold": list(item.gold),
        "solved": None if solved is None else solved.solution,
        "has_answer": solved is not None and str(solved.answer) == item.kept["gold_answer"],
        "is_right": solved is not None and solved.solution in item.gold,
        "is_copy": question in task.trained_questions,
    }


def _judge_code(task: LoadedTask, direction: Direction, item: Item, written: str, *, sandbox: Sandbox) -> dict[str, Any]:
    """Run the program that a model wrote.

    A forward model continues the function's head, a reverse model writes the whole function before it.
    """
    template = task.task.template_for(direction)
    if template.is_read_back:
        code = template.read(direction, written)[template.fields[-1].name]
    else:
        given = "".join(field.text(item.values[field.name]) for field in template.fields[:-1])
        code = given.rstrip() + written
    if code is None:
        return {"answer": None, "reason": "no program was found in what was written", "is_right": False}
    assert item.tests is not None
    outcome = run_program(code, item.tests, sandbox=sandbox)
    return {"answer": code, "reason": outcome.reason, "is_right": outcome.passed}
