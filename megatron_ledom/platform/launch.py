"""Which of how many ranks this process is, and where they meet: by torchrun, by srun, or alone. torch is not imported."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ledom.errors import UsageError
from megatron_ledom.platform.slurm import first_node_address, is_step, tasks_of_nodes

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """This rank's place among those that were started with it."""

    rank: int
    world_size: int
    local_rank: int
    """Its number on this node, from 0."""
    local_world_size: int
    """Ranks on this node."""
    init_method: str | None
    """Where the ranks meet, for torch.distributed; None: there is one rank, which meets nobody."""


ALONE = Launch(rank=0, world_size=1, local_rank=0, local_world_size=1, init_method=None)


def read_launch() -> Launch:
    """The place that the launcher gives this process: torchrun's variables first, then those of SLURM's srun, else alone.

    MASTER_ADDR and MASTER_PORT, where set, override what follows from the SLURM job. Raises UsageError where a launcher was
    forgotten: inside a SLURM job of several tasks, but not started by srun.
    """
    variables = os.environ
    if "RANK" in variables:
        return _by_torchrun(variables)
    if is_step(variables):
        return _by_srun(variables)
    tasks = int(variables.get("SLURM_NTASKS", "1"))
    if tasks > 1:
        raise UsageError(
            f"SLURM job {variables.get('SLURM_JOB_ID')} has {tasks} tasks, but this process was not started by srun and would"
            " be the only rank; put `srun` before the command, or `srun --ntasks=1` for one rank"
        )
    return ALONE


def _by_torchrun(variables: Mapping[str, str]) -> Launch:
    missing = [name for name in TORCHRUN if name not in variables]
    if missing:
        raise UsageError(
            f"RANK={variables['RANK']} is set but {', '.join(missing)} not; torchrun sets all of {', '.join(TORCHRUN)}:"
            " unset RANK for a single process or for srun, or set the others"
        )
    numbers = {name.lower(): int(variables[name]) for name in TORCHRUN[:4]}
    return Launch(**numbers, init_method="env://")


def _by_srun(variables: Mapping[str, str]) -> Launch:
    def of_step(name: str, of_job: str) -> str:
        """A step may be smaller than its job."""
        return variables.get(f"SLURM_STEP_{name}") or variables[f"SLURM_{of_job}"]

    world_size = int(of_step("NUM_TASKS", "NTASKS"))
    here = tasks_of_nodes(of_step("TASKS_PER_NODE", "TASKS_PER_NODE"))[int(variables["SLURM_NODEID"])]
    meeting = None
    if world_size > 1:
        address = variables.get("MASTER_ADDR") or first_node_address(of_step("NODELIST", "JOB_NODELIST"))
        meeting = f"tcp://{address}:{variables.get('MASTER_PORT') or _port(variables)}"
    return Launch(
        rank=int(variables["SLURM_PROCID"]),
        world_size=world_size,
        local_rank=int(variables["SLURM_LOCALID"]),
        local_world_size=here,
        init_method=meeting,
    )


def _port(variables: Mapping[str, str]) -> int:
    """20000 to 29999, below the ports that systems give out; steps of one job and jobs that follow each other differ."""
    return 20000 + (10 * int(variables["SLURM_JOB_ID"]) + int(variables["SLURM_STEP_ID"]) % 10) % 10000
