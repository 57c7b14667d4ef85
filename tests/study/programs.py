"""Short programs with the study's modules at hand."""

import os
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT

PREPARED = """
import sys
sys.path[:0] = [{study!r}, {quickstart!r}]
"""


def run_python(code: str, folder: Path) -> str:
    """What `code` prints with the study's modules at hand."""
    paths = {name: str(ROOT / "examples" / name) for name in ("study", "quickstart")}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PREPARED.format(**paths) + code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
