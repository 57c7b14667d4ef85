"""`ledom check-nodes` and CHECK_NODES of pretrain.sbatch under a real SLURM: each bad node is named, and excluded if asked.

A node is made bad by the program that runs its ranks, for example with a preloaded clock; nothing in the check is replaced.
"""

import glob
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster
from tests.support.paths import ROOT

FAKETIME = glob.glob("/usr/lib/*/faketime/libfaketime.so.1")
SMI = """#!/bin/bash
case "$1" in
--query-gpu=*) echo "0, NVIDIA H100 80GB HBM3, 2, Enabled, Disabled, None" ;;
--query-remapped-rows=*) echo "00000000:3B:00.0, 0, 1" ;;
esac
"""


@pytest.fixture
def full_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder of a file system without space."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def ranks_program(folder: Path, node: str, commands: str) -> Path:
    """Write a program for the ranks which runs `commands` on one node before Python."""
    program = folder / "ranks"
    program.write_text(f'#!/bin/bash\nif [[ $SLURMD_NODENAME == {node} ]]; then\n{commands}\nfi\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return program


def check(cluster: Cluster, folder: Path, *options: str, commands: str = ":") -> tuple[int, str, dict[str, Any]]:
    """Check two nodes of which n2 runs `commands` first; return the exit code, the printed names and the result."""
    program = ranks_program(folder, "n2", commands)
    words = [sys.executable, "tools/check_nodes.py", "--python", str(program), "--json", f"{folder}/result.json", *options]
    script = folder / "job.sbatch"
    script.write_text(f"#!/bin/bash\n{' '.join(words)} > {folder}/names\necho code $?\n")
    of_job = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=1000M", f"--output={folder}/log"]
    job = cluster.submit(script, options=of_job, cwd=ROOT, OMP_NUM_THREADS="1")
    cluster.wait_for_end(job)
    code = int((folder / "log").read_text().split()[-1])
    return code, (folder / "names").read_text().strip(), json.loads((folder / "result.json").read_text())


def test_healthy_nodes_reduce_with_each_other(cluster: Cluster, tmp_path: Path) -> None:
    code, names, result = check(cluster, tmp_path, "--all-reduce-seconds", "0.2", "--free-gib", "0.001")
    assert (code, names) == (0, ""), result
    assert (result["nodes"], result["unexplained"]) == ({"n1": [], "n2": []}, "")


def test_gpu_errors_a_full_disk_and_a_wrong_clock_are_named_with_their_node(
    cluster: Cluster, tmp_path: Path, full_folder: Path
) -> None:
    """A fake nvidia-smi prints the documented format: GPUs are not yet run on hardware."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvidia-smi").write_text(SMI)
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    commands = f"export TMPDIR={full_folder} PATH={tmp_path}/bin:$PATH\n"
    commands += f"export LD_PRELOAD={FAKETIME[0]} FAKETIME=-90s\n" if FAKETIME else ""
    options = ("--all-reduce-seconds", "0", "--free-gib", "0.001", "--gpus", "2", "--seconds", "20")
    code, names, result = check(cluster, tmp_path, *options, commands=commands)
    assert (code, names) == (1, "n1,n2"), result
    assert result["nodes"]["n1"] == ["2 GPUs are wanted, but there is no nvidia-smi"]
    found = "\n".join(result["nodes"]["n2"])
    assert "2 GPUs are wanted, but nvidia-smi lists 1" in found
    assert "GPU 0 has 2 uncorrected ECC errors" in found
    assert "GPU 00000000:3B:00.0: replacing a row of memory has failed" in found
    assert f"{full_folder} cannot be written: No space left on device" in found
    assert not FAKETIME or "its clock differs by -90." in found or "its clock differs by -89." in found


def test_node_that_hangs_is_named(cluster: Cluster, tmp_path: Path) -> None:
    options = ("--all-reduce-seconds", "0", "--free-gib", "0.001", "--seconds", "3")
    code, names, result = check(cluster, tmp_path, *options, commands="kill -STOP $$")
    assert (code, names) == (1, "n2"), result
    assert result["nodes"]["n2"] == ["rank 1 did not start in time"]


def test_node_that_cannot_connect_is_named(cluster: Cluster, tmp_path: Path) -> None:
    options = ("--all-reduce-seconds", "0.2", "--free-gib", "0.001", "--seconds", "15")
    code, names, result = check(cluster, tmp_path, *options, commands="export MASTER_ADDR=127.0.0.1 MASTER_PORT=9")
    assert (code, names) == (1, "n2"), result
    assert result["nodes"]["n2"] == ["rank 1 cannot connect to the store of rank 0"]


@pytest.mark.parametrize("asked", [False, True])
def test_training_starts_without_the_bad_node_only_if_asked(
    cluster: Cluster, tmp_path: Path, full_folder: Path, asked: bool
) -> None:
    """The job begins on n1, whose temporary folder is full; SLURM's list of excluded nodes gets n1 and the job starts on n2."""
    program = ranks_program(tmp_path, "n1", f'[[ "$*" == *node_rank* ]] && export TMPDIR={full_folder}')
    text = program.read_text().replace(
        "exec", '[[ "$*" == *megatron_ledom.pretrain* ]] && echo "trains on $SLURMD_NODENAME" && exit 1\nexec'
    )
    program.write_text(text)
    log = tmp_path / "log"
    options = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=1000M", f"--output={log}"]
    variables = {
        "PYTHON": str(program),
        "CHECK_NODES": "1",
        "EXCLUDE_BAD_NODES": str(int(asked)),
        "CHECK_FOLDERS": str(tmp_path),
    }
    job = cluster.submit(ROOT / "examples/slurm/pretrain.sbatch", options=options, cwd=ROOT, **variables)
    if asked:
        cluster.wait_until(lambda: "queued again without n1" in (log.read_text() if log.exists() else ""))
        cluster.start_again_soon(job)
        assert cluster.job(job)["ExcNodeList"] == "n1"
    cluster.wait_for_end(job)
    (ROOT / f"ledom-7b-{job}.excluded").unlink(missing_ok=True)
    assert "bad nodes: n1" in log.read_text()
    assert f"{full_folder} cannot be written: No space left on device" in log.read_text()
    assert ("trains on n2" in log.read_text(), "trains on n1" in log.read_text()) == (asked, False)
    assert cluster.job(job)["Restarts"] == str(int(asked))
