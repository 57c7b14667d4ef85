"""Train several runs one after the other, as one rank: `python -m megatron_ledom.hardware_check.rank LAUNCH.json`.

Starting Python and importing megatron-core takes several seconds, so the runs of one number of ranks share the processes.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_ledom import pretrain
from megatron_ledom.errors import run_command
from megatron_ledom.platform.launch import read_launch
from megatron_ledom.platform.processes import die_with_the_parent


def train_each() -> int:
    """Train the runs of the file that the command line names, until one fails; return its exit code.

    The file has `parent`, the id of the process that started the ranks, and `runs`: name, arguments of the training command,
    and port of the rendezvous. Every run has its own port, because the store of the last one may still be closing. Rank 0
    appends the name of each finished run to `LAUNCH.json.finished`.
    """
    path = Path(sys.argv[1])
    launch: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    die_with_the_parent(launch["parent"])
    for run in launch["runs"]:
        os.environ.update(MASTER_PORT=str(run["port"]))
        code = pretrain.main(run["arguments"])
        if code:
            return code
        if read_launch().rank == 0:
            with open(f"{path}.finished", "a", encoding="utf-8") as finished:
                finished.write(run["name"] + "\n")
    return 0


if __name__ == "__main__":
    run_command(train_each)
