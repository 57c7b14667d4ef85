"""Conversions in forked children of a process that has imported everything: killed at random moments, or with a full disk.

`python -m tests.support.conversion_child KIND SOURCE TARGET TIMES` prints the state after each kill as one JSON object per
line.
"""

import contextlib
import importlib
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

from megatron_ledom.convert.average import average_checkpoints
from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.convert.hf_import import import_hf
from megatron_ledom.direction import Direction
from megatron_ledom.errors import LedomError


def convert(kind: str, source: str, target: str) -> None:
    """Run one conversion."""
    if kind == "export":
        export_hf(source, target, max_shard_size=60_000)
    elif kind == "average":
        average_checkpoints([source], target, last=2, max_shard_size=60_000)
    else:
        import_hf(source, target, direction=Direction.REVERSE, max_shard_size=60_000)


def fork(kind: str, source: str, target: str, limit: int | None = None, names: int | None = None) -> int:
    """Fork a child that converts, and return its process id. Its files cannot grow beyond `limit` bytes.

    `names`: an open file, to which the child writes the names of all modules that it has imported.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 0
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        convert(kind, source, target)
        if names is not None:
            os.write(names, json.dumps(sorted(sys.modules)).encode())
    except LedomError as error:
        sys.stderr.write(f"error: {error}\n")
        code = error.exit_code
    except BaseException as error:
        sys.stderr.write(f"unexpected: {type(error).__name__}: {error}\n")
        code = 99
    finally:
        sys.stderr.flush()
        os._exit(code)


def import_what_it_imports(kind: str, source: str, target: str) -> None:
    """Import all modules that a conversion imports, so that the measured and killed children do not.

    A child reports the modules: a conversion in this process would start threads, which do not survive a fork.
    """
    with open(f"{target}.names", "w+b") as file:
        _, status = os.waitpid(fork(kind, source, target, names=file.fileno()), 0)
        assert status == 0
        file.seek(0)
        names = json.load(file)
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(ImportError):  # some are created by others and have no file
                importlib.import_module(name)


def state(target: Path) -> dict[str, object]:
    """Return which of the target and its temporary folder would count as finished."""
    part = Path(f"{target}.part")
    return {
        "finished": target.exists(),
        "part": part.exists(),
        "part_loads": (part / "config.json").exists() or (part / "checkpoints/latest").exists(),
    }


def main() -> None:
    """Run as described above. The k-th of n kills is at a random moment of the k-th of n equal parts of a conversion."""
    kind, source, target, times = sys.argv[1:5]
    if times.startswith("limit="):
        _, status = os.waitpid(fork(kind, source, target, int(times.removeprefix("limit="))), 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), **state(Path(target))}))
        return
    import_what_it_imports(kind, source, f"{target}-first")
    started = time.monotonic()
    _, status = os.waitpid(fork(kind, source, f"{target}-measured"), 0)
    assert status == 0
    interval = (time.monotonic() - started) / int(times)
    for number in range(int(times)):
        one = Path(f"{target}-{number}")
        pid = fork(kind, source, str(one))
        time.sleep(random.uniform(number, number + 1) * interval)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        print(json.dumps({"target": str(one), **state(one)}), flush=True)


if __name__ == "__main__":
    main()
