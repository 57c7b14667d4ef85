"""Check the nodes of a job in seconds and name the bad ones: `ledom check-nodes`.

One process, in the batch script, starts a rank for each task of the job and reads what each of them says (node_rank.py).
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_ledom.errors import UsageError
from megatron_ledom.hardware_check.node_facts import run_for
from megatron_ledom.hardware_check.node_rank import CONNECTED, MARK, NODE, STAGES, STARTED, node_name
from megatron_ledom.platform.slurm import BY_SBATCH, nodes_of_job, read_step, tasks_of_job, tasks_of_nodes, text_of
from megatron_ledom.storage.files import write_json
from megatron_ledom.storage.locks import output_file_lock

GRACE_SECONDS = 3.0
"""Time after the limit in which late ranks report it."""
SCONTROL_SECONDS = 30.0
MOST_NAMES = 3
SLOW = 0.5
"""A node whose all-reduces reach less than this part of the median is reported as slow; it is not bad."""
OUTSIDE_NODES = "scontrol does not list the nodes of the job"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRequest:
    """Options of `ledom check-nodes`."""

    gpus: int
    """GPUs that the job uses on each node."""
    folders: Sequence[str] = ()
    free_gib: float = 1.0
    seconds: float = 60.0
    all_reduce_seconds: float = 2.0
    max_skew_seconds: float = 5.0
    python: str = sys.executable
    """The program that runs the ranks, such as one that enters a container."""
    srun_options: str = ""
    """Further options of srun, as a shell would read them, such as those of a container."""


@dataclass(slots=True)
class Health:
    """Result: the problems of each node, and what is wrong without a node to blame."""

    nodes: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    unexplained: str = ""
    seconds: float = 0.0

    @property
    def bad(self) -> list[str]:
        """The names of the nodes with problems."""
        return [node for node, problems in self.nodes.items() if problems]

    def to_json(self) -> dict[str, Any]:
        """Return the result for a program."""
        return {"bad": self.bad, **asdict(self)}


Lines = list[tuple[float, Mapping[str, Any]]]
"""Time of this process at which a line arrived, and its facts."""


def check_node_health(request: NodeRequest) -> Health:
    """Start the ranks on all nodes of this job (outside SLURM: here), and judge what they say before the time limit."""
    if read_step(os.environ) is not None:
        raise UsageError("ledom check-nodes was started by srun; start it in the batch script itself: it starts its ranks")
    begin = time.monotonic()
    nodes = job_nodes()
    for node, ranks in nodes.items():
        if 0 < request.gpus < ranks:
            raise UsageError(
                f"{node} has {ranks} tasks but {request.gpus} GPUs, and each task needs a GPU of its own;"
                f" give --ntasks-per-node={request.gpus} to sbatch, or --gpus {ranks} if it has them"
            )
    lines, ended = _run(request)
    health = judge(request, nodes, lines)
    if not health.bad and not health.unexplained and ended:
        health.unexplained = ended
    health.seconds = round(time.monotonic() - begin, 1)
    return health


def job_nodes() -> dict[str, int]:
    """Return the number of ranks on each node of the job, in the order of the ranks."""
    if nodes_of_job(os.environ) == 1 and "SLURM_JOB_NODELIST" not in os.environ:
        return {node_name(): 1}
    nodelist = text_of(os.environ, "SLURM_JOB_NODELIST")
    shown = run_for(SCONTROL_SECONDS, ["scontrol", "show", "hostnames", nodelist]).out.split()
    per_node = text_of(os.environ, "SLURM_TASKS_PER_NODE")
    counts = tasks_of_nodes(per_node) if per_node else [1] * len(shown)
    if not shown or len(counts) != len(shown):
        raise UsageError(f"{OUTSIDE_NODES} (SLURM_JOB_NODELIST={nodelist!r}, SLURM_TASKS_PER_NODE={per_node!r}); {BY_SBATCH}")
    return dict(zip(shown, counts, strict=True))


def _run(request: NodeRequest) -> tuple[Lines, str]:
    """Return the ranks' lines, and a sentence if the ranks could not all be started."""
    options = asdict(request) | {"folders": list(request.folders)}
    command = [request.python, "-m", "megatron_ledom.hardware_check.node_rank", json.dumps(options)]
    if request.srun_options and "SLURM_JOB_ID" not in os.environ:
        raise UsageError("--srun-options is given, but this is no SLURM job, where the ranks run without srun; leave it out")
    if "SLURM_JOB_ID" in os.environ:
        if shutil.which("srun") is None:
            raise UsageError("there is no srun in this job; load SLURM's commands, or start the check outside the container")
        cpus = text_of(os.environ, "SLURM_CPUS_PER_TASK") or "1"
        ranks = tasks_of_job(os.environ)
        srun = ["srun", f"--ntasks={ranks}", f"--cpus-per-task={cpus}", "--kill-on-bad-exit=0", "--wait=0"]
        command = [*srun, *shlex.split(request.srun_options), *command]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    end, lines, rest = time.monotonic() + request.seconds + GRACE_SECONDS, Lines(), b""
    try:
        while time.monotonic() < end:
            code = process.poll()  # before reading: what it printed at its end is still read
            rest += process.stdout.read() or b""
            *whole, rest = rest.split(b"\n")
            lines += [(time.time(), json.loads(line[len(MARK) :])) for line in whole if line.startswith(MARK.encode())]
            if code is not None:
                return lines, f"the ranks ended with the exit code {code}" if code else ""
            time.sleep(0.05)
        return lines, f"the ranks did not end in {request.seconds:g} s"
    finally:
        if process.poll() is None:
            process.kill() if command[0] != "srun" else process.terminate()
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def judge(request: NodeRequest, nodes: Mapping[str, int], lines: Lines) -> Health:
    """Return the problems of each node from the lines of its ranks."""
    health = Health({node: [] for node in nodes})
    places = [node for node, count in nodes.items() for _ in range(count)]
    stage, late, speeds = dict.fromkeys(range(len(places)), -1), set(), {}
    for arrived, facts in lines:
        rank, found = facts["rank"], health.nodes.setdefault(facts["node"], [])
        found += facts.get("problems", ())
        if "late" in facts:
            late.add(rank)
        if "stage" in facts:
            stage[rank] = STAGES.index(facts["stage"])
        if facts.get("is_right") is False:
            sums = f"an all-reduce over {'the node' if facts['stage'] == NODE else 'all nodes'}"
            if facts["stage"] == NODE:
                found.append(f"rank {rank}: {sums} has a wrong sum")
            else:
                health.unexplained = f"{sums} has a wrong sum, and no node alone"
        if facts.get("stage") == NODE:
            speeds[facts["node"]] = facts["gib_per_second"]
        if abs(skew := facts.get("time", arrived) - arrived) > request.max_skew_seconds:
            found.append(f"its clock differs by {skew:+.1f} s from this node's")
    for node, problems in health.nodes.items():
        health.nodes[node] = list(dict.fromkeys(problems))
    is_reduced = bool(request.all_reduce_seconds) and len(places) > 1
    _add_unfinished(health, places, stage, late, len(STAGES) - 1 if is_reduced else 0)
    unchecked = {facts["node"] for _, facts in lines} - {facts["node"] for _, facts in lines if "problems" in facts}
    for node in sorted(unchecked - set(health.bad)):
        health.nodes[node].append("did not end the checks of its GPUs and folders")
    _add_warnings(health, lines)
    median = sorted(speeds.values())[len(speeds) // 2] if speeds else 0.0
    health.warnings += [
        f"{node}: all-reduces of the node reach {speed:.2f} GiB/s, the median is {median:.2f}"
        for node, speed in speeds.items()
        if speed < SLOW * median
    ]
    return health


def _add_warnings(health: Health, lines: Lines) -> None:
    """Add the warnings of the nodes, one for all nodes that say the same, and folders that only some of them have."""
    said: dict[str, list[str]] = defaultdict(list)
    checked = [facts for _, facts in lines if "absent" in facts]
    absent = Counter(folder for facts in checked for folder in facts["absent"])
    for _, facts in lines:
        for text in dict.fromkeys(facts.get("warnings", ())):
            said[text].append(facts["node"])
        for folder in facts.get("absent", ()):
            if absent[folder] < len(checked):
                said[f"{folder} does not exist there, but on other nodes: its file system may not be mounted"].append(
                    facts["node"]
                )
    for text, nodes in said.items():
        more = f" and {len(nodes) - MOST_NAMES} more nodes" if len(nodes) > MOST_NAMES else ""
        health.warnings.append(f"{', '.join(nodes[:MOST_NAMES])}{more}: {text}")


def _add_unfinished(health: Health, places: Sequence[str], stage: Mapping[int, int], late: set[int], last: int) -> None:
    """Blame the nodes of the ranks that came least far, unless all ranks came equally far."""
    unfinished = [rank for rank in stage if stage[rank] < last]
    silent = [rank for rank in unfinished if rank not in late and late]
    least = min((stage[rank] for rank in unfinished), default=last)
    blamed = silent or [rank for rank in unfinished if stage[rank] == least]
    if not blamed:
        return
    if len(blamed) == len(places) and len(set(places)) > 1:
        reached = STAGES[least] if least >= 0 else "nothing"
        health.unexplained = health.unexplained or f"no rank came further than {reached!r}, so no node can be singled out"
        return
    words = {
        -1: "did not start in time",
        STAGES.index(STARTED): "cannot connect to the store of rank 0",
        STAGES.index(CONNECTED): "did not end the all-reduces of its node",
        STAGES.index(NODE): "did not end the all-reduces over all nodes",
    }
    by_node = defaultdict(list)
    for rank in blamed:
        by_node[places[rank]].append(rank)
    for node, ranks in by_node.items():
        how = "does not answer any more" if set(ranks) <= set(silent) else words[least]
        health.nodes[node].append(f"rank {', '.join(map(str, ranks))} {how}")


def write_result(health: Health, path: str) -> None:
    """Write the result as JSON, under the lock of the file."""
    with output_file_lock(path, "--json"):
        write_json(path, health.to_json())


def describe(health: Health) -> str:
    """Return the result for people: a line for each problem, and one for all."""
    lines = [f"bad node {node}: {problem}" for node, problems in health.nodes.items() for problem in problems]
    lines += [f"warning: {text}" for text in health.warnings]
    lines += [f"not explained: {health.unexplained}"] if health.unexplained else []
    counts = Counter(bool(problems) for problems in health.nodes.values())
    return (
        "\n".join([*lines, f"{counts[False]} of {len(health.nodes)} nodes are healthy, checked in {health.seconds:g} s"]) + "\n"
    )
