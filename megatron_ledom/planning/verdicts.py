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


def not_counted(config: RunConfig) -> list[str]:
    """Return the parts of a run that a plan counts neither in memory nor in time."""
    parts = {
        "the modules of model.mtp_num_layers": config.model.mtp_num_layers,
        "the head and the teacher of train.auxiliary": config.train.auxiliary.kind,
    }
    return [part for part, setting in parts.items() if setting is not None]


def memory_verdict(config: RunConfig, plan: Plan | None) -> Verdict:
    """Compare the fullest stage with the memory of a device."""
    if plan is None:
        known = "parallel.hardware is not set" if config.parallel.hardware is None else "the vocabulary is not known yet"
        return Verdict("memory", f"not planned: {known}")
    stage = max(plan.stages, key=plan.stage_gib).stage
    text = f"{plan.needed_gib:.1f} of {plan.hardware.memory_gib:g} GiB a device of {plan.hardware.name} on stage {stage}"
    text += "".join(f", without {part}" for part in not_counted(config))
    remedy = "recompute more, or use more devices (ledom plan-run --search finds a layout)"
    return Verdict("memory", text, plan.fits, remedy)


@dataclass(frozen=True, slots=True)
class DiskNeed:
    """Bytes that a run adds to a disk."""

    name: str
    """Such as `run_dir=runs/base`, in texts."""
    stage: int
    """Number of the run among those that follow each other; its needs are there at the same time."""
    folder: str
    """The nearest existing folder."""
    at_most: int
    """Bytes while the run trains."""
    at_end: int
    """Bytes that stay when it is complete."""


def disk_needs(config: RunConfig, model: ModelConfig, stage: int = 1) -> list[DiskNeed]:
    """Return the needs of the checkpoints still to be written, and of their copies if checkpoint.mirror is a folder of this machine.

    There are none without the vocabulary.
    """
    if model.vocab_size is None:
        return []
    each, folder, mirror = bytes_of_checkpoint(model, config.optimizer), checkpoint_folder(config), _mirror_folder(config)
    there = list(finished_checkpoints(folder))
    counts = [checkpoints_to_come(config, there), checkpoints_to_come(config, there, at_end=True)]
    needs = [DiskNeed(f"run_dir={config.run_dir}", stage, _existing(folder), counts[0] * each, counts[1] * each)]
    if mirror is not None:
        copies = list(finished_checkpoints(os.path.join(mirror, "checkpoints")))
        counts = [copies_to_come(config, copies), copies_to_come(config, copies, at_end=True)]
        name = f"checkpoint.mirror={config.checkpoint.mirror}"
        needs.append(DiskNeed(name, stage, _existing(mirror), counts[0] * each, counts[1] * each))
    return needs


def _mirror_folder(config: RunConfig) -> str | None:
    """Return the mirror if it is a folder of this machine."""
    address = config.checkpoint.mirror
    path = None if address is None else address.removeprefix("file://")
    return None if path is None or "://" in path else os.path.abspath(path)


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
    if config.checkpoint.mirror is not None:
        copies = copies_to_come(config, [])
        text += f"; up to {copies:,} copies at {config.checkpoint.mirror} need {scaled_bytes(copies * each)} there"
    remedy = "set checkpoint.keep_last (with checkpoint.keep_interval), save less often, or set run_dir to a larger disk"
    return Verdict("disk", text, count * each <= free, remedy)


def shared_disk_verdicts(needs: Sequence[DiskNeed]) -> list[Verdict]:
    """Compare what several runs, one after the other, and their mirrors need together on one disk with its free space.

    The checkpoints of a complete run stay. A disk with a single need has none of these verdicts, but that of its run.
    """
    disks: dict[int, list[DiskNeed]] = {}
    for need in needs:
        disks.setdefault(os.stat(need.folder).st_dev, []).append(need)
    verdicts = []
    for group in disks.values():
        if len(group) < 2:
            continue
        peak = max(
            sum(one.at_end for one in group if one.stage < stage) + sum(one.at_most for one in group if one.stage == stage)
            for stage in {one.stage for one in group}
        )
        free = shutil.disk_usage(group[0].folder).free
        parts = ", ".join(f"{scaled_bytes(one.at_most)} for {one.name}" for one in group)
        text = f"together up to {scaled_bytes(peak)} on one disk ({parts}), {scaled_bytes(free)} are free in {group[0].folder}"
        remedy = (
            "keep fewer checkpoints (checkpoint.keep_last, checkpoint.mirror_keep_last), or use another disk for some of them"
        )
        verdicts.append(Verdict("disk", text, peak <= free, remedy))
    return verdicts


def checkpoints_to_come(config: RunConfig, there: Sequence[int], *, at_end: bool = False) -> int:
    """Return the largest number of checkpoints that the run will add to those of the iterations `there`; or the number at its end.

    It is one more than the kept ones, because an old checkpoint is deleted after the next one is complete, and two more with a
    mirror, because one is held while it is copied.
    """
    more = 0 if at_end else 1 if config.checkpoint.mirror is None else 2
    return _to_come(config, config.checkpoint.keep_last, config.checkpoint.keep_interval, there, more)


def copies_to_come(config: RunConfig, there: Sequence[int], *, at_end: bool = False) -> int:
    """Return the same of the copies at the mirror: it too deletes after the next copy is whole."""
    settings = config.checkpoint
    return _to_come(config, settings.mirror_keep_last, settings.mirror_keep_interval, there, 0 if at_end else 1)


def _to_come(config: RunConfig, keep_last: int | None, keep_interval: int | None, there: Sequence[int], more: int) -> int:
    """Return the number of checkpoints to come. more: checkpoints beyond the kept ones."""
    saved = iterations_to_save(config, max(there, default=0))
    if keep_last is None:
        return len(saved)
    most = keep_last + more
    for_ever = saved[:-most] if keep_interval else []
    kept = sum(1 for iteration in for_ever if iteration % (keep_interval or 1) == 0)
    return min(len(saved), max(1 if more else 0, most - len(there)) + kept)


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
