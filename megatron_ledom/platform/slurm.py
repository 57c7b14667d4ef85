"""Everything that SLURM says of this process and of its job: its variables, all read here, and the answers of its own commands.

A variable that is empty or no number, and variables that contradict each other, raise a UsageError with name, value and remedy.
"""

import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ledom.errors import UsageError

FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Step ids from here on are no srun: the batch script, the shell of salloc."""
ANSWER_SECONDS = 30
Variables = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmStep:
    """This process's place among the tasks that one srun has started."""

    job: int
    step: int
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    nodes: str
    """As SLURM writes them: `n[1-8]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayTask:
    """This process's place in a job array."""

    task_id: int
    first: int
    last: int
    step: int
    count: int


def read_number(variables: Variables, name: str, advice: str, least: int = 0) -> int:
    """A variable that has to be there and to be a whole number from `least` on. Raises UsageError with `advice`."""
    text = variables.get(name)
    if text is None:
        raise UsageError(f"{name} is not set; {advice}")
    if re.fullmatch("[0-9]{1,18}", text) is None or int(text) < least:
        raise UsageError(f"{name}={text!r} is not a whole number from {least} on; {advice}")
    return int(text)


BY_SRUN = "srun sets it for every task: start the ranks with srun, and do not set or empty SLURM's variables by hand"
BY_SBATCH = "sbatch and salloc set it: do not set or empty SLURM's variables by hand"
BY_ARRAY = "sbatch --array sets it: do not set or empty SLURM's variables by hand, or give --task-id and --num-tasks"


def is_step(variables: Variables) -> bool:
    """Whether srun started this process, rather than a batch script or a shell inside an allocation."""
    if "SLURM_STEP_ID" not in variables:
        return False
    return read_number(variables, "SLURM_STEP_ID", BY_SRUN) < FIRST_SPECIAL_STEP and "SLURM_PROCID" in variables


def read_step(variables: Variables) -> SlurmStep | None:
    """The place that srun gives this process; None when it was not started by srun."""
    if not is_step(variables):
        return None

    def of_step(name: str, of_job: str) -> str:
        """The variable to read: a step may be smaller than its job."""
        return f"SLURM_STEP_{name}" if f"SLURM_STEP_{name}" in variables else f"SLURM_{of_job}"

    size_from, counts_from = of_step("NUM_TASKS", "NTASKS"), of_step("TASKS_PER_NODE", "TASKS_PER_NODE")
    world_size = read_number(variables, size_from, BY_SRUN, least=1)
    rank = read_number(variables, "SLURM_PROCID", BY_SRUN)
    node = read_number(variables, "SLURM_NODEID", BY_SRUN)
    local_rank = read_number(variables, "SLURM_LOCALID", BY_SRUN)
    counts = read_tasks_of_nodes(variables, counts_from)
    nodes_from = of_step("NODELIST", "JOB_NODELIST")
    nodes = variables.get(nodes_from, "")
    if world_size > 1 and not nodes and "MASTER_ADDR" not in variables:
        raise UsageError(f"{nodes_from} is empty or not set; {BY_SRUN}, or set MASTER_ADDR to the node of the first rank")
    told = f"{counts_from}={variables[counts_from]}"
    advice = "one step of equal tasks is needed: start all ranks with one srun, which is no heterogeneous one (no `:`)"
    if rank >= world_size:
        raise UsageError(f"SLURM_PROCID={rank} is not below {size_from}={world_size}; {advice}")
    if node >= len(counts):
        raise UsageError(f"SLURM_NODEID={node}, but {told} is of {len(counts)} nodes; {advice}")
    if local_rank >= counts[node]:
        raise UsageError(f"SLURM_LOCALID={local_rank}, but {told} has {counts[node]} tasks on node {node}; {advice}")
    if sum(counts) != world_size:
        raise UsageError(f"{size_from}={world_size}, but {told} makes {sum(counts)} tasks; {advice}")
    return SlurmStep(
        job=read_number(variables, "SLURM_JOB_ID", BY_SRUN),
        step=read_number(variables, "SLURM_STEP_ID", BY_SRUN),
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=counts[node],
        nodes=nodes,
    )


def tasks_of_job(variables: Variables) -> int:
    """Tasks of the job of a process that srun has not started; 1 outside of SLURM.

    SLURM_NTASKS is set only where --ntasks or the like was given in a way that SLURM passes on; the tasks of nodes always. Raises
    UsageError where one variable says 1 and another says more: a job has a task on each of its nodes at least.
    """
    sizes = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
    told = {name: read_number(variables, name, BY_SBATCH, least=1) for name in sizes if name in variables}
    nodes = max([1] + [told.pop(name) for name in sizes[2:] if name in told])
    if "SLURM_TASKS_PER_NODE" in variables:
        told["SLURM_TASKS_PER_NODE"] = sum(read_tasks_of_nodes(variables, "SLURM_TASKS_PER_NODE"))
    if "SLURM_NTASKS_PER_NODE" in variables:
        per_node = read_number(variables, "SLURM_NTASKS_PER_NODE", BY_SBATCH, least=1)
        if not told:  # beside --ntasks it is an upper limit
            return nodes * per_node
    told["SLURM_JOB_NUM_NODES"] = nodes
    first, *others = told.items()
    larger = [f"{name} makes {number}" for name, number in others if number > first[1] == 1]
    if larger:
        raise UsageError(
            f"{first[0]}={first[1]}, but {', '.join(larger)}: it is not clear whether this process is the only rank; {BY_SBATCH}, or"
            " start it with srun, one rank with `srun --ntasks=1`"
        )
    return first[1]


def refuse_rank_without_step(variables: Variables) -> None:
    """Refuse a process that is one of several by the variables of a task, though no step of srun started it.

    In a batch script and in the shell of salloc these are 0, and the step's tasks 1, where they are set.
    """
    highest = {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NODEID": 0, "SLURM_STEP_NUM_TASKS": 1}
    for name, allowed in highest.items():
        if name in variables and read_number(variables, name, BY_SRUN, least=int("NUM" in name)) > allowed:
            lacks = "SLURM_STEP_ID" if "SLURM_PROCID" in variables else "SLURM_PROCID"
            found = f"{lacks}={variables[lacks]}" if lacks in variables else f"{lacks} is not set"
            raise UsageError(f"{name}={variables[name]}, but {found}, so no srun started this process; {BY_SRUN}")


def array_task_id(variables: Variables) -> int | None:
    """This process's number in a job array, as --array gave it; None outside of one."""
    return read_number(variables, "SLURM_ARRAY_TASK_ID", BY_ARRAY) if "SLURM_ARRAY_TASK_ID" in variables else None


def read_array(variables: Variables) -> ArrayTask | None:
    """This process's place in a job array; None outside of one. Its ids may have gaps."""
    task_id = array_task_id(variables)
    if task_id is None:
        return None

    def number(name: str, default: int, least: int = 0) -> int:
        """The variable, or its default where it is not set."""
        return read_number(variables, name, BY_ARRAY, least) if name in variables else default

    count = read_number(variables, "SLURM_ARRAY_TASK_COUNT", BY_ARRAY, least=1)
    first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1, least=1)
    last = number("SLURM_ARRAY_TASK_MAX", first + (count - 1) * step)
    return ArrayTask(task_id=task_id, first=first, last=last, step=step, count=count)


def job_id(variables: Variables) -> str | None:
    """The number of the job that this process runs in; None outside of SLURM."""
    return str(read_number(variables, "SLURM_JOB_ID", BY_SBATCH)) if "SLURM_JOB_ID" in variables else None


def read_tasks_of_nodes(variables: Variables, name: str) -> list[int]:
    """Tasks on each node, by the variable `name`."""
    if name not in variables:
        raise UsageError(f"{name} is not set; {BY_SRUN}")
    return tasks_of_nodes(variables[name], name)


def tasks_of_nodes(text: str, name: str = "SLURM_TASKS_PER_NODE") -> list[int]:
    """Tasks on each node of a step: `8(x2),4` is [8, 8, 4]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,6})\))?", part)
        if match is None:
            raise UsageError(f"{name}={text!r} is not of the form 8(x2),4; {BY_SRUN}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_node_address(nodes: str) -> str:
    """The address by which SLURM itself reaches the first of `nodes` (`n[1-8]`); its name need not be one that resolves."""
    hosts = _answer("scontrol", "show", "hostnames", nodes)
    host = hosts.split()[0] if hosts and hosts.split() else None
    described = host and _answer("scontrol", "show", "node", "--oneliner", host)
    address = re.search(r"\bNodeAddr=(\S+)", described or "")
    if address is None:
        raise UsageError(
            f"scontrol does not give the address of the first node of {nodes}; set MASTER_ADDR to one that every rank reaches"
        )
    return address[1]


def seconds_until_job_end() -> float | None:
    """Seconds until SLURM ends this job at its time limit; None outside SLURM, without a limit, or if nobody knows.

    squeue is asked first, since a limit can be changed while the job runs; SLURM_JOB_END_TIME (not before SLURM 23) is
    what was true at its start.
    """
    job = job_id(os.environ)
    if job is None:
        return None
    answer = _answer("squeue", "--noheader", f"--jobs={job}", "--format=%A %L") or ""
    left = dict(line.split(maxsplit=1) for line in answer.splitlines() if len(line.split()) == 2).get(job)
    if left is not None:
        return _seconds(left)
    if "SLURM_JOB_END_TIME" not in os.environ:
        return None
    return read_number(os.environ, "SLURM_JOB_END_TIME", BY_SBATCH) - time.time()


def _seconds(text: str) -> float | None:
    """`1-02:03:04`, `03:04`; None for a word such as UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(number or 0) for number in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _answer(*command: str) -> str | None:
    """What a command of SLURM prints; None where it is missing, fails or does not answer in time."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=ANSWER_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
