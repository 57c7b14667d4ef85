"""Check a node as one of its ranks: `python -m megatron_ledom.hardware_check.node_rank OPTIONS`, OPTIONS as JSON.

Each rank prints a line of JSON after MARK at each step that it has reached, so that the reader of all lines knows where each rank
stopped. A rank that is late reports it and ends; one that says nothing is stopped, or its node is.
"""

import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from megatron_ledom.hardware_check.node_facts import facts_of_folders, facts_of_kernel_log
from megatron_ledom.hardware_check.node_gpus import facts_of_gpus
from megatron_ledom.platform.launch import Launch, read_launch

MARK = "LEDOM-NODE "
STARTED, CONNECTED, NODE, ALL = "started", "connected", "node", "all"
STAGES = (STARTED, CONNECTED, NODE, ALL)
"""Steps of a rank: Python runs, the store answers, all-reduces of the node end, and all-reduces of all nodes."""
NUM_FLOATS = 2**20
LATE = 3


def tell(rank: int, **facts: Any) -> None:
    """Print facts of a rank in one write, which lines of other ranks do not interrupt."""
    line = json.dumps({"rank": rank, "node": node_name(), **facts})
    os.write(1, f"{MARK}{line}\n".encode())


def node_name() -> str:
    """Return the name of this node, which SLURM uses."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def main() -> int:
    """Check this node, as its first rank, and the connections of this rank; return an exit code."""
    options = json.loads(sys.argv[1])
    launch = read_launch()
    tell(launch.rank, stage=STARTED, time=time.time())
    timer = threading.Timer(options["seconds"], _late, (launch.rank,))
    timer.daemon = True
    timer.start()
    if launch.local_rank == 0:
        gpus = options["gpus"]
        facts = facts_of_gpus(gpus)
        facts.add(facts_of_folders(options["folders"], options["free_gib"]))
        if gpus:
            facts.add(facts_of_kernel_log(datetime.now(UTC)))
        tell(launch.rank, **asdict(facts))
    if options["all_reduce_seconds"] and launch.world_size > 1:
        _all_reduce(launch, options)
    timer.cancel()
    return 0


def _late(rank: int) -> None:
    tell(rank, late=True)
    os._exit(LATE)


def _all_reduce(launch: Launch, options: dict[str, Any]) -> None:
    """Connect this rank, and reduce over its node and over all nodes. GPUs are not yet run on hardware."""
    import torch
    import torch.distributed as dist

    timeout = timedelta(seconds=options["seconds"])
    host, port = launch.address()
    is_host = launch.rank == 0
    store = dist.TCPStore(host, port, is_master=is_host, timeout=timeout, wait_for_workers=False)  # type: ignore[attr-defined]
    tell(launch.rank, stage=CONNECTED)
    store.set(f"node/{launch.rank}", node_name())
    nodes = [store.get(f"node/{rank}").decode() for rank in range(launch.world_size)]
    device = torch.device("cpu")
    if options["gpus"]:
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if options["gpus"] else "gloo"
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
    groups = {name: dist.new_group([rank for rank, one in enumerate(nodes) if one == name]) for name in dict.fromkeys(nodes)}
    for stage, group in ((NODE, groups[node_name()]), (ALL, None)):
        facts = _reduce_for(options["all_reduce_seconds"] / 2, group, launch.rank, device)
        tell(launch.rank, stage=stage, **facts)
    dist.destroy_process_group()


def _reduce_for(seconds: float, group: Any, rank: int, device: Any) -> dict[str, Any]:
    """Repeat an all-reduce of 4 MiB for about `seconds` on all ranks of a group; return its speed and if every sum is right."""
    import torch
    import torch.distributed as dist

    ranks = dist.get_process_group_ranks(group) if group is not None else list(range(dist.get_world_size()))
    expected, begin, count, is_right = float(sum(one + 1 for one in ranks)), time.monotonic(), 0, True
    while True:
        values = torch.full((NUM_FLOATS,), float(rank + 1), device=device)
        dist.all_reduce(values, group=group)
        is_right &= bool((values == expected).all())
        count += 1
        continues = torch.tensor(float(time.monotonic() - begin < seconds), device=device)
        dist.all_reduce(continues, op=dist.ReduceOp.MIN, group=group)
        if not continues.item():
            return {"is_right": is_right, "gib_per_second": count * 4 * NUM_FLOATS / 2**30 / (time.monotonic() - begin)}


if __name__ == "__main__":
    sys.exit(main())
