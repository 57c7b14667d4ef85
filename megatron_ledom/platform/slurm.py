"""Read SLURM's information about this process and its job, from SLURM's variables and commands.

A variable that is empty or not a number, and variables that contradict each other, raise a UsageError with name, value and advice.
"""

import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_ledom.errors import UsageError

FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Step ids from this one on do not belong to srun but to the batch script or the shell of salloc."""
ANSWER_SECONDS = 30
Variables = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmStep:
    """A step of SLURM (the tasks that one srun started), and the number of this process in it."""

    job: int
    step: int
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    nodes: str
    """Nodes in SLURM's notation, such as `n[1-8]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayTask:
    """The task of this process in a job array of SLURM, and the numbers of the whole array."""

    task_id: int
    first: int
    last: int
    step: int
    count: int


def read_number(variables: Variables, name: str, advice: str, least: int = 0) -> int:
    """Return a variable as a whole number. Raises UsageError with `advice` if it is missing, no number or below `least`."""
    text = variables.get(name)
    if text is None:
        raise UsageError(f"{name} is not set; {advice}")
    if re.fullmatch("[0-9]{1,18}", text) is None or int(text) < least:
        raise UsageError(f"{name}={text!r} is not a whole number of at least {least}; {advice}")
    return int(text)


BY_SRUN = "srun sets it for every task: start the ranks with srun, and do not set or empty SLURM's variables by hand"
BY_SBATCH = "sbatch and salloc set it: do not set or empty SLURM's variables by hand"
BY_ARRAY = "sbatch --array sets it: do not set or empty SLURM's variables by hand, or give --task-id and --num-tasks"


def is_step(variables: Variables) -> bool:
    """Return True if srun started this process, rather than a batch script or a shell inside an allocation."""
    if "SLURM_STEP_ID" not in variables:
        return False
    return read_number(variables, "SLURM_STEP_ID", BY_SRUN) < FIRST_SPECIAL_STEP and "SLURM_PROCID" in variables


def read_step(variables: Variables) -> SlurmStep | None:
    """Return the step of this process, or None if srun did not start it."""
    if not is_step(variables):
        return None

    def of_step(name: str, of_job: str) -> str:
        """Return the name of the variable to read: a step may be smaller than its job."""
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
    counts_text = f"{counts_from}={variables[counts_from]}"
    advice = "start all ranks with one srun, and not with a heterogeneous one (no `:`)"
    if rank >= world_size:
        raise UsageError(f"SLURM_PROCID={rank} is not below {size_from}={world_size}; {advice}")
    if node >= len(counts):
        raise UsageError(f"SLURM_NODEID={node}, but {counts_text} has {len(counts)} nodes; {advice}")
    if local_rank >= counts[node]:
        raise UsageError(f"SLURM_LOCALID={local_rank}, but {counts_text} has {counts[node]} tasks on node {node}; {advice}")
    if sum(counts) != world_size:
        raise UsageError(f"{size_from}={world_size}, but {counts_text} makes {sum(counts)} tasks; {advice}")
    return SlurmStep(
        job=read_number(variables, "SLURM_JOB_ID", BY_SRUN),
        step=read_number(variables, "SLURM_STEP_ID", BY_SRUN),
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=counts[node],
        nodes=nodes,
    )


def nodes_of_job(variables: Variables) -> int:
    """Return the number of nodes of this SLURM job; 1 outside a job."""
    name = "SLURM_JOB_NUM_NODES"
    return read_number(variables, name, BY_SBATCH, least=1) if name in variables else 1


def tasks_of_job(variables: Variables) -> int:
    """Return the number of tasks of the job of a process that srun has not started; 1 outside SLURM.

    SLURM always sets SLURM_TASKS_PER_NODE, but SLURM_NTASKS only with --ntasks or a similar option. Raises UsageError if one
    variable is 1 and another is larger: a job has at least one task on each of its nodes.
    """
    sizes = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
    found_sizes = {name: read_number(variables, name, BY_SBATCH, least=1) for name in sizes if name in variables}
    nodes = max([1] + [found_sizes.pop(name) for name in sizes[2:] if name in found_sizes])
    if "SLURM_TASKS_PER_NODE" in variables:
        found_sizes["SLURM_TASKS_PER_NODE"] = sum(read_tasks_of_nodes(variables, "SLURM_TASKS_PER_NODE"))
    if "SLURM_NTASKS_PER_NODE" in variables:
        per_node = read_number(variables, "SLURM_NTASKS_PER_NODE", BY_SBATCH, least=1)
        if not found_sizes:  # with --ntasks it is an upper limit
            return nodes * per_node
    found_sizes["SLURM_JOB_NUM_NODES"] = nodes
    first, *others = found_sizes.items()
    larger = [f"{name} makes {number}" for name, number in others if number > first[1] == 1]
    if larger:
        raise UsageError(
            f"{first[0]}={first[1]}, but {', '.join(larger)}: it is unclear whether this process is the only rank; {BY_SBATCH}, or"
            " start it with srun; for one rank use `srun --ntasks=1`"
        )
    return first[1]


def refuse_rank_without_step(variables: Variables) -> None:
    """Raise UsageError if the variables of a task describe one of several processes, but srun did not start this one.

    In a batch script and in the shell of salloc, these variables, if set, are 0 and the number of the step's tasks is 1.
    """
    highest = {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NODEID": 0, "SLURM_STEP_NUM_TASKS": 1}
    for name, allowed in highest.items():
        if name in variables and read_number(variables, name, BY_SRUN, least=int("NUM" in name)) > allowed:
            lacks = "SLURM_STEP_ID" if "SLURM_PROCID" in variables else "SLURM_PROCID"
            found = f"{lacks}={variables[lacks]}" if lacks in variables else f"{lacks} is not set"
            raise UsageError(f"{name}={variables[name]}, but {found}, so no srun started this process; {BY_SRUN}")


def text_of(variables: Variables, name: str) -> str:
    """Return a variable of SLURM as it is, empty if it is not set."""
    return variables.get(name, "")


def gpus_of_node(variables: Variables) -> int:
    """Return the number of GPUs that the job has on this node; 0 outside a job, or in a job without GPUs."""
    return read_number(variables, "SLURM_GPUS_ON_NODE", BY_SBATCH) if "SLURM_GPUS_ON_NODE" in variables else 0


def array_task_id(variables: Variables) -> int | None:
    """Return this process's number in a job array, from --array; None outside an array."""
    return read_number(variables, "SLURM_ARRAY_TASK_ID", BY_ARRAY) if "SLURM_ARRAY_TASK_ID" in variables else None


def read_array(variables: Variables) -> ArrayTask | None:
    """Return this process's task of a job array; None outside an array. Task ids may have gaps."""
    task_id = array_task_id(variables)
    if task_id is None:
        return None

    def number(name: str, default: int, least: int = 0) -> int:
        """Return the variable, or the default if it is not set."""
        return read_number(variables, name, BY_ARRAY, least) if name in variables else default

    count = read_number(variables, "SLURM_ARRAY_TASK_COUNT", BY_ARRAY, least=1)
    first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1, least=1)
    last = number("SLURM_ARRAY_TASK_MAX", first + (count - 1) * step)
    return ArrayTask(task_id=task_id, first=first, last=last, step=step, count=count)


def job_id(variables: Variables) -> str | None:
    """Return the number of this process's job; None outside SLURM."""
    return str(read_number(variables, "SLURM_JOB_ID", BY_SBATCH)) if "SLURM_JOB_ID" in variables else None


def read_tasks_of_nodes(variables: Variables, name: str) -> list[int]:
    """Return the number of tasks on each node from the variable `name`."""
    if name not in variables:
        raise UsageError(f"{name} is not set; {BY_SRUN}")
    return tasks_of_nodes(variables[name], name)


def tasks_of_nodes(text: str, name: str = "SLURM_TASKS_PER_NODE") -> list[int]:
    """Return the number of tasks on each node of a step: `8(x2),4` is [8, 8, 4]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,6})\))?", part)
        if match is None:
            raise UsageError(f"{name}={text!r} is not of the form 8(x2),4; {BY_SRUN}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_node_address(nodes: str) -> str:
    """Return the address that SLURM uses for the first of `nodes` (`n[1-8]`); the node's name may not resolve."""
    hosts = _answer("scontrol", "show", "hostnames", nodes)
    host = hosts.split()[0] if hosts and hosts.split() else None
    described = host and _answer("scontrol", "show", "node", "--oneliner", host)
    address = re.search(r"\bNodeAddr=(\S+)", described or "")
    if address is None:
        raise UsageError(
            f"scontrol prints no address for the first node of {nodes}; set MASTER_ADDR to an address that every rank can reach"
        )
    return address[1]


def seconds_until_job_end() -> float | None:
    """Return the seconds until SLURM ends this job at its time limit; None outside SLURM or without a known limit.

    squeue has priority, because the limit of a running job can be changed; SLURM_JOB_END_TIME (SLURM 23 and later) is the
    limit at its start.
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


def job_states(jobs: Iterable[str], seconds: float = ANSWER_SECONDS) -> dict[str, str]:
    """Return job -> state, such as `PENDING` or `NODE_FAIL`, from squeue and, for older jobs, sacct. A held job is `REQUEUE_HOLD`.

    A job that neither knows is missing, and so are all if SLURM is not installed or each answer takes longer than `seconds`.
    """
    numbers = sorted({job for job in jobs if re.fullmatch("[0-9]{1,18}", job)}, key=int)
    states: dict[str, str] = {}
    squeue = ("squeue", "--noheader", "--states=all", "--format=%A|%T|%r")
    sacct = ("sacct", "--noheader", "--allocations", "--parsable2", "--format=JobIDRaw,State")
    for command in (squeue, sacct):
        left = [number for number in numbers if number not in states]
        answer = _answer(*command, f"--jobs={','.join(left)}", seconds=seconds) if left else None
        for line in (answer or "").splitlines():
            job, state, reason = (part.strip() for part in (*line.split("|", 2), "", "")[:3])
            if job in left and state:
                is_held = state == "PENDING" and "held" in reason.lower()  # JobHeldUser, launch failed requeued held
                states[job] = "REQUEUE_HOLD" if is_held else state.split()[0]  # sacct: CANCELLED by 1000
    return states


def _seconds(text: str) -> float | None:
    """Return the seconds of `1-02:03:04` or `03:04`; None for a word such as UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(number or 0) for number in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _answer(*command: str, seconds: float = ANSWER_SECONDS) -> str | None:
    """Return the output of a SLURM command; None if it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
