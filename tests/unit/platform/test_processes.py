"""A timer ends a process even if its interpreter is blocked, unless the timer was extended or cancelled."""

import subprocess
import sys

import pytest

from tests.support.paths import ROOT

SLEEPS = "ctypes.PyDLL(None).usleep(300_000)"  # a PyDLL keeps the interpreter's lock


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("timer.set(0.05); ctypes.PyDLL(None).sleep(100)", 75),
        (f"timer.set(0.05); timer.set(0); {SLEEPS}", 0),
        (f"timer.set(0.05); timer.set(100); {SLEEPS}", 0),
        (f"timer.set(0.05); os.fork() or ({SLEEPS}, os._exit(7)); time.sleep(100)", 75),
    ],
    ids=["blocked", "called off", "put off", "forked"],
)
def test_a_blocked_process_ends_with_its_code(line: str, code: int) -> None:
    program = f"import ctypes, os, time; from megatron_ledom.platform.processes import ExitTimer; timer = ExitTimer(75); {line}"
    done = subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT, timeout=60)
    assert done.returncode == code
