"""CHECK_NODES and EXCLUDE_BAD_NODES of pretrain.sbatch: SLURM's list of excluded nodes grows, up to a limit."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PYTHON = """#!/bin/bash
[[ $1 == tools/check_nodes.py ]] && echo "$NAMES" && exit "$CODE"
echo "trains"
exit 1
"""
SCONTROL = """#!/bin/bash
[[ $1 == show ]] && echo "   ReqNodeList=(null) ExcNodeList=$BEFORE" || echo "$@" >> scontrol.log
"""
SRUN = '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'


def start(folder: Path, names: str, code: int = 1, before: str = "(null)", **settings: str) -> tuple[str, list[str]]:
    """Run the script as a job whose check prints `names`; return its output and the calls that change the job."""
    for name, text in {"python": PYTHON, "scontrol": SCONTROL, "srun": SRUN}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "tiny",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NODELIST": "n",
        "SLURM_CPUS_PER_TASK": "1",
    }
    fakes = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": f"{folder}/python",
        "NAMES": names,
        "CODE": str(code),
        "BEFORE": before,
    }
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    command = ["bash", str(ROOT / "examples/slurm/pretrain.sbatch")]
    environment = {**outside, **slurm, **fakes, **settings}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    log = folder / "scontrol.log"
    return done.stdout, log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize(("before", "after"), [("(null)", "n2,n5"), ("n[7-9]", "n[7-9],n2,n5")])
def test_bad_nodes_are_added_to_the_list_after_the_requeue(tmp_path: Path, before: str, after: str) -> None:
    """SLURM refuses the list while the job runs."""
    printed, calls = start(tmp_path, "n2,n5", before=before, EXCLUDE_BAD_NODES="1")
    assert calls == ["requeue 7", f"update JobId=7 ExcNodeList={after}"]
    assert "queued again without n2,n5 (excluded in this job: 2 of at most 4)" in printed
    assert "trains" not in printed


def test_a_job_excludes_a_limited_number_of_nodes(tmp_path: Path) -> None:
    assert start(tmp_path, "n1", EXCLUDE_BAD_NODES="1", MAX_EXCLUDED_NODES="2")[1]
    again, calls = start(tmp_path, "n1,n2", EXCLUDE_BAD_NODES="1", MAX_EXCLUDED_NODES="2")
    assert (len(calls), "excluded in this job: 2 of" in again) == (4, True)
    last, calls = start(tmp_path, "n3", EXCLUDE_BAD_NODES="1", MAX_EXCLUDED_NODES="2")
    assert (len(calls), "giving up: this would be the excluded node 3" in last) == (4, True)


def test_without_the_setting_a_bad_node_stops_the_job(tmp_path: Path) -> None:
    printed, calls = start(tmp_path, "n2", CHECK_NODES="1")
    assert (calls, "bad nodes: n2" in printed, "trains" in printed) == ([], True, False)


@pytest.mark.parametrize(("code", "names"), [(0, ""), (3, ""), (1, "")])
def test_a_check_that_names_no_node_lets_the_run_start(tmp_path: Path, code: int, names: str) -> None:
    printed, calls = start(tmp_path, names, code=code, CHECK_NODES="1", EXCLUDE_BAD_NODES="1")
    assert (calls, "trains" in printed) == ([], True)
    assert ("names no node: the run starts anyway" in printed) == bool(code)
