"""Evaluate models of both directions on the same tasks. Needs torch and transformers only.

A caller with its own model, such as a trainer, needs:

    from megatron_ledom.evaluation import LanguageTaskModel, evaluate_task, load_task

    task = load_task("svamp", "data", limit=100, num_fewshot=4, seed=0)    # -> LoadedTask; reads and checks the files, no model
    result = evaluate_task(model, task)                                      # -> TaskResult
    result.metrics[result.main].value, .stderr, .low, .high                  # fractions of the items
    result.metric_values()                                                   # -> {"svamp/accuracy": 0.31, ...} for a log

`model` is anything with the three members of `task_model.TaskModel`:

    direction: Direction
    score(pairs: Sequence[tuple[str, str]]) -> list[SpanScore]               # of (preceding, following): the part that it reads last
    write(given: Sequence[str], *, max_new_tokens: int, stop_strings: Sequence[str]) -> list[str]    # greedily

`LanguageTaskModel(ReverseLM.from_pretrained(folder), batch_size=16)` is such a model. All ranks that share a model call
`evaluate_task` with the same arguments. The requests to the model and their order depend on the task alone.
"""

from typing import TYPE_CHECKING

from megatron_ledom.lazy import lazy_exports

if TYPE_CHECKING:
    from megatron_ledom.evaluation.task_evaluation import evaluate_task
    from megatron_ledom.evaluation.task_model import LanguageTaskModel
    from megatron_ledom.evaluation.tasks.loading import load_task

__all__ = ["LanguageTaskModel", "evaluate_task", "load_task"]

__getattr__ = lazy_exports(
    __name__,
    {
        "megatron_ledom.evaluation.task_model": ["LanguageTaskModel"],
        "megatron_ledom.evaluation.task_evaluation": ["evaluate_task"],
        "megatron_ledom.evaluation.tasks.loading": ["load_task"],
    },
)
