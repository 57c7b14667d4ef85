"""Run commands in forks of a process that has imported torch: they start in a tenth of a second, not in five.

For tests of the results of a command. Tests of its imports, environment or threads start a real process.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

IMPORTED = [
    "megatron_ledom.pretrain",
    "megatron_ledom.training.trainer",
    "megatron_ledom.inference",
    "transformers.models.llama.modeling_llama",
]


@cache
def fork_context() -> Any:
    """Return the multiprocessing context that forks ranks and commands, with one thread each."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def run_forked(
    words: Sequence[object], *, folder: Path = ROOT, environment: Mapping[str, str] | None = None, seconds: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` (a script, `-m module` or `-c code`) in `folder`; return its exit code and output."""
    command = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as scratch:
        streams = [f"{scratch}/stdout", f"{scratch}/stderr"]
        variables = dict(os.environ if environment is None else environment)
        process = fork_context().Process(target=_be_command, args=(command, str(folder), variables, streams))
        process.start()
        process.join(seconds)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            raise subprocess.TimeoutExpired(command, seconds)
        written = [Path(stream).read_text(encoding="utf-8", errors="replace") for stream in streams]
    return subprocess.CompletedProcess(command, process.exitcode, *written)


def become(folder: str | None, environment: Mapping[str, str], streams: Sequence[str]) -> None:
    """Give this forked process its own session, folder, environment and output files."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # the default of Linux; here it would be forkserver
    for number, stream in enumerate(streams, 1):
        descriptor = os.open(stream, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.update(environment)
    sys.stdin = open(os.devnull)  # noqa: SIM115  stays open until the process ends
    if folder is not None:
        os.chdir(folder)


def _be_command(words: list[str], folder: str, environment: dict[str, str], streams: list[str]) -> None:
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    become(folder, environment, streams)
    run_words(words, folder)


def run_words(words: Sequence[str], folder: str) -> None:
    """Run `python WORDS` in this process, as its main program."""
    kind = words[0] if words[0] in ("-m", "-c") else ""
    sys.argv = list(words[1:] if kind else words)
    sys.path[0:0] = [os.path.dirname(os.path.abspath(words[0])) if not kind else folder]
    if kind == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv[0] = "-c"
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(words[0], run_name="__main__")
