"""Alerts of pretrain.sbatch: started only if a receiver is set, told how the ranks ended, and never decisive for the job."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.alert_receivers import receiving
from tests.support.heartbeats import write_heartbeat
from tests.support.paths import ROOT

PYTHON = """#!/bin/bash
# `ledom alert` really runs; the trainer is three lines
if [[ $1 == tools/alert.py && -n "${{ALERTS_DIE:-}}" ]]; then
    echo >> starts
    (($(wc -l < starts) > ALERTS_DIE)) || exit 137
fi
[[ $1 != tools/alert.py ]] || exec {real} {root}/tools/alert.py "${{@:2}}"
[[ $1 != tools/check_nodes.py ]] || {{ echo "$BAD_NODE"; exit 1; }}
if [[ " $* " == *" --progress "* ]]; then echo "$PROGRESS"; exit; fi
until [[ -z "${{ALERT_WEBHOOK:-}}" || -e "$STATE" ]]; do sleep 0.05; done
until ((${{ALERTS_DIE:-0}} < 4)) || (($(wc -l < starts) == 4)); do sleep 0.05; done
[[ -z "$END" ]] || cp "$END" {run}/heartbeat.json
exit "$CODE"
"""
SRUN = '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/bash\necho "$@" >> scontrol.log\n'
SQUEUE = '#!/bin/bash\necho "$JOB_STATE"\n'


class Job:
    """A folder with the job script's commands and a run whose heartbeat says that it runs."""

    def __init__(self, folder: Path, python: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.run.mkdir()
        (self.run / "config.yaml").write_text("train: {train_iters: 9}\n")
        (folder / "run.yaml").write_text((ROOT / "tests/golden/tiny_reverse.yaml").read_text())
        self.beat("running", self.run / "heartbeat.json")
        fakes = {"srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE}
        fakes["python"] = PYTHON.format(root=ROOT, real=python, run=self.run)
        for name, text in fakes.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.output = ""

    def beat(self, state: str, path: Path, reason: str = "") -> Path:
        write_heartbeat(path, state=state, reason=reason, iteration=3)
        return path

    def start(self, code: int, end: Path | None = None, progress: str = "3 9", state: str = "RUNNING", **alerts: str) -> float:
        """Run the job script and return its seconds; `end` is the last heartbeat of the ranks, which end with `code`."""
        variables = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "tiny",
            "SLURM_NTASKS": "1",
            "SLURM_JOB_NODELIST": "n",
            "SLURM_CPUS_PER_TASK": "1",
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "PYTHON": f"{self.folder}/python",
            "CODE": str(code),
            "END": str(end or ""),
            "PROGRESS": progress,
            "JOB_STATE": state,
            "RETRY_SECONDS": "0",
            "STATE": f"{self.folder}/tiny-7.alerts",
            "CONFIG": str(self.folder / "run.yaml"),
            "ALERT_INTERVAL": "1",
            **alerts,
        }
        command = ["bash", str(ROOT / "examples/slurm/pretrain.sbatch"), f"run_dir={self.run}"]
        began = time.monotonic()
        done = subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True, check=False, timeout=100)
        self.output = done.stdout + done.stderr
        assert done.returncode == code, self.output
        return time.monotonic() - began

    def queued(self) -> bool:
        return (self.folder / "scontrol.log").exists()


@pytest.fixture
def job(tmp_path: Path, python: Path) -> Job:
    return Job(tmp_path, python)


def test_a_stop_is_told_with_what_follows_before_the_job_is_queued_again(job: Job) -> None:
    end = job.beat("stopped", job.folder / "end.json", "the time limit is near")
    with receiving() as hook:
        job.start(0, end, ALERT_WEBHOOK=f"{hook.address}/secret-path")
    assert hook.events() == ["stopped"]
    (stopped,) = hook.messages
    assert stopped["reason"] == "the time limit is near"
    assert stopped["note"] == "The job is queued again and resumes at iteration 3 of 9"
    assert job.queued()
    assert "secret-path" not in job.output


@pytest.mark.parametrize(("code", "is_queued"), [(137, True), (2, False)])
def test_ranks_that_end_without_a_report_are_told_as_failed(job: Job, code: int, is_queued: bool) -> None:
    with receiving() as hook:
        job.start(code, ALERT_WEBHOOK=hook.address)
    assert hook.events() == ["failed"]
    assert f"the launch ended with code {code} without a report" in hook.messages[0]["reason"]
    assert ("is queued again" in hook.messages[0]["note"]) == job.queued() == is_queued


def test_a_job_that_slurm_ends_tells_it_and_ends_at_once_even_if_nobody_answers(job: Job) -> None:
    end = job.beat("stopped", job.folder / "end.json", "SIGTERM")
    with receiving() as hook:
        pass  # nobody listens at this address any more
    seconds = job.start(0, end, state="COMPLETING", ALERT_WEBHOOK=hook.address)
    assert seconds < 15
    assert not job.queued()
    with receiving(port=hook.port) as again:  # the next start of the job sends it
        job.start(0, end, progress="9 9", ALERT_WEBHOOK=again.address)
    assert again.events()[0] == "stopped"
    assert again.messages[0]["note"] == "SLURM ended the job: COMPLETING"


def test_a_receiver_that_cannot_work_changes_nothing(job: Job) -> None:
    job.start(0, progress="9 9", ALERT_WEBHOOK="no address", STATE="/")
    assert "the address of --webhook is not one of a web server" in job.output
    assert "complete: iteration 9" in job.output


def test_a_watcher_that_dies_is_started_again(job: Job) -> None:
    end = job.beat("stopped", job.folder / "end.json", "the time limit is near")
    with receiving() as hook:
        job.start(0, end, ALERT_WEBHOOK=hook.address, ALERTS_DIE="2")
    assert hook.events() == ["stopped"]
    assert "ended with 137: it is started again (2 of at most 3 times)" in job.output
    assert job.queued()


def test_a_watcher_that_always_dies_changes_nothing(job: Job) -> None:
    (job.folder / "tiny-7.alerts").touch()  # the fake trainer waits for it
    job.start(0, progress="9 9", ALERT_WEBHOOK="http://127.0.0.1:9", ALERTS_DIE="9")
    assert "complete: iteration 9" in job.output


def test_a_job_that_the_check_of_its_nodes_ends_is_told(job: Job) -> None:
    with receiving() as hook:
        job.start(1, progress="9 9", ALERT_WEBHOOK=hook.address, CHECK_NODES="1", BAD_NODE="n2")
    assert "bad nodes: n2" in job.output
    assert hook.events() == ["failed"]
    assert hook.messages[0]["note"] == "The job ends and is not queued again"


def test_seconds_that_are_no_number_are_refused(job: Job) -> None:
    job.start(2, ALERT_SECONDS="15s")
    assert "ALERT_SECONDS=15s is not a whole number of seconds" in job.output
    assert not job.queued()


def test_no_alerts_are_sent_unless_a_receiver_is_set(job: Job) -> None:
    job.start(0, progress="9 9")
    assert not (job.folder / "tiny-7.alerts").exists()
    assert "alert" not in job.output
