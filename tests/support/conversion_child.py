"""Conversions in forked children of one process that has imported everything: killed at random moments, or out of disk.

`python -m tests.support.conversion_child KIND SOURCE TARGET TIMES` prints one JSON object a line: what each kill left behind.
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

from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.convert.hf_import import import_hf
from megatron_ledom.direction import Direction
from megatron_ledom.errors import LedomError


def convert(kind: str, source: str, target: str) -> None:
    """One conversion."""
    if kind == "export":
        export_hf(source, target, max_shard_size=60_000)
    else:
        import_hf(source, target, direction=Direction.REVERSE, max_shard_size=60_000)


def fork(kind: str, source: str, target: str, limit: int | None = None, names: int | None = None) -> int:
    """The process id of a child that converts; no file of it can grow beyond `limit` bytes.

    `names`: an open file, to which it writes the names of all modules that it has in the end.
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
        sys.stderr.write(f"unforeseen: {type(error).__name__}: {error}\n")
        code = 99
    finally:
        sys.stderr.flush()
        os._exit(code)


def import_what_it_imports(kind: str, source: str, target: str) -> None:
    """Import here whatever a whole conversion imports on its way, so that those measured and killed do so no more.

    A child says what that is: a conversion in this process would leave threads behind, which no fork survives.
    """
    with open(f"{target}.names", "w+b") as file:
        _, status = os.waitpid(fork(kind, source, target, names=file.fileno()), 0)
        assert status == 0
        file.seek(0)
        names = json.load(file)
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(ImportError):  # some are put in place by others and have no file
                importlib.import_module(name)


def state(target: Path) -> dict[str, object]:
    """What of the target and of its temporary folder would pass as finished."""
    part = Path(f"{target}.part")
    return {
        "finished": target.exists(),
        "part": part.exists(),
        "part_loads": (part / "config.json").exists() or (part / "checkpoints/latest").exists(),
    }


def main() -> None:
    """See the top. The moments are spread: the k-th of n kills falls into the k-th n-th of what a conversion takes."""
    kind, source, target, times = sys.argv[1:5]
    if times.startswith("limit="):
        _, status = os.waitpid(fork(kind, source, target, int(times.removeprefix("limit="))), 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), **state(Path(target))}))
        return
    import_what_it_imports(kind, source, f"{target}-first")
    started = time.monotonic()
    _, status = os.waitpid(fork(kind, source, f"{target}-measured"), 0)
    assert status == 0
    share = (time.monotonic() - started) / int(times)
    for number in range(int(times)):
        one = Path(f"{target}-{number}")
        pid = fork(kind, source, str(one))
        time.sleep(random.uniform(number, number + 1) * share)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        print(json.dumps({"target": str(one), **state(one)}), flush=True)


if __name__ == "__main__":
    main()
