"""Plants bugs in a copy of the kernels' sources, to show that the tests can fail."""

import multiprocessing
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tests.kernels.build import CSRC
from tests.kernels.cases import CaseMaker, KernelError, check_outputs
from tests.kernels.emulator import SCHEDULES, run_emulated


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    """Path below csrc/."""
    found: str
    """Text to replace, at every occurrence."""
    put: str

    def __str__(self) -> str:
        return self.name


def plant(mutant: Mutant, folder: Path) -> Path:
    """Copy csrc/ with the bug, and return the path of the copy."""
    copy = folder / "csrc"
    shutil.copytree(CSRC, copy, ignore=shutil.ignore_patterns("helpers"))
    path = copy / mutant.file
    text = path.read_text(encoding="utf-8")
    assert mutant.found in text, f"{mutant.name}: {mutant.file} has no {mutant.found!r}"
    path.write_text(text.replace(mutant.found, mutant.put), encoding="utf-8")
    return copy


def run_cases(op: str, cases: dict[str, CaseMaker], csrc: Path) -> None:
    """Run all cases under all schedules, as test_numerics.py. Raises AssertionError or KernelError at the first wrong one."""
    for make in cases.values():
        case = make(torch.bfloat16)
        runs = [run_emulated(op, case, schedule, csrc) for schedule in SCHEDULES]
        for outputs in runs:
            check_outputs(case, outputs)
            for name, found in outputs.items():
                assert torch.equal(found.view(torch.uint8), runs[0][name].view(torch.uint8)), f"{name} depends on the schedule"


def exit_code(action: Callable[[], None]) -> None:
    """End this process with 1 if the action finds an error, else with 0."""
    try:
        action()
    except (AssertionError, KernelError) as error:
        print(f"caught: {error}", flush=True)
        raise SystemExit(1) from error


def is_caught(op: str, cases: dict[str, CaseMaker], csrc: Path) -> bool:
    """Return True if a case fails; it runs in its own process, because a bug may crash it."""
    process = multiprocessing.get_context("fork").Process(target=exit_code, args=(partial(run_cases, op, cases, csrc),))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode != 0
