"""The Python of tests that starts programs as forks: words, exit codes, files and signals are those of a real one."""

import json
import os
import select
import signal
import socket
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


def test_a_program_sees_its_parent_and_is_the_parent_of_its_forks(python: Path) -> None:
    code = "import os; pid = os.getpid(); print(os.getppid(), flush=True); os.fork() or os._exit(os.getppid() == pid)"
    done = subprocess.run(
        [python, "-W", "ignore", "-c", f"{code}; print(os.wait()[1] >> 8)"], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [str(os.getpid()), "1"], done.stderr


def test_ledom_is_beside_it(python: Path) -> None:
    done = subprocess.run([python.with_name("ledom"), "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ledom ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_program(number: signal.Signals, python: Path) -> None:
    with subprocess.Popen([python, "-c", SLEEP], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        program = Path("/proc") / process.stdout.readline().strip()
        assert program.exists()
        process.send_signal(number)
        assert process.wait() == -number
    until(lambda: not program.exists())


def test_clients_that_are_gone_do_not_end_the_server(python: Path) -> None:
    request = {"words": ["-c", "print(1)"], "files": [0, 1, 2], "folder": os.getcwd(), "environment": {}, "parent": os.getpid()}
    line = json.dumps({**request, "executable": str(python)}).encode() + b"\n"
    for words, answer in (b"", False), (line[:9], False), (line, False), (line, True):
        with socket.socket(socket.AF_UNIX) as client, open(os.devnull, "r+b") as null:
            client.connect(str(python.with_name("socket")))
            if words:
                socket.send_fds(client, [b" "], [null.fileno()] * 3)
                client.sendall(words)
            if answer:  # and it is not read: the server's next read fails
                select.select([client], [], [])
    assert subprocess.run([python, "-c", "raise SystemExit(3)"], check=False).returncode == 3
