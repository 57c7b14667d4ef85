"""What tools/plan_run.py does: read, plan or search, write."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ledom.config.derived import planned_world_size
from megatron_ledom.config.load import load_config, save_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import UsageError
from megatron_ledom.planner.hardware import load_hardware
from megatron_ledom.planner.plan import Plan, make_plan
from megatron_ledom.planner.search import Found, describe_found, search, table_of
from megatron_ledom.planner.text import describe_plan
from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.locks import output_folder_lock


def plan_and_text(
    config: str,
    hardware: str,
    num_gpus: int | None,
    search: bool,
    save_config: str | None,
    output: str | None,
    overrides: Sequence[str],
) -> tuple[str, Plan]:
    """The plan, as text too; files as asked. Raises ConfigError, which says what would do, when nothing works."""
    machine = load_hardware(hardware)
    run = load_config(config, overrides)
    count = _devices(run, num_gpus)
    run = replace(run, parallel=replace(run.parallel, world_size=count, hardware=hardware))
    found, text = None, ""
    if search:
        found = _search(run, count, hardware)
        run, text = found.ranked[0][0], describe_found(found) + "\n\n"
    plan = make_plan(run, count, machine)
    text += describe_plan(plan)
    if save_config is not None:
        text += f"\n{_save(run, save_config)}\n"
    if output is not None:
        from megatron_ledom.planner.pictures import write_pictures

        with output_folder_lock(output):
            text += f"\n{write_pictures(plan, output, text)}\n"
            if found is not None:
                write_file(Path(output, "layouts.tsv"), table_of(found))
    return text, plan


def plan_command(*arguments: Any) -> str:
    """The text of `plan_and_text`."""
    return plan_and_text(*arguments)[0]


def _devices(run: RunConfig, num_gpus: int | None) -> int:
    count = planned_world_size(run) if num_gpus is None else num_gpus
    if count < 1:
        raise UsageError(f"--num-gpus {count}: give the number of devices, 1 or more")
    return count


def _search(run: RunConfig, count: int, hardware: str) -> Found:
    return search(run, count, load_hardware(hardware))


def _save(run: RunConfig, path: str) -> str:
    save_config(run, path)
    return f"{path}: python -m megatron_ledom.pretrain --config {path}"
