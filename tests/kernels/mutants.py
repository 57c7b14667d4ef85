"""Bugs planted in a copy of the kernels' sources, to see that the tests can fail."""

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
    """Below csrc/."""
    found: str
    """Text that stands there, as often as it does."""
    put: str

    def __str__(self) -> str:
        return self.name


def plant(mutant: Mutant, folder: Path) -> Path:
    """A copy of csrc/ with the bug; the copy's path."""
    copy = folder / "csrc"
    shutil.copytree(CSRC, copy, ignore=shutil.ignore_patterns("helpers"))
    path = copy / mutant.file
    text = path.read_text(encoding="utf-8")
    assert mutant.found in text, f"{mutant.name}: {mutant.file} has no {mutant.found!r}"
    path.write_text(text.replace(mutant.found, mutant.put), encoding="utf-8")
    return copy


def run_cases(op: str, cases: dict[str, CaseMaker], csrc: Path) -> None:
    """All cases under all schedules, as test_numerics.py runs them. AssertionError or KernelError at the first that is wrong."""
    for make in cases.values():
        case = make(torch.bfloat16)
        runs = [run_emulated(op, case, schedule, csrc) for schedule in SCHEDULES]
        for outputs in runs:
            check_outputs(case, outputs)
            for name, found in outputs.items():
                assert torch.equal(found.view(torch.uint8), runs[0][name].view(torch.uint8)), f"{name} depends on the schedule"


def exit_code(action: Callable[[], None]) -> None:
    """Ends this process with 1 if the action finds a fault, with 0 if it does not."""
    try:
        action()
    except (AssertionError, KernelError) as error:
        print(f"caught: {error}", flush=True)
        raise SystemExit(1) from error


def is_caught(op: str, cases: dict[str, CaseMaker], csrc: Path) -> bool:
    """Whether a case fails; in a process of its own, which a bug may well bring down."""
    process = multiprocessing.get_context("fork").Process(target=exit_code, args=(partial(run_cases, op, cases, csrc),))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode != 0
