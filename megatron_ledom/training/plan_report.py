"""A run's records beside its plan: how far the planner was off."""

import os
import statistics
from dataclasses import replace

from megatron_ledom.config.derived import planned_world_size, tokens_per_iteration
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.planner.hardware import Hardware, load_hardware
from megatron_ledom.planner.plan import make_plan
from megatron_ledom.storage.records import LAUNCHES
from megatron_ledom.training.dry_run import known_model, stored_manifests
from megatron_ledom.training.launch_record import read_launches
from megatron_ledom.training.run_report import RunData


def planned_rows(run: RunData, hardware: str | None) -> dict[str, str]:
    """Planned and measured seconds, tokens a second and MFU of a run, by what they are.

    hardware: a name or a file; None means the run's own parallel.hardware. Raises UsageError without any.
    """
    name = hardware or run.config.parallel.hardware
    if name is None:
        raise UsageError(f"{run.name} names no parallel.hardware; give one, for example --plan a100-80")
    machine = load_hardware(name)
    return compare(run, machine)


def compare(run: RunData, machine: Hardware) -> dict[str, str]:
    """The rows for given hardware. Seconds an iteration follow from the median of tokens_per_second."""
    config = replace(run.config, model=known_model(run.config, stored_manifests(run.config)))
    plan = make_plan(config, ranks_of(run), machine)
    rates = run.points("tokens_per_second")[1]
    if not rates:
        raise UsageError(f"{run.name} has no tokens_per_second in its records; it cannot be compared with a plan")
    if statistics.median(rates) <= 0:
        raise UsageError(f"the median of tokens_per_second of {run.name} is not above 0; it cannot be compared with a plan")
    measured = tokens_per_iteration(run.config) / statistics.median(rates)
    low, high = plan.interval
    utilisation = run.points("mfu")[1]
    return {
        "planned for": f"{plan.layout.num_ranks} x {machine.name}",
        "s/iteration, planned": f"{plan.time.total:.3f}",
        "s/iteration, measured": f"{measured:.3f}",
        "planned / measured": f"{plan.time.total / measured - 1:+.1%}",
        "measured in the interval": "yes" if low <= measured <= high else f"no, it is {low:.3f} to {high:.3f}",
        "MFU, planned": f"{plan.mfu:.1%}",
        "MFU, measured": f"{statistics.median(utilisation):.1%}" if utilisation else "–",
    }


def ranks_of(run: RunData) -> int:
    """Ranks of the last launch; of a run without a record of it, those the config names."""
    launches = read_launches(run.config.run_dir)
    if not launches:
        return planned_world_size(run.config)
    num = launches[-1].get("world_size")
    if type(num) is not int or num < 1:
        path = os.path.join(run.config.run_dir, LAUNCHES)
        raise DataError(
            f"{path}: the last launch has the world_size {num!r:.60}, expected a number of ranks; correct that line"
        )
    return num
