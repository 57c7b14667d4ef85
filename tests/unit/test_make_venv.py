"""The set-up of `make quickstart` and `make test` reports a missing program before it starts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

TOOLS = {"python3.11": os.path.realpath(sys.executable), "git": shutil.which("git"), "g++": shutil.which("g++")}


def set_up(folder: Path, *missing: str, python: str = "python3.11") -> subprocess.CompletedProcess[str]:
    """Run the set-up on a machine that has only TOOLS without `missing`."""
    tools = folder / "bin"
    tools.mkdir()
    for name, path in TOOLS.items():
        if name not in missing:
            assert path is not None
            (tools / name).symlink_to(path)
    environment = {"PATH": str(tools), "PYTHON": python}
    command = [shutil.which("bash") or "bash", str(ROOT / ".ci/make_venv"), str(folder / "venv")]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("python3.11", "no Python found; install Python 3.11"),
        ("git", "git is missing; install it"),
        ("g++", "no C++ compiler found"),
    ],
)
def test_a_missing_prerequisite_is_named(tmp_path: Path, missing: str, message: str) -> None:
    done = set_up(tmp_path, missing)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "venv").exists()


def test_another_python_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "python3"
    other.write_text("#!/bin/sh\necho 3.8\n")
    other.chmod(0o755)
    done = set_up(tmp_path, python=str(other))
    assert done.returncode == 2
    assert "found Python 3.8" in done.stderr
    assert "need 3.11" in done.stderr
