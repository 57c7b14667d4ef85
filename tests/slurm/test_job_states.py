"""The states of jobs for `ledom status`, from a real SLURM, and from none that answers."""

import time
from pathlib import Path

import pytest

from megatron_ledom.platform.slurm import job_states
from tests.slurm.cluster import Cluster


def test_states_of_jobs_are_those_of_slurm(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nsleep $1\n")
    small = ["--cpus-per-task=1", "--mem=50M", f"--output={tmp_path}/log"]
    running = cluster.submit(script, "300", options=small, cwd=tmp_path)
    held = cluster.submit(script, "1", options=[*small, "--hold"], cwd=tmp_path)
    ended = cluster.submit(script, "300", options=small, cwd=tmp_path)
    cluster.run("scancel", ended)
    cluster.wait_until(lambda: cluster.states(running) + cluster.states(ended) == ["RUNNING", "CANCELLED"])
    unknown = str(int(ended) + 1000)
    expected = {running: "RUNNING", held: "REQUEUE_HOLD", ended: "CANCELLED"}
    assert job_states([running, held, ended, unknown, "7; rm -rf /", ""]) == expected
    assert job_states([unknown]) == {}
    cluster.run("scancel", running, held)


def test_a_slurm_that_hangs_is_left_alone_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("squeue", "sacct"):
        (tmp_path / name).write_text("#!/bin/sh\nexec sleep 60\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    started = time.monotonic()
    assert job_states(["7"], seconds=0.5) == {}
    assert time.monotonic() - started < 20
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert job_states(["7"]) == {}
