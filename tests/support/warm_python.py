"""A Python whose programs are forks of a server that has imported torch: they start in a tenth of a second, not in five.

For tests of programs that start many others, which they do with `sys.executable`. `warm_python` starts the server and gives the path
of the executable; a `ledom` is beside it. That is a client, unless an option of Python comes first: it sends its words, environment, folder,
open files and blocked signals to the server, forwards signals to the fork, and ends as it does. If the client is killed, the server kills the
session of the fork. `os.getppid` of the program gives the process that started the client.
"""

import atexit
import fcntl
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.forked import IMPORTED, run_words
from tests.support.paths import ROOT

SERVING = ["megatron_ledom.serving.app", "uvicorn"]
MOST_FILES = 64
FIRST_SAFE_FILE = 500
"""Received files move to numbers from here, before each gets the number that it has in the client."""
CLIENT = """#!{python} -ISB
import json, os, signal, socket, sys
while sys.argv[1:3] == ["-W", "ignore"]:  # the server ignores warnings
    del sys.argv[1:3]
if sys.argv[1:2] and sys.argv[1][0] == "-" and sys.argv[1] not in ("-c", "-m", "-u"):  # options of Python itself
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
files = [0, 1, 2] + [n for n in map(int, os.listdir("/proc/self/fd")) if n > 2 and os.path.exists(f"/proc/self/fd/{{n}}") and os.get_inheritable(n)]
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = {{"words": sys.argv[1:], "files": files, "folder": os.getcwd(), "environment": dict(os.environ), "executable": {client!r}}}
blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
request |= {{"parent": os.getppid(), "blocked": list(blocked)}}
socket.send_fds(server, [b" "], files)
server.sendall(json.dumps(request).encode() + b"\\n")
answers = server.makefile("r")
pid = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: os.kill(pid, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
code = int(answers.readline())
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""
LEDOM = """#!{client}
from megatron_ledom.cli.main import main
main()
"""


@contextmanager
def warm_python() -> Iterator[Path]:
    """Yield the path of the executable for the block."""
    with tempfile.TemporaryDirectory() as folder:
        address, client = f"{folder}/socket", Path(folder) / "python"
        client.write_text(CLIENT.format(python=sys.executable, address=address, client=str(client)), encoding="utf-8")
        client.with_name("ledom").write_text(LEDOM.format(client=client), encoding="utf-8")
        for program in (client, client.with_name("ledom")):
            program.chmod(0o755)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", "tests.support.warm_python", address]
        server = subprocess.Popen(command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            assert server.stdout.readline(), "the server of the warm Python did not start"
            yield client
        finally:
            server.stdin.close()  # it ends
            server.wait()


@cache
def shared_python() -> Path:
    """Return the executable of a server that ends with this process."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(warm_python())


@dataclass(slots=True)
class Fork:
    """A running program: its client, the bytes of its request so far, its files, and its process id once it has started."""

    client: socket.socket
    received: bytes = b""
    files: list[int] = field(default_factory=list)
    pid: int | None = None


class Server:
    """Starts a fork for each client. `next_program` returns only in forks."""

    def __init__(self, address: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(64)
        self._ended, ending = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(ending)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for source in (0, self._listener, self._ended):
            self._selector.register(source, selectors.EVENT_READ)
        self._forks: dict[socket.socket, Fork] = {}

    def next_program(self) -> dict[str, Any] | None:
        """Serve until stdin closes, and return None; in a fork, return the request at once."""
        while True:
            for key, _ in self._selector.select():
                source: Any = key.fileobj
                if source == 0:
                    return None
                if source == self._ended:
                    os.read(self._ended, 4096)
                    self._reap()
                elif source is self._listener:
                    self._accept()
                elif source in self._forks and (request := self._read(self._forks[source])) is not None:
                    return request

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        files: list[int] = []
        with suppress(OSError):
            files = socket.recv_fds(client, 1, MOST_FILES)[1]
        self._forks[client] = Fork(client, files=files)
        self._selector.register(client, selectors.EVENT_READ)

    def _read(self, fork: Fork) -> dict[str, Any] | None:
        """Read from a client; return its request in the fork, and None in the server."""
        new = b""
        with suppress(OSError):  # a reset by a client that was killed before it had read its answer
            new = fork.client.recv(1 << 20)
        if not new:  # the client is gone
            if fork.pid is not None:
                with suppress(ProcessLookupError):
                    os.killpg(fork.pid, signal.SIGKILL)
            self._forget(fork)
            return None
        fork.received += new
        if not fork.received.endswith(b"\n"):
            return None
        request: dict[str, Any] = json.loads(fork.received)
        own = signal.pthread_sigmask(signal.SIG_BLOCK, request.get("blocked", ()))
        fork.pid = os.fork()
        if fork.pid == 0:
            os.setsid()
            self._close()
            return {**request, "received": fork.files}
        signal.pthread_sigmask(signal.SIG_SETMASK, own)
        with suppress(OSError):  # a client that is gone is found at the next read
            fork.client.sendall(f"{fork.pid}\n".encode())
        for file in fork.files:
            os.close(file)
        fork.files = []
        return None

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                for fork in [one for one in self._forks.values() if one.pid == found[0]]:
                    with suppress(OSError):
                        fork.client.sendall(f"{os.waitstatus_to_exitcode(found[1])}\n".encode())
                    self._forget(fork)

    def _forget(self, fork: Fork) -> None:
        self._selector.unregister(fork.client)
        fork.client.close()
        del self._forks[fork.client]

    def _close(self) -> None:
        """Close the server's own files in a fork."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for client in self._forks:
            client.close()
        self._listener.close()


def be_program(request: dict[str, Any]) -> None:
    """Take over the files, environment and folder of the client, and run its words."""
    held = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, FIRST_SAFE_FILE) for file in request["received"]]
    for file in request["received"]:
        os.close(file)
    for number, file in zip(request["files"], held, strict=True):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    program, parent, real = os.getpid(), request["parent"], os.getppid
    os.getppid = lambda: parent if os.getpid() == program else real()  # forks of the program have it as their parent
    sys.executable = request["executable"]
    sys.orig_argv = [sys.executable, *request["words"]]
    sys.stdout.reconfigure(encoding="utf-8", line_buffering=True)  # type: ignore[union-attr]
    sys.path[0:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    words = request["words"]
    _end(_exit_code(words[1:] if words[0] == "-u" else words, request["folder"]))


def _exit_code(words: list[str], folder: str) -> int:
    try:
        run_words(words, folder)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end(code: int) -> None:
    """End as Python does, but without taking its modules apart, which lasts seconds with torch."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def main() -> None:
    """Serve at the address of the command line."""
    for name in [*IMPORTED, *SERVING]:
        importlib.import_module(name)
    server = Server(sys.argv[1])
    print("ready", flush=True)
    request = server.next_program()
    if request is not None:
        be_program(request)


if __name__ == "__main__":
    main()
