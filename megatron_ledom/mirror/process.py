"""The process that copies checkpoints, started by `Uploader`: `python -m megatron_ledom.mirror.process PARENT`.

It reads one JSON object per line from stdin, first the settings and then the checkpoints to copy, and answers each on stdout. It ends
with its parent. It is a program of its own, not a fork or a thread: the clients of object stores have threads, and take Python's lock.
"""

import json
import logging
import os
import sys
import time
from typing import Any

from megatron_ledom.checkpoint.folder import checkpoint_name
from megatron_ledom.config.schema import CheckpointConfig
from megatron_ledom.data.readers.remote import described, root_of
from megatron_ledom.errors import MismatchError
from megatron_ledom.mirror.contents import Claim
from megatron_ledom.mirror.copying import Copier, DamagedCheckpoint
from megatron_ledom.mirror.store import MirrorStore
from megatron_ledom.platform.processes import die_with_the_parent, leave_signals_to_the_parent

NICENESS = 10
"""The training process goes first."""


def main() -> None:
    """Serve until stdin closes."""
    die_with_the_parent(int(sys.argv[1]))
    leave_signals_to_the_parent()
    os.nice(NICENESS)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library that prints must not disturb the answers
    form = "%(asctime)s [mirror] %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, datefmt="%H:%M:%S", stream=sys.stderr)
    settings = json.loads(sys.stdin.readline())
    copier: Copier | None = None
    for line in sys.stdin:
        try:
            copier = copier or _copier(settings)
            answer = _copy(copier, json.loads(line))
        except MismatchError as error:
            answer = {"refused": str(error)}
        except DamagedCheckpoint as error:
            answer = {"damaged": str(error)}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {described(root_of(error))}"}
        print(json.dumps(answer), file=answers, flush=True)


def _copier(settings: dict[str, Any]) -> Copier:
    return Copier(MirrorStore(settings["address"]), Claim(**settings["claim"]), CheckpointConfig(**settings["checkpoint"]))


def _copy(copier: Copier, task: dict[str, Any]) -> dict[str, Any]:
    """Copy a checkpoint and delete outdated ones. Returns what was done."""
    started, name = time.monotonic(), checkpoint_name(task["iteration"])
    copier.open(task["local_latest"], has_taken=task["has_taken"])
    num_bytes = copier.copy(name)
    answer = {"done": name, "bytes": num_bytes, "seconds": time.monotonic() - started}
    try:
        answer["deleted"] = copier.delete_outdated(task["replayed"], task["waiting"])
    except Exception as error:
        answer["not_deleted"] = described(root_of(error))  # the copy itself is whole; the next one tries again
    return answer


if __name__ == "__main__":
    main()
