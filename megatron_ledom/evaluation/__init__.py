"""Judging models of both directions on the same tasks. Needs torch and transformers only.

What a caller with a model of its own needs, such as a trainer:

    from megatron_ledom.evaluation.evaluate import evaluate_task
    from megatron_ledom.evaluation.tasks.loading import load_task

    task = load_task("svamp", "data", limit=100, num_fewshot=4, seed=0)    # -> LoadedTask; reads and checks the files, no model
    result = evaluate_task(model, task)                                      # -> TaskResult
    result.metrics[result.main].value, .stderr, .low, .high                  # fractions of the items
    result.metric_values()                                                   # -> {"svamp/accuracy": 0.31, ...} for a log

`model` is anything with the three members of `task_model.TaskModel`:

    direction: Direction
    score(pairs: Sequence[tuple[str, str]]) -> list[SpanScore]               # of (preceding, following): the part it comes to last
    write(given: Sequence[str], *, max_new_tokens: int, stop_strings: Sequence[str]) -> list[str]    # greedily

`task_model.LanguageTaskModel(ReverseLM.from_pretrained(folder), batch_size=16)` is one. Every rank that shares a model calls
`evaluate_task` with the same arguments: what is asked of the model, and in which order, follows from the task alone.
"""
