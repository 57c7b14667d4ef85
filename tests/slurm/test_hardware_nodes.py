"""The check over all nodes of `ledom check-hardware`, in a job of two virtual nodes under a real SLURM."""

import json
import sys
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.support.paths import ROOT

SCRIPT = """#!/bin/bash
{python} - {folder} <<'END'
import json, sys
from dataclasses import asdict
from pathlib import Path
from megatron_ledom.hardware_check.check import Setting
from megatron_ledom.hardware_check.nodes import check_nodes
folder = Path(sys.argv[1])
outcome = check_nodes(Setting(device="cpu", num_gpus=1, seconds=150, folder=str(folder / "files")))
(folder / "outcome.json").write_text(json.dumps(asdict(outcome)))
END
srun --nodes=1 --ntasks=1 {python} -c '
from megatron_ledom.hardware_check.check import Setting
from megatron_ledom.hardware_check.nodes import check_nodes
print("inside:", check_nodes(Setting(device="cpu", num_gpus=1, seconds=10, folder=".")).reason)'
"""


def test_a_job_of_two_nodes_trains_as_one_process(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    script, log = tmp_path / "job.sbatch", tmp_path / "job.log"
    script.write_text(SCRIPT.format(python=sys.executable, folder=tmp_path))
    options = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=4000M", "--time=5", f"--output={log}"]
    job = cluster.submit(script, options=options, cwd=ROOT)
    cluster.wait_until(lambda: cluster.states(job)[0] not in ("PENDING", "RUNNING", "COMPLETING"), 180, lambda: log.read_text())
    assert cluster.states(job) == ["COMPLETED"], log.read_text()
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["status"] == "passed", outcome
    assert outcome["numbers"]["nodes"] == outcome["numbers"]["ranks"] == 2
    assert 0 < outcome["numbers"]["grad_norm_difference"] < 1e-4
    assert "inside: inside srun" in log.read_text()
