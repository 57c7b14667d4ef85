"""Train several runs one after the other, as one rank: `python -m megatron_ledom.hardware_check.rank LAUNCH.json PARENT`."""

import os

from megatron_ledom import pretrain
from megatron_ledom.errors import run_command
from megatron_ledom.hardware_check.ranks import follow_the_parent, receive_work
from megatron_ledom.platform.launch import read_launch


def import_trainer() -> None:
    """Import what a run imports late, while other launches train."""
    import megatron_ledom.training.state
    import megatron_ledom.training.trainer  # noqa: F401


def train_each() -> int:
    """Train the runs of the launch until one fails; return its exit code.

    The work has `runs`: name, arguments of the training command, and port of the rendezvous. Every run has its own port,
    because the store of the last one may still be closing. Rank 0 appends the name of each finished run to
    `LAUNCH.json.finished`.
    """
    follow_the_parent()
    import_trainer()
    path, work = receive_work()
    for run in work["runs"]:
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
