"""The Python of tests that starts programs as forks: words, exit codes, files and signals are those of a real one."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.served import until

SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
NESTED = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', 'raise SystemExit(5)']).returncode)"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print(1)", 0),
        ("raise SystemExit(7)", 7),
        ("raise SystemExit('no')", 1),
        ("1 / 0", 1),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        (NESTED, 5),
    ],
)
def test_programs_end_as_in_a_real_python(code: str, expected: int, python: Path) -> None:
    assert subprocess.run([python, "-c", code], check=False).returncode == expected


def test_a_program_has_the_files_folder_and_environment_of_its_start(python: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    code = f"import os, sys; os.write({write}, ' '.join([os.getcwd(), *sys.argv[1:], *map(os.environ.get, ['A', 'HOME'])]).encode())"
    environment = {"A": "b", "HOME": "h"}
    subprocess.run([python, "-c", code, "x y"], cwd=tmp_path, env=environment, pass_fds=[write], check=True)
    os.close(write)
    assert os.read(read, 1000).decode() == f"{tmp_path} x y b h"
    os.close(read)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_program(number: signal.Signals, python: Path) -> None:
    with subprocess.Popen([python, "-c", SLEEP], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        program = Path("/proc") / process.stdout.readline().strip()
        assert program.exists()
        process.send_signal(number)
        assert process.wait() == -number
    until(lambda: not program.exists())
