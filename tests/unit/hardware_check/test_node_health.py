"""Verdicts of ledom check-nodes from the lines of ranks, and the outputs of nvidia-smi and the kernel in their documented formats."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.cli.main import run
from megatron_ledom.errors import UsageError
from megatron_ledom.hardware_check.node_facts import (
    problems_of_folders,
    problems_of_gpus,
    problems_of_kernel_log,
    problems_of_rows,
)
from megatron_ledom.hardware_check.node_health import Health, NodeRequest, check_node_health, describe, judge

REACHED = ("started", "connected", "node", "all")
NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)


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


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/bash\n{text}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("0, NVIDIA A100-SXM4-80GB, 0", None),
        ("0, NVIDIA GeForce RTX 3090, [N/A]", None),
        ("0, NVIDIA A100-SXM4-80GB, 3", "GPU 0 has 3 uncorrected ECC errors"),
        ("0, [Unknown Error], [Unknown Error]", "GPU 0 does not work"),
        ("0, NVIDIA H100 80GB HBM3, [GPU requires reset]", "GPU 0 does not work"),
        ("", "1 GPUs are wanted, but nvidia-smi lists 0"),
    ],
)
def test_answers_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str, says: str | None) -> None:
    smi(tmp_path, monkeypatch, f'[[ $1 == --query-gpu=* ]] && echo "{row}" || exit 2')
    found = problems_of_gpus(1)
    assert bool(found) == bool(says)
    assert (says or "") in "".join(found)


def test_nvidia_smi_that_fails_is_a_problem_of_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, "echo 'Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost.'; exit 15")
    assert problems_of_gpus(1) == [
        "nvidia-smi ended with 15: Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost."
    ]
    assert problems_of_gpus(0) == []


def test_rows_of_memory_and_xids_of_the_last_day() -> None:
    assert problems_of_rows("00000000:3B:00.0, 0, 0\n00000000:5E:00.0, [N/A], [N/A]\n") == []
    assert problems_of_rows("00000000:3B:00.0, 1, 0\n") == ["GPU 00000000:3B:00.0: replacing a row of memory is pending"]
    line = "{}+00:00 NVRM: Xid (PCI:0000:3b:00): {}, pid=77, name=python, more"
    text = "\n".join(
        [
            line.format(*pair)
            for pair in (("2026-03-02T11:00:00,5", 79), ("2026-03-01T11:00:00,5", 79), ("2026-03-02T11:00:00,5", 31))
        ]
    )
    assert problems_of_kernel_log(text, NOW) == [
        "GPU 0000:3b:00 had Xid 79 at 2026-03-02T11:00:00,5+00:00: the GPU has fallen off the bus"
    ]


def test_folder_that_does_not_exist_yet_is_checked_where_it_will_be(tmp_path: Path) -> None:
    assert problems_of_folders([f"{tmp_path}/runs/new"], 0.0) == []
    [first, *_] = problems_of_folders([f"{tmp_path}/runs/new"], 1e9)
    assert first.startswith(f"{tmp_path}/runs/new has ")
    assert list(tmp_path.iterdir()) == []


def test_one_process_outside_slurm_checks_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    command = ["check-nodes", "--folders", str(tmp_path), "--json", f"{tmp_path}/found.json", "--free-gib"]
    assert run([*command, "0"]) == 0
    assert run([*command, "1e9"]) == 1
    assert "GiB free, below 1e+09 GiB" in capsys.readouterr().err


def test_inside_srun_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}
    for name, value in {**step, "SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="start it in the batch script itself"):
        check_node_health(NodeRequest(gpus=0))
