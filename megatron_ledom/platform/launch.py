"""Rank of this process and rendezvous address of the run, from torchrun or srun, or a single rank. Does not import torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from megatron_ledom.errors import UsageError
from megatron_ledom.platform.slurm import (
    SlurmStep,
    first_node_address,
    job_id,
    read_number,
    read_step,
    refuse_rank_without_step,
    tasks_of_job,
)

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
BY_TORCHRUN = f"torchrun sets all of {', '.join(TORCHRUN)}: unset RANK for a single process or for srun, or set all of them"
FOREIGN = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables of unsupported launchers, which do not set RANK: mpirun, or scripts that set some of torchrun's variables."""
TOP_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Number of this rank, sizes of the run and its nodes, and the rendezvous address."""

    rank: int
    world_size: int
    local_rank: int
    """Number of this rank on its node, from 0."""
    local_world_size: int
    """Number of ranks on this node."""
    init_method: str | None
    """Rendezvous address for torch.distributed; None for a single rank."""
    port_offset: int = 0
    """Added to the port if rank 0 has the store: process groups that follow each other in one launch need different ports,
    because the last store may still be closing."""

    def address(self) -> tuple[str, int]:
        """Return host and port of the store, which rank 0 or torchrun runs for the ranks."""
        if self.init_method == "env://":
            host, port = _rendezvous_address(os.environ)
        else:
            parts = urlsplit(self.init_method or "")
            host, port = str(parts.hostname), int(parts.port or 0)
        return host, port if torchrun_has_store() else port + self.port_offset


def torchrun_has_store() -> bool:
    """Return True if torchrun's agent runs the store, which stays for process groups that follow each other."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


ALONE = Launch(rank=0, world_size=1, local_rank=0, local_world_size=1, init_method=None)


def read_launch() -> Launch:
    """Return the launch of this process from the variables of torchrun or else of srun; a single rank without either.

    MASTER_ADDR and MASTER_PORT override the address that follows from the SLURM job. Raises UsageError if srun is missing
    in a SLURM job of several tasks, if the launcher is not supported, or if SLURM's variables contradict each other.
    """
    variables = os.environ
    if "RANK" in variables:
        return _by_torchrun(variables)
    step = read_step(variables)
    if step is not None:
        return _by_srun(step, variables)
    job, tasks = job_id(variables), tasks_of_job(variables)
    if tasks > 1:
        raise UsageError(
            f"SLURM job {job} has {tasks} tasks, but this process was not started by srun and would"
            " be the only rank; put `srun` before the command, or `srun --ntasks=1` for one rank"
        )
    refuse_rank_without_step(variables)
    for name in FOREIGN:
        if variables.get(name, "1") != "1":
            raise UsageError(
                f"{name}={variables[name]!r}, but RANK is not set and srun did not start this process, which would be the only"
                f" rank; start the ranks with torchrun or srun, or unset {name} for one rank"
            )
    return ALONE


def _by_torchrun(variables: Mapping[str, str]) -> Launch:
    missing = [name for name in TORCHRUN if name not in variables]
    if missing:
        raise UsageError(
            f"RANK={variables['RANK']} is set but {', '.join(missing)} not; torchrun sets all of {', '.join(TORCHRUN)}:"
            " unset RANK for a single process or for srun, or set the others"
        )
    numbers = {name: read_number(variables, name, BY_TORCHRUN, int("SIZE" in name)) for name in TORCHRUN[:4]}
    for low, high, least in (
        ("RANK", "WORLD_SIZE", 1),
        ("LOCAL_RANK", "LOCAL_WORLD_SIZE", 1),
        ("LOCAL_WORLD_SIZE", "WORLD_SIZE", 0),
    ):
        if numbers[low] + least > numbers[high]:
            relation = "below" if least else "at most"
            raise UsageError(f"{low}={numbers[low]} is not {relation} {high}={numbers[high]}; {BY_TORCHRUN}")
    _rendezvous_address(variables)
    return Launch(**{name.lower(): number for name, number in numbers.items()}, init_method="env://")


def _rendezvous_address(variables: Mapping[str, str]) -> tuple[str, int]:
    """Return host and port from MASTER_ADDR and MASTER_PORT."""
    return _address_given(variables), _port_given(variables)


def _address_given(variables: Mapping[str, str]) -> str:
    address = variables.get("MASTER_ADDR", "")
    if not address or any(letter.isspace() or letter in "/@[]" for letter in address):
        raise UsageError(
            f"MASTER_ADDR={address!r} is not a host name; set it to the name or address of rank 0's node, or unset it"
        )
    return address


def _port_given(variables: Mapping[str, str]) -> int:
    port = read_number(variables, "MASTER_PORT", "set it to a free port of rank 0's node, or unset it")
    if port > TOP_PORT:
        raise UsageError(f"MASTER_PORT={port} is above {TOP_PORT}; set it to a free port of rank 0's node, or unset it")
    return port


def _by_srun(step: SlurmStep, variables: Mapping[str, str]) -> Launch:
    init_method = None
    if step.world_size > 1:
        address = _address_given(variables) if "MASTER_ADDR" in variables else first_node_address(step.nodes)
        port = _port_given(variables) if "MASTER_PORT" in variables else _port(step)
        init_method = f"tcp://{f'[{address}]' if ':' in address else address}:{port}"
    return Launch(
        rank=step.rank,
        world_size=step.world_size,
        local_rank=step.local_rank,
        local_world_size=step.local_world_size,
        init_method=init_method,
    )


def _port(step: SlurmStep) -> int:
    """Return a port from 20000 to 29999, below the range that systems assign; it differs between steps and successive jobs."""
    return 20000 + (10 * step.job + step.step % 10) % 10000
