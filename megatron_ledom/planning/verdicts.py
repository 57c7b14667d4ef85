"""Verdicts on a run before it starts: on the memory of its devices, and on the disk for its checkpoints.

The planner's numbers are estimates, so `--accept-plan` overrides a verdict against a run.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_ledom.checkpoint.folder import finished_checkpoints
from megatron_ledom.config.derived import checkpoint_folder
from megatron_ledom.config.schema import ModelConfig, RunConfig
from megatron_ledom.errors import PlanError
from megatron_ledom.planning.hardware import load_hardware
from megatron_ledom.planning.plan import Plan, bytes_of_checkpoint, make_plan

ACCEPT = "--accept-plan"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One line that compares the need of a run with the available memory, disk or data."""

    subject: str
    text: str
    holds: bool = True
    remedy: str = ""
    is_estimate: bool = True
    """False for a problem that also stops the start of the run; `--accept-plan` cannot override it."""

    def line(self) -> str:
        """Return a line such as `memory: NO: ...`."""
        return f"{self.subject}: {'' if self.holds else 'NO: '}{self.text}"


def plan_of_config(config: RunConfig, world_size: int, model: ModelConfig) -> Plan | None:
    """Return the plan on the configured hardware; None if the hardware or the vocabulary is not known."""
    if config.parallel.hardware is None or model.vocab_size is None:
        return None
    return make_plan(replace(config, model=model), world_size, load_hardware(config.parallel.hardware))


def memory_verdict(config: RunConfig, plan: Plan | None) -> Verdict:
    """Compare the fullest stage with the memory of a device."""
    if plan is None:
        known = "parallel.hardware is not set" if config.parallel.hardware is None else "the vocabulary is not known yet"
        return Verdict("memory", f"not planned: {known}")
    stage = max(plan.stages, key=plan.stage_gib).stage
    text = f"{plan.needed_gib:.1f} of {plan.hardware.memory_gib:g} GiB a device of {plan.hardware.name} on stage {stage}"
    remedy = "recompute more, or use more devices (ledom plan-run --search finds a layout)"
    return Verdict("memory", text, plan.fits, remedy)


def disk_verdict(config: RunConfig, model: ModelConfig) -> Verdict:
    """Compare the size of the checkpoints still to be written with the free disk space of the run folder on this machine."""
    if model.vocab_size is None:
        return Verdict("disk", "not planned: the vocabulary is not known yet")
    folder = checkpoint_folder(config)
    each = bytes_of_checkpoint(model, config.optimizer)
    count = checkpoints_to_come(config, list(finished_checkpoints(folder)))
    written = len(iterations_to_save(config, max(finished_checkpoints(folder), default=0)))
    nearest = _existing(folder)
    free = shutil.disk_usage(nearest).free
    kept = "all are kept" if config.checkpoint.keep_last is None else f"checkpoint.keep_last={config.checkpoint.keep_last}"
    text = (
        f"{count:,} more checkpoints of {scaled_bytes(each)} at one time ({kept}) need {scaled_bytes(count * each)},"
        f" {scaled_bytes(free)} are free in {nearest}; the run writes {scaled_bytes(written * each)} in all"
    )
    remedy = "set checkpoint.keep_last (with checkpoint.keep_interval), save less often, or set run_dir to a larger disk"
    return Verdict("disk", text, count * each <= free, remedy)


def checkpoints_to_come(config: RunConfig, there: Sequence[int]) -> int:
    """Return the largest number of checkpoints that the run will add to those of the iterations `there`.

    It is one more than the kept ones, because an old checkpoint is deleted after the next one is complete, and two more with a
    mirror, because one is held while it is copied.
    """
    settings = config.checkpoint
    saved = iterations_to_save(config, max(there, default=0))
    if settings.keep_last is None:
        return len(saved)
    most = settings.keep_last + (1 if settings.mirror is None else 2)
    for_ever = saved[:-most] if settings.keep_interval else []
    kept = sum(1 for iteration in for_ever if iteration % (settings.keep_interval or 1) == 0)
    return min(len(saved), max(1, most - len(there)) + kept)


def iterations_to_save(config: RunConfig, last: int) -> list[int]:
    """Return the iterations after `last` at which the run saves, if nothing stops it."""
    every, end = config.checkpoint.save_interval, config.train.train_iters
    return [*range((last // every + 1) * every, end, every), *([end] if end > last else [])]


def refuse(verdicts: Sequence[Verdict], *, accepted: bool) -> None:
    """Raise PlanError with every verdict against the run. `accepted` ignores estimates."""
    against = [verdict for verdict in verdicts if not verdict.holds and not (accepted and verdict.is_estimate)]
    if against:
        problems = "; ".join(f"{verdict.line()}: {verdict.remedy}" for verdict in against)
        accept = f"; or accept the plan with {ACCEPT}" if any(verdict.is_estimate for verdict in against) else ""
        raise PlanError(problems + accept)


def scaled_bytes(number: float) -> str:
    """Return a size such as `10.3 TiB` or `101.6 GiB`."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"]
    power = min(len(units) - 1, max(0, int(number).bit_length() - 1) // 10)
    return f"{number / 1024**power:,.{1 if power else 0}f} {units[power]}"


def _existing(path: str) -> str:
    """Return the path if it is a folder, else the nearest folder above it that exists."""
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path
