"""What SLURM says of this process and of its job: its variables, and the answers of its own commands."""

import os
import re
import subprocess
import time
from collections.abc import Mapping

from megatron_ledom.errors import UsageError

FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Step ids from here on are no srun: the batch script, the shell of salloc."""
ANSWER_SECONDS = 30


def is_step(variables: Mapping[str, str]) -> bool:
    """Whether srun started this process, rather than a batch script or a shell inside an allocation."""
    return "SLURM_PROCID" in variables and int(variables.get("SLURM_STEP_ID", FIRST_SPECIAL_STEP)) < FIRST_SPECIAL_STEP


def tasks_of_nodes(text: str) -> list[int]:
    """Tasks on each node of a step: `8(x2),4` is [8, 8, 4]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UsageError(f"SLURM_TASKS_PER_NODE={text} is not of the form 8(x2),4; start the ranks with srun")
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
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    answer = _answer("squeue", "--noheader", f"--jobs={job}", "--format=%A %L") or ""
    left = dict(line.split(maxsplit=1) for line in answer.splitlines() if len(line.split()) == 2).get(job)
    if left is not None:
        return _seconds(left)
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(end) - time.time() if end.isdecimal() else None


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
