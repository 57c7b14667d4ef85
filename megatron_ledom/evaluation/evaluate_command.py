"""The command `evaluate`: load the tasks and the model, evaluate, and write the results."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_ledom.direction import Direction
from megatron_ledom.errors import LedomError, NotFiniteError, UsageError, visible
from megatron_ledom.evaluation.code.execution import check_allowed
from megatron_ledom.evaluation.code.sandbox import Sandbox, check_sandbox
from megatron_ledom.evaluation.grading.answers import comparison_by
from megatron_ledom.evaluation.intervals import check_statistics
from megatron_ledom.evaluation.item_file import ItemFile
from megatron_ledom.evaluation.multiple_choice import score_requests
from megatron_ledom.evaluation.record_checks import item_check
from megatron_ledom.evaluation.results import TaskResult, summarize, write_summary
from megatron_ledom.evaluation.task_evaluation import WINDOW_ITEMS, evaluate_task
from megatron_ledom.evaluation.task_model import LanguageTaskModel, direction_of, load_language_model
from megatron_ledom.evaluation.tasks.loading import all_tasks, find_file, load_task, task_named
from megatron_ledom.evaluation.tasks.prompts import Prompt
from megatron_ledom.evaluation.tasks.task import Item, LoadedTask, TaskKind
from megatron_ledom.evaluation.written_answers import prompt_of
from megatron_ledom.inference.joint_tokenizer import JointTokenizer
from megatron_ledom.inference.model_folder import (
    COMMAND_OPTIONS,
    check_unchanged,
    folder_facts,
    leading_ids_of,
    load_tokenizer,
    read_model_config,
    recorded_reading,
    surroundings,
)
from megatron_ledom.inference.scoring import check_batch_size
from megatron_ledom.storage.locks import output_folder_lock

Options = Mapping[str, Any]


def evaluate_command(options: Options) -> None:
    """List the tasks, show prompts, or evaluate the model.

    Check everything that can be checked before loading weights.
    """
    if options["list"]:
        list_tasks(options["data"])
        return
    for name in ("model", "tasks", "data"):
        if options[name] is None:
            raise UsageError(f"--{name} is missing; see --help, or --list for the tasks")
    tasks = _load_tasks(options)
    folder = Path(options["model"])
    direction = direction_of(folder, options["direction"], COMMAND_OPTIONS)
    reading = recorded_reading(folder, read_model_config(folder), direction)
    if options["show"]:
        tokenizer, _ = load_tokenizer(folder, direction, options["eod_id"], COMMAND_OPTIONS)
        for task in tasks:
            show(task, direction, tokenizer, options["show"], leading_ids_of(reading, direction, tokenizer))
        return
    _evaluate(options, tasks, folder, direction)


def list_tasks(data: str | None) -> None:
    """Print each task with its file, the source and the hash of its items.

    With a folder, compare its files with the hashes.
    """
    for task in all_tasks().values():
        print(f"{task.name} ({task.kind}): {task.about}\n  file      {task.file}, --num-fewshot: {task.exemplars_file}")
        print(
            f"  from      {task.download}\n  few-shot  {task.exemplars_download}\n  content   {task.content_sha256 or 'unknown'}"
        )
        if data is None:
            continue
        try:
            path = find_file(task, Path(data), task.file)
        except UsageError:
            print(f"  found     nothing in {data}")
            continue
        loaded = load_task(task.name, data)
        print(f"  found     {path.name}, {len(loaded.items):,} items, {_compared(loaded)}")


def show(task: LoadedTask, direction: Direction, tokenizer: JointTokenizer, num: int, leading_ids: Sequence[int] = ()) -> None:
    """Print the prompts of the first `num` items.

    First in text order, with the written or scored part marked, then as tokens in model order, after the ids that begin every sequence.
    """
    for number, item in enumerate(task.items[:num]):
        for title, prompt in _prompts(task, direction, item):
            print(f"=== {task.task.name}, item {number}, {title}")
            print(f"--- in text order, the {'scored' if task.task.kind is TaskKind.CHOICE else 'written'} part in ⟦⟧")
            print(visible(prompt.in_text_order()))
            print("--- in model order, token by token")
            print(visible(prompt.in_model_order(tokenizer, leading_ids)))


def _prompts(task: LoadedTask, direction: Direction, item: Item) -> list[tuple[str, Prompt]]:
    if task.task.kind is not TaskKind.CHOICE:
        return [("with the known answer", prompt_of(task, direction, item))]
    assert isinstance(item.gold, int)
    shown = []
    for way, requests in score_requests(task.task, direction, item, task.exemplars_for(item)).items():
        one = requests[item.gold]
        for title, pair in ((way, one.pair), (f"{way}, the prior that is subtracted", one.prior)):
            if pair is not None:
                given, target = (pair[1], pair[0]) if direction is Direction.REVERSE else pair
                shown.append((f"the right choice, {title}", Prompt(direction, given, target)))
    return shown


def _load_tasks(options: Options) -> list[LoadedTask]:
    names = [name for name in options["tasks"].split(",") if name]
    if not names:
        raise UsageError("--tasks is empty; name tasks of --list")
    for name in names:
        if task_named(name).kind is TaskKind.CODE and not options["show"]:
            check_allowed(name, _code_sandbox(options))
            if not options.get("check"):
                check_sandbox(Sandbox(options["sandbox"]))
    chosen = {name: options[name] for name in ("limit", "num_fewshot", "seed", "max_new_tokens")}
    tasks = [load_task(name, options["data"], **chosen) for name in dict.fromkeys(names)]
    for task in tasks:
        if task.task.content_sha256 not in (None, task.content_sha256):
            print(f"{task.task.name}: the items of {next(iter(task.files))} are {_compared(task)}", file=sys.stderr)
    return tasks


def _compared(task: LoadedTask) -> str:
    """Return the result of comparing the items with the hash in the table of tasks."""
    known = task.task.content_sha256
    if known is None:
        return f"not compared: content {task.content_sha256}"
    return (
        "as expected" if known == task.content_sha256 else f"different from the published ones: content {task.content_sha256}"
    )


def _evaluate(options: Options, tasks: list[LoadedTask], folder: Path, direction: Direction) -> None:
    check_batch_size(options["batch_size"])
    check_statistics()
    for task in tasks:
        if task.task.kind is TaskKind.ANSWER:
            comparison = comparison_by(task.task.answers)  # report a missing requirement before loading weights
            comparison.check([item.gold if isinstance(item.gold, tuple) else () for item in task.items])
    if options["output"] is None:
        raise UsageError("--output is missing; give a folder for the summary and the record of each item")
    if options.get("check"):
        load_tokenizer(folder, direction, options["eod_id"], COMMAND_OPTIONS)
        print(f"{len(tasks)} tasks with {sum(len(task.items) for task in tasks):,} items can be evaluated")
        return
    about = _made_by(options, folder, direction)
    with output_folder_lock(options["output"]):
        _evaluate_into(Path(options["output"]), options, tasks, folder, direction, about)


def _evaluate_into(
    output: Path, options: Options, tasks: list[LoadedTask], folder: Path, direction: Direction, about: dict[str, Any]
) -> None:
    """Evaluate the model on each task and write the summary, resuming the records in the folder.

    The caller holds its lock.
    """
    files = {
        task.task.name: ItemFile(output, f"{task.task.name}.items", {**about, **_task_settings(task, options)})
        for task in tasks
    }
    kept = {
        task.task.name: files[task.task.name].resume(WINDOW_ITEMS, len(task.items), item_check(task, direction))
        for task in tasks
    }
    model: LanguageTaskModel | None = None
    results = []
    for task in tasks:
        name = task.task.name
        if len(kept[name]) == len(task.items):
            results.append(summarize(task, direction, kept[name]))
        else:
            model = model or _load(options, folder, direction, about)
            results.append(_evaluated(model, task, files[name], kept[name], options))
        main = results[-1].metrics[results[-1].main]
        print(f"{name:<22}{results[-1].main:<28}{100 * main.value:6.1f} % ({100 * main.low:.1f} to {100 * main.high:.1f})")
    write_summary(output, results, about)
    print(output / "summary.md")


def _evaluated(
    model: LanguageTaskModel, task: LoadedTask, file: ItemFile, kept: list[dict[str, Any]], options: Options
) -> TaskResult:
    """Return the result of one task. Show a progress bar on a terminal. An error names the task."""
    with tqdm(total=len(task.items), desc=task.task.name, file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        bar.update(len(kept))

        def keep(records: Sequence[Mapping[str, Any]]) -> None:
            file.append(records)
            bar.update(len(records))

        try:
            return evaluate_task(model, task, kept=kept, keep=keep, code_sandbox=_code_sandbox(options))
        except NotFiniteError as error:
            raise NotFiniteError(f"{task.task.name}: {error}") from error
        except LedomError as error:
            raise type(error)(
                f"{task.task.name}: {error} (--num-fewshot and --max-new-tokens set the length of the texts)"
            ) from error


def _code_sandbox(options: Options) -> Sandbox | None:
    """Return the sandbox for programs that the model writes, or None if the user has not allowed running them."""
    return Sandbox(options["sandbox"]) if options["allow_code_execution"] else None


def _load(options: Options, folder: Path, direction: Direction, about: dict[str, Any]) -> LanguageTaskModel:
    language_model = load_language_model(
        folder, direction, options["direction"], eod_id=options["eod_id"], option_names=COMMAND_OPTIONS
    )
    check_unchanged(folder, about)
    return LanguageTaskModel(language_model, options["batch_size"])


def _made_by(options: Options, folder: Path, direction: Direction) -> dict[str, Any]:
    """Return the settings on which the metrics of every task depend."""
    return {
        **folder_facts(folder),
        "direction": str(direction),
        "eod_id": options["eod_id"],
        "batch_size": options["batch_size"],
        "surroundings": surroundings(),
    }


def _task_settings(task: LoadedTask, options: Options) -> dict[str, Any]:
    """Return the other settings of one task's records.

    The number of items is not one of them, so that items can be added.
    """
    return {
        "num_fewshot": task.num_fewshot,
        "seed": task.seed,
        "max_new_tokens": task.max_new_tokens,
        "files": dict(task.files),
        **({"sandbox": options["sandbox"]} if task.task.kind is TaskKind.CODE else {}),
    }
