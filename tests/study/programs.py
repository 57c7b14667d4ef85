"""Run short programs that import the study's modules."""

from pathlib import Path

from tests.support.forked import run_forked
from tests.support.paths import ROOT

PREPARED = """
import sys
sys.path[:0] = [{study!r}, {quickstart!r}]
"""


def run_python(code: str, folder: Path) -> str:
    """Return the output of `code`, which can import the study's modules."""
    paths = {name: str(ROOT / "examples" / name) for name in ("study", "quickstart")}
    done = run_forked(["-c", PREPARED.format(**paths) + code], folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
