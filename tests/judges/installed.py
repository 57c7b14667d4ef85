"""Packages that only the tests of this folder use, in a folder of the environment from which nothing else imports.

With them among the other packages, megatron-core would use Transformer Engine in every test. `make install-judges` installs them.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT

FOLDER = Path(sys.prefix) / "judges"
ABSENT = f"{FOLDER} is absent: make install-judges"


def has(package: str) -> bool:
    """Return True if the package is installed in FOLDER."""
    return (FOLDER / package).is_dir()


def run_with_transformer_engine(module: str, *arguments: object) -> str:
    """Run a module of the tests in a process that has imported Transformer Engine's Python sources; return its stdout."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.te_without_extension", module, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(FOLDER)])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
