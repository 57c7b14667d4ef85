"""Verdicts of ledom check-nodes from the lines of ranks."""

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.cli.main import run
from megatron_ledom.errors import UsageError
from megatron_ledom.hardware_check.node_health import Health, NodeRequest, check_node_health, describe, judge

REACHED = ("started", "connected", "node", "all")


def health(stages: list[int], late: tuple[int, ...] = (), **facts: Any) -> Health:
    """Judge four ranks on two nodes of two; rank r has reached the first stages[r] steps. facts: of rank 3's step `node`."""
    lines: list[tuple[float, dict[str, Any]]] = []
    for rank, reached in enumerate(stages):
        about = {"rank": rank, "node": f"n{rank // 2 + 1}"}
        if reached and rank % 2 == 0:
            lines.append((100.0, {**about, "problems": []}))
        for stage in REACHED[:reached]:
            more = {"is_right": True, "gib_per_second": 8.0} if stage in ("node", "all") else {"time": 100.0}
            lines.append((100.1, {**about, "stage": stage, **more, **(facts if rank == 3 and stage == "node" else {})}))
        if rank in late:
            lines.append((130.0, {**about, "late": True}))
    return judge(NodeRequest(gpus=0), {"n1": 2, "n2": 2}, lines)


@pytest.mark.parametrize(
    ("stages", "late", "bad", "says"),
    [
        ([4, 4, 4, 4], (), [], ""),
        ([1, 1, 1, 0], (0, 1, 2), ["n2"], "rank 3 does not answer any more"),
        ([2, 2, 1, 1], (0, 1, 2, 3), ["n2"], "rank 2, 3 cannot connect to the store of rank 0"),
        ([3, 3, 2, 2], (0, 1, 2, 3), ["n2"], "rank 2, 3 did not end the all-reduces of its node"),
        ([3, 3, 3, 3], (0, 1, 2), ["n2"], "rank 3 does not answer any more"),
        ([2, 2, 0, 0], (0, 1), ["n2"], "rank 2, 3 does not answer any more"),
        ([4, 4, 0, 0], (), ["n2"], "rank 2, 3 did not start in time"),
    ],
)
def test_the_node_of_the_rank_that_came_least_far_is_named(
    stages: list[int], late: tuple[int, ...], bad: list[str], says: str
) -> None:
    found = health(stages, late)
    assert (found.bad, found.unexplained) == (bad, "")
    assert says in describe(found)


def test_no_node_is_named_if_all_ranks_came_equally_far() -> None:
    found = health([3, 3, 3, 3], (0, 1, 2, 3))
    assert (found.bad, "no rank came further than 'node'" in found.unexplained) == ([], True)


def test_a_wrong_sum_names_the_node_and_a_slow_node_is_a_warning() -> None:
    assert health([4, 4, 4, 4], is_right=False).nodes["n2"] == ["rank 3: an all-reduce over the node has a wrong sum"]
    slow = health([4, 4, 4, 4], gib_per_second=1.0)
    assert (slow.bad, slow.warnings) == ([], ["n2: all-reduces of the node reach 1.00 GiB/s, the median is 8.00"])


def test_warnings_of_several_nodes_are_one_and_a_folder_that_some_nodes_lack_is_named() -> None:
    facts = {"problems": [], "warnings": ["no log"], "absent": ["/runs/new", "/scratch"]}
    lines: list[tuple[float, dict[str, Any]]] = [(0.0, {"rank": n, "node": f"n{n}", **facts}) for n in range(5)]
    lines[0][1]["absent"] = ["/runs/new"]
    found = judge(NodeRequest(gpus=0, all_reduce_seconds=0), {f"n{n}": 1 for n in range(5)}, lines)
    assert found.warnings == [
        "n0, n1, n2 and 2 more nodes: no log",
        "n1, n2, n3 and 1 more nodes: /scratch does not exist there, but on other nodes: its file system may not be mounted",
    ]


def test_more_tasks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ledom.hardware_check.node_health.job_nodes", lambda: {"n1": 4, "n2": 8})
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    with pytest.raises(UsageError, match=r"n2 has 8 tasks but 4 GPUs.*--ntasks-per-node=4"):
        check_node_health(NodeRequest(gpus=4))


def test_one_process_outside_slurm_checks_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    command = ["check-nodes", "--folders", str(tmp_path), "--json", f"{tmp_path}/found.json", "--free-gib"]
    assert run([*command, "0"]) == 0
    assert run([*command, "1e9"]) == 1
    assert "GiB free, below 1e+09 GiB" in capsys.readouterr().err


def test_options_of_srun_outside_a_job_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UsageError, match="--srun-options is given, but this is no SLURM job"):
        check_node_health(NodeRequest(gpus=0, srun_options="--container-image=x"))


def test_inside_srun_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}
    for name, value in {**step, "SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="start it in the batch script itself"):
        check_node_health(NodeRequest(gpus=0))
