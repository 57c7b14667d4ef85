"""Conversions in forked children of one process that has imported everything: killed at random moments, or out of disk.

`python -m tests.conversion_child KIND SOURCE TARGET TIMES` prints one JSON object a line: what each kill left behind.
"""

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import transformers.models.llama.modeling_llama  # noqa: F401  what a conversion imports late; each child would pay for it

from megatron_ledom.convert.export_hf import export_hf
from megatron_ledom.convert.import_hf import import_hf
from megatron_ledom.direction import Direction
from megatron_ledom.errors import LedomError


def convert(kind: str, source: str, target: str) -> None:
    """One conversion."""
    if kind == "export":
        export_hf(source, target, max_shard_size=60_000)
    else:
        import_hf(source, target, direction=Direction.REVERSE, max_shard_size=60_000)


def fork(kind: str, source: str, target: str, limit: int | None = None) -> int:
    """The process id of a child that converts; no file of it can grow beyond `limit` bytes."""
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
    except LedomError as error:
        sys.stderr.write(f"error: {error}\n")
        code = error.exit_code
    except BaseException as error:
        sys.stderr.write(f"unforeseen: {type(error).__name__}: {error}\n")
        code = 99
    finally:
        sys.stderr.flush()
        os._exit(code)


def state(target: Path) -> dict[str, object]:
    """What of the target and of its temporary folder would pass as finished."""
    part = Path(f"{target}.part")
    return {
        "finished": target.exists(),
        "part": part.exists(),
        "part_loads": (part / "config.json").exists() or (part / "checkpoints/latest").exists(),
    }


def main() -> None:
    """See the top."""
    kind, source, target, times = sys.argv[1:5]
    if times.startswith("limit="):
        _, status = os.waitpid(fork(kind, source, target, int(times.removeprefix("limit="))), 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), **state(Path(target))}))
        return
    seconds = 0.0
    for run in ("warm", "measured"):  # the first one of a fresh environment compiles modules, and takes many times as long
        started = time.monotonic()
        _, status = os.waitpid(fork(kind, source, f"{target}-{run}"), 0)
        assert status == 0
        seconds = time.monotonic() - started
    for number in range(int(times)):
        one = Path(f"{target}-{number}")
        pid = fork(kind, source, str(one))
        time.sleep(seconds * (number + random.random()) / int(times))  # a moment in each tenth: the first ones are early
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        print(json.dumps({"target": str(one), **state(one)}), flush=True)


if __name__ == "__main__":
    main()
