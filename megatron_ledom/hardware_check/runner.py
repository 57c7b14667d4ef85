"""Runs the checks of a machine one after the other and writes their report; a failure of one never stops the others."""

import difflib
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from megatron_ledom.errors import UsageError
from megatron_ledom.hardware_check.check import Check, Setting, skipped
from megatron_ledom.hardware_check.isolation import Result, run_isolated
from megatron_ledom.hardware_check.report import JSON_FILE, MARKDOWN_FILE, Report, anonymous
from megatron_ledom.storage.locks import LOCK_SUFFIX, output_folder_lock
from megatron_ledom.storage.signals import sigterm_as_interrupt

log = logging.getLogger(__name__)

SMALLEST_LIMIT = 1.0
"""Seconds that a check has at least, even if the others have used up the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The user's options."""

    output: str
    """Folder of the report and of the checks' files."""
    device: str = "auto"
    """`auto`, `cuda` or `cpu`."""
    num_gpus: int | None = None
    """GPUs to use; on a CPU, processes. None: all GPUs, or two processes."""
    minutes: float = 8.0
    """Time of all checks together; each has a share of it."""
    only: Sequence[str] = ()
    """Names of checks to run after the first one; empty: all."""


def check_hardware(request: Request, checks: Sequence[Check]) -> Report:
    """Run the checks, write the report after each of them, and return it.

    checks: the first one describes the machine and always runs; its numbers have `device` and `ranks` for the others, which are
    skipped without a device. A KeyboardInterrupt or SIGTERM stops the running check; it is raised after the report is written.
    Raises UsageError for an unknown name in `only`, and for an output folder that is not empty or that another process uses.
    """
    if not (0 < request.minutes < math.inf):
        raise UsageError(
            f"--minutes {request.minutes:g} is not a number above 0; give the minutes of all checks together, such as 8"
        )
    if request.num_gpus is not None and request.num_gpus < 1:
        raise UsageError(f"--gpus {request.num_gpus} is below 1; give a number of GPUs, or none for all")
    chosen = _chosen(checks, request.only)
    report = Report(datetime.now(UTC).isoformat(timespec="seconds"), request.minutes)
    with sigterm_as_interrupt(), output_folder_lock(request.output):
        _check_empty(request.output)
        try:
            _run_all(chosen, request, report)
        except KeyboardInterrupt:
            left = chosen[len(report.results) :]
            report.results += [Result(check, skipped("the checks were interrupted")) for check in left]
            report.write(request.output)
            raise
    return report


def _chosen(checks: Sequence[Check], only: Sequence[str]) -> list[Check]:
    """Return the first check and those named in `only`, in the catalogue's order."""
    names = [check.name for check in checks]
    for name in only:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {close[0]}? The" if close else "the"
            raise UsageError(f"--only {name} is not a check; {hint} checks are {', '.join(names)}")
    return [check for index, check in enumerate(checks) if index == 0 or not only or check.name in only]


def _check_empty(output: str) -> None:
    found = set(os.listdir(output)) - {LOCK_SUFFIX}
    if found & {JSON_FILE, MARKDOWN_FILE}:
        raise UsageError(f"--output {output} has a report already; name another folder, or remove it")
    if found:
        raise UsageError(f"--output {output} is not empty; name a new folder")


def _run_all(checks: Sequence[Check], request: Request, report: Report) -> None:
    """Run the checks in order, each within its share of the time that is left."""
    left = 60 * request.minutes
    for index, check in enumerate(checks):
        limit = limit_of(checks, index, left)
        if index == 0:
            result = _run(check, request, request.device, request.num_gpus or 0, limit)
        elif report.machine.get("ranks"):
            result = _run(check, request, report.machine["device"], report.machine["ranks"], limit)
        else:
            result = Result(check, skipped(f"the check {checks[0].name} found no device"))
        left -= result.seconds
        report.results.append(result)
        report.is_complete = index == len(checks) - 1
        report.write(request.output)
        outcome = result.outcome
        log.info("%s: %s in %.1f s%s", check.name, outcome.status, result.seconds, f": {outcome.reason}" * bool(outcome.reason))


def limit_of(checks: Sequence[Check], index: int, left: float) -> float:
    """Return the time limit of a check, if `left` seconds are left for it and the later ones."""
    return max(SMALLEST_LIMIT, left * checks[index].share / sum(other.share for other in checks[index:]))


def _run(check: Check, request: Request, device: str, num_gpus: int, limit: float) -> Result:
    folder = Path(request.output, check.name)
    files = folder / "files"
    files.mkdir(parents=True)
    log.info("%s: running, at most %.0f s", check.name, limit)
    setting = Setting(device=device, num_gpus=num_gpus, seconds=limit, folder=str(files.resolve()))
    return run_isolated(check, setting, folder)


def describe(report: Report, output: str) -> str:
    """Return the results for a terminal: a line for each check that failed or was skipped, the numbers, and the report's path."""
    lines = [
        f"{result.outcome.status}: {result.check.name}: {anonymous(result.outcome.reason)}"
        for result in report.results
        if result.outcome.status != "passed"
    ]
    paths = f"{os.path.join(output, MARKDOWN_FILE)} and {JSON_FILE}"
    return "\n".join([*lines, f"{report.summary()}; the report is {paths}"]) + "\n"
