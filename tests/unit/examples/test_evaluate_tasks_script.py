"""examples/slurm/evaluate_tasks.sbatch outside a job: it checks what needs no GPU, and submits one array task for each task."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.evaluation_sets import write_sets
from tests.support.paths import ROOT
from tests.support.tiny_models import random_model_folder

Submit = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def submit(python: Path, tmp_path: Path) -> Submit:
    """Return a function that starts the script with tasks and options; a fake sbatch writes its arguments to `submitted`."""
    model, sets = random_model_folder(tmp_path / "model", "byte_level", "forward"), write_sets(tmp_path / "sets")
    (tmp_path / "sbatch").write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/submitted\n')
    (tmp_path / "sbatch").chmod(0o755)
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    variables = {"MODEL": str(model), "DATA": str(sets), "OUTPUT": str(tmp_path / "evaluated"), "PYTHON": str(python)}
    variables |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}

    def start(tasks: str, *options: str) -> "subprocess.CompletedProcess[str]":
        command = ["bash", "examples/slurm/evaluate_tasks.sbatch", *options]
        environment = {**outside, **variables, "TASKS": tasks}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    return start


@pytest.mark.parametrize(
    ("tasks", "options", "says"),
    [
        ("svamp,bolq", (), "there is no task 'bolq'; did you mean boolq?"),
        ("svamp,reversal", (), "reversal"),
        ("svamp,humaneval", (), "--allow-code-execution"),
        ("svamp", ("--limt", "3"), "--limt"),
    ],
)
def test_tasks_that_cannot_be_evaluated_are_refused_before_the_submission(
    submit: Submit, tmp_path: Path, tasks: str, options: tuple[str, ...], says: str
) -> None:
    refused = submit(tasks, *options)
    assert (refused.returncode, (tmp_path / "submitted").exists()) == (2, False)
    assert says in refused.stderr
    assert not (tmp_path / "evaluated").exists()


def test_tasks_are_submitted_once_each_with_a_folder_each(submit: Submit, tmp_path: Path) -> None:
    done = submit("svamp, humaneval,,svamp", "--allow-code-execution")
    assert done.returncode == 0, done.stderr
    assert "2 tasks with 5 items can be evaluated" in done.stdout
    assert (tmp_path / "submitted").read_text().split()[0] == "--array=0-1"
    assert sorted(path.name for path in (tmp_path / "evaluated").iterdir()) == ["humaneval", "svamp"]
