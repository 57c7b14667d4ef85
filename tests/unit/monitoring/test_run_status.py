"""`ledom status` on folders of real runs: complete, stopped, failed, killed, running, old, damaged, huge and gone."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.config.load import load_config
from megatron_ledom.monitoring import runs as runs_module
from megatron_ledom.monitoring.heartbeat import HEARTBEAT, read_heartbeat
from megatron_ledom.monitoring.launch_report import report_complete
from megatron_ledom.monitoring.run_status import Limits, RunStatus, read_status
from megatron_ledom.monitoring.runs import JobStates, RunReader, run_folders
from megatron_ledom.monitoring.table import as_table, duration
from megatron_ledom.platform.launch import read_launch
from tests.support.injected_errors import inject
from tests.support.tiny_runs import TinyData, start_ranks

LONG = ("train.train_iters=5000", "data.allow_repeats=true", "checkpoint.save_interval=4", "checkpoint.keep_last=2")


def status_of(run: Path, slurm: dict[str, str] | None = None, later: float = 0.0, **limits: Any) -> RunStatus:
    return read_status(str(run), Limits(**limits), lambda jobs: slurm or {}, now=time.time() + later)


def ledom_status(python: Path, *arguments: object) -> tuple[int, str]:
    ledom = python.with_name("ledom")
    done = subprocess.run([str(ledom), "status", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


def content(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of every file in a folder."""
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def change_heartbeat(run: Path, **changes: Any) -> None:
    """Change fields of the heartbeat, which then is as old as it says."""
    path = run / HEARTBEAT
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(values))
    if isinstance(values["at"], float) and math.isfinite(values["at"]):
        os.utime(path, (values["at"], values["at"]))


def kinds(status: RunStatus) -> list[str]:
    return [problem.kind.value for problem in status.problems]


def read_all(*runs: object, seconds: float = 20) -> list[RunStatus]:
    return RunReader([str(run) for run in runs], Limits(), jobs=JobStates(lambda jobs, wait: {}), seconds=seconds).read()


def test_a_complete_run_reports_what_its_records_say(whole: Path, python: Path) -> None:
    before = content(whole)
    code, text = ledom_status(python, whole.parent, "--json")  # the folder above: its runs are found
    [found] = json.loads(text)
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert (code, found["state"], found["is_healthy"]) == (0, "complete", True)
    assert (found["iteration"], found["train_iters"], found["checkpoint_iteration"]) == (10, 10, 10)
    assert found["lm_loss"] == pytest.approx(sum(record["lm_loss"] for record in records) / 10)
    [last] = records[-1]["validation"].values()
    assert (list(found["validation"].values()), found["validation_iteration"]) == ([last["lm_loss"]], 10)
    assert (found["consumed_train_tokens"], found["global_batch_size"]) == (10 * 8 * 32, 8)
    assert found["curve"] == [[record["iteration"], record["lm_loss"]] for record in records]
    assert (found["slowest_ranks"], found["world_size"], found["launches"], found["bad_steps"]) == ([[0, 10]], 1, 1, 0)
    assert found["problems"] == []
    assert content(whole) == before
    assert "10 of 10 (100.0 %)" in ledom_status(python, whole)[1]


def test_a_run_is_running_until_it_is_stopped_and_stalled_while_it_hangs(data: TinyData, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = start_ranks(data.config, run, *LONG, hook=partial(inject, "sleep:9:0"))
    ranks.wait_until(lambda: (run / HEARTBEAT).exists() and status_of(run).iteration == 8)
    change_heartbeat(run, at=time.time())
    assert status_of(run).state == "running"
    assert status_of(run).checkpoint_iteration in (4, 8)
    assert (status_of(run).eta_seconds or 0) > 0
    assert status_of(run, later=30, stale_seconds=20).state == "lost"
    change_heartbeat(run, idle_seconds=160.0, is_patient=False)
    assert status_of(run).state == "stalled"
    assert not status_of(run).is_healthy
    ranks.send(signal.SIGKILL)
    ranks.wait()
    assert status_of(run, later=25).state == "lost"  # its process is gone
    assert "has ended without a report" in status_of(run, later=25).reason
    assert status_of(run, ended_with=137).state == "lost"  # the launcher reports it at once


@pytest.mark.parametrize(
    ("error", "state", "reason"), [("nan:3", "failed", "StoppedError: iteration 3"), ("", "stopped", "got SIGTERM")]
)
def test_the_end_of_a_launch_is_reported_with_its_reason(
    data: TinyData, tmp_path: Path, python: Path, error: str, state: str, reason: str
) -> None:
    run = tmp_path / "run"
    ranks = start_ranks(data.config, run, *LONG, hook=partial(inject, error) if error else None)
    if not error:
        ranks.wait_until(lambda: (run / "steps.jsonl").exists() and (status_of(run).iteration or 0) > 3)
        ranks.send(signal.SIGTERM)
    ranks.wait()
    found = status_of(run)
    assert found.state == state, ranks.output()
    assert reason in found.reason
    assert found.bad_steps == (1 if error else 0)
    code, text = ledom_status(python, run)
    assert code == (1 if error else 0)
    assert reason in text
    assert kinds(found) == (["failed", "spike"] if error else ["stopped"])
    queued = {"7": "PENDING"}
    change_heartbeat(run, slurm_job_id="7")
    assert status_of(run, queued).state == "queued"
    assert status_of(run, queued).is_healthy
    assert status_of(run, {"7": "PREEMPTED"}).state == ("failed" if error else "preempted")


def test_slurm_knows_more_than_a_heartbeat_that_is_missing(run: Path) -> None:
    change_heartbeat(run, state="running", at=time.time(), slurm_job_id="7", host="elsewhere", idle_seconds=0.0)
    for state in (None, "RUNNING", "NODE_FAIL", "PENDING"):  # another cluster may have a job of this number
        assert status_of(run, {"7": state} if state else {}).state == "running"
    assert status_of(run, {"7": "NODE_FAIL"}, later=30).state == "lost"
    assert "SLURM's job 7 is NODE_FAIL" in status_of(run, {"7": "NODE_FAIL"}, later=30).reason
    assert status_of(run, {"7": "PREEMPTED"}, later=30).state == "preempted"
    assert status_of(run, {"7": "PENDING"}, later=30).state == "queued"
    assert status_of(run, {"7": "RUNNING"}, later=30).state == "running"
    assert "although SLURM's job 7 is RUNNING" in status_of(run, {"7": "RUNNING"}, later=300).reason
    assert status_of(run).slurm_state is None


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_a_start_that_fails_or_hangs_before_its_first_heartbeat_is_reported(run: Path, state: str) -> None:
    change_heartbeat(run, state=state, at=time.time(), slurm_job_id="7", host="elsewhere", reason="the time limit", iteration=4)
    shutil.rmtree(run / "checkpoints")
    for name in ("metrics.jsonl", "steps.jsonl", "launches.jsonl"):
        os.utime(run / name, (1.0, 1.0))
    for slurm in ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"):
        assert status_of(run, {"7": slurm}).state == "failed"
    assert status_of(run, {"7": "RUNNING"}, later=30).state == state  # it is ending
    assert status_of(run, {"7": "RUNNING"}, later=300).state == "running"
    found = status_of(run, {"7": "RUNNING"}, later=2000)
    assert (found.state, found.is_healthy) == ("stalled", False)
    assert "no heartbeat since the launch that ended" in found.reason
    held = status_of(run, {"7": "REQUEUE_HOLD"})
    assert (held.state, held.is_healthy) == ("stalled", False)
    assert "scontrol release 7" in held.reason


def test_a_run_that_failed_after_its_last_checkpoint_is_complete_once_its_job_is(run: Path) -> None:
    for state in ("failed", "running"):
        change_heartbeat(run, state=state, at=time.time() - 500, slurm_job_id="7", host="elsewhere")
        assert status_of(run, {"7": "COMPLETED"}).state == "complete"
    config = load_config(str(run / "config.yaml"), [f"run_dir={run}"])
    report_complete(config, replace(read_launch(), rank=1))
    assert read_heartbeat(str(run)).state == "running"
    report_complete(config, read_launch())
    found = status_of(run)
    assert (found.state, found.iteration) == ("complete", 10)


def test_a_run_without_a_heartbeat_is_judged_by_its_records(run: Path) -> None:
    (run / HEARTBEAT).unlink()
    assert status_of(run).state == "complete"
    shutil.rmtree(run / "checkpoints")
    assert status_of(run).state == "running"
    assert "records are being written" in status_of(run).reason
    found = status_of(run, later=1000)
    assert (found.state, kinds(found), found.eta_seconds) == ("unknown", ["unknown"], None)
    for name in ("metrics.jsonl", "steps.jsonl", "launches.jsonl"):
        (run / name).unlink()
    assert status_of(run).state == "not started"


def test_records_after_the_heartbeat_outweigh_it(run: Path) -> None:
    """A launch of an older version, or one that cannot write its heartbeat, has continued the run."""
    shutil.rmtree(run / "checkpoints")
    for state in ("failed", "complete", "running"):
        change_heartbeat(run, state=state, at=time.time() - 3600, host="elsewhere")
        assert status_of(run).state == "running"
    assert status_of(run, later=1000).state == "lost"


def test_clocks_that_differ_are_reported_and_decide_nothing(run: Path) -> None:
    change_heartbeat(run, state="running", at=time.time(), host="elsewhere", idle_seconds=0.0)
    change_clock = json.loads((run / HEARTBEAT).read_text())
    (run / HEARTBEAT).write_text(json.dumps({**change_clock, "at": time.time() - 3600}))
    found = status_of(run)
    assert (found.state, kinds(found)) == ("running", ["clock"])
    assert "the clock of elsewhere is 3600 s earlier" in found.problems[0].text
    found = status_of(run, later=-3600)  # the clock of this machine
    assert (found.state, found.heartbeat_age_seconds) == ("unknown", None)
    assert kinds(found) == ["unknown", "clock", "clock"]


def test_a_heartbeat_that_is_seen_to_change_is_new_whatever_the_clocks_say(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = RunReader([str(run)], Limits(), jobs=JobStates(lambda jobs, wait: {}))
    shutil.rmtree(run / "checkpoints")
    for name in ("metrics.jsonl", "steps.jsonl", "launches.jsonl"):
        os.utime(run / name, (1.0, 1.0))
    states = []
    for hours in (10, 9):
        change_heartbeat(run, state="running", at=time.time() - 3600 * hours, host="elsewhere", idle_seconds=0.0)
        states.append(reader.read()[0].state)
    assert states == ["lost", "running"]
    monkeypatch.setattr(runs_module.time, "monotonic", lambda: later)
    later = time.perf_counter() + 1e6  # long after the last reading: nobody knows when it changed
    change_heartbeat(run, state="running", at=time.time() - 3600 * 8, host="elsewhere", idle_seconds=0.0)
    assert reader.read()[0].state == "lost"


def test_the_time_left_follows_the_batch_sizes_of_the_last_record(run: Path) -> None:
    change_heartbeat(run, state="running", at=time.time(), iteration=10)
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    with (run / "metrics.jsonl").open("a") as file:
        for iteration, size, each in [(20, 8, 1.0), (30, 16, 2.0), (40, 16, 2.0)]:
            changes = {"iteration": iteration, "global_batch_size": size, "seconds_per_iteration": each}
            file.write(json.dumps({**record, **changes, "eta_seconds": 60 * each}) + "\n")
    found = status_of(run)
    assert (found.iteration, found.global_batch_size, found.seconds_per_iteration) == (40, 16, 2.0)
    assert found.eta_seconds == 120


def test_repeated_and_missing_iterations_count_once_and_a_resumed_run_begins_at_its_checkpoint(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines, *lines[4:8]]) + "\n")
    (run / "steps.jsonl").write_text("")
    found = status_of(run)
    assert [iteration for iteration, _ in found.curve] == list(range(1, 11))
    change_heartbeat(run, state="running", at=time.time(), iteration=0, activity="building the run", idle_seconds=1.0)
    launch = json.loads((run / "launches.jsonl").read_text())
    (run / "launches.jsonl").write_text(json.dumps({**launch, "from_iteration": 4}) + "\n")
    found = status_of(run)
    assert (found.state, found.iteration, found.eta_seconds, found.activity) == ("running", 4, None, "building the run")


def test_nothing_that_is_not_finite_reaches_the_json(run: Path, python: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 10, "lm_loss": NaN, "tokens_per_second": Infinity, "mfu": -Infinity, "slowest_rank": NaN,')
        file.write('"rank_seconds_max": 1e308, "rank_seconds_mean": 1e-308, "validation": {"a": {"lm_loss": NaN}}}\n')
    with (run / "bad_steps.jsonl").open("w") as file:
        file.write('{"iteration": 9, "lm_loss": NaN, "score": Infinity, "grad_norm": "nan", "reason": {}, "action": [1e999]}\n')
    code, text = ledom_status(python, run, "--json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    [found] = json.loads(text, parse_constant=refuse)
    assert code == 0
    assert found["last_bad_step"] == {
        "iteration": 9, "action": None, "reason": None, "lm_loss": None, "grad_norm": "nan", "score": None
    }  # fmt: skip
    assert math.isfinite(found["lm_loss"])
    for value in ("NaN", "Infinity", "1e400", "9" * 400):
        text = (run / HEARTBEAT).read_text()
        (run / HEARTBEAT).write_text(re.sub('"idle_seconds": [^,]*', f'"idle_seconds": {value}', text))
        assert kinds(status_of(run)) == ["damaged", "spike"]


def test_low_disk_space_is_a_problem_of_a_run_that_continues(run: Path) -> None:
    size = sum(path.stat().st_size for path in (run / "checkpoints/iter_0000010").iterdir())
    assert status_of(run).disk_needed_bytes == 2 * size
    assert status_of(run, min_free_disk_gib=1e6).is_healthy
    change_heartbeat(run, state="stopped", reason="got SIGTERM")
    found = status_of(run, min_free_disk_gib=1e6)
    assert (found.state, found.is_healthy, kinds(found)) == ("stopped", False, ["stopped", "disk low"])


def cut(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])


def spoil_lines(run: Path) -> None:
    (run / "metrics.jsonl").write_bytes(
        b'\x00\xff{"iteration": [}\n[1]\n{"iteration": "x", "lm_loss": {}, "slowest_rank": 1e999}\n'
    )


def spoil_everything(run: Path) -> None:
    for path in run.iterdir():
        if path.is_file():
            path.write_bytes(b"\x00\xff[" * 1000)
    (run / "checkpoints/latest").write_text("nonsense")


def fold(run: Path) -> None:
    for name in ("metrics.jsonl", "heartbeat.json", "steps.jsonl", "bad_steps.jsonl"):
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "half-written": (cut, ""),
    "lines": (spoil_lines, "2 of its last 3 lines are damaged"),
    "everything": (spoil_everything, "heartbeat.json is damaged"),
    "folders": (fold, "Is a directory"),
    "config": (lambda run: (run / "config.yaml").write_text("train: [unclosed"), "did not find expected"),
    "types": (lambda run: change_heartbeat(run, at="now"), "its at is 'now'"),
    "nested": (lambda run: (run / HEARTBEAT).write_text("[" * 100_000), "heartbeat.json is damaged"),
    "gone": (shutil.rmtree, "the folder does not exist"),
    "empty": (lambda run: [shutil.rmtree(run), run.mkdir()], "give the run_dir of a run"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_reported_and_hides_no_other(run: Path, whole: Path, damage: str) -> None:
    spoil, expected = DAMAGES[damage]
    spoil(run)
    broken, good = read_all(run, whole)
    texts = [problem.text for problem in broken.problems]
    assert expected in "\n".join([broken.reason, *texts])
    assert (good.state, good.problems) == ("complete", [])
    assert str(run) in as_table([broken, good])
    assert len("".join(texts)) < 5000
    assert "report this as a bug" not in broken.reason


def test_a_run_whose_disk_hangs_delays_no_other(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hang, read = threading.Event(), runs_module.read_files
    monkeypatch.setattr(runs_module, "read_files", lambda run, *rest: hang.wait(30) if run == "hung" else read(run, *rest))
    reader = RunReader(["hung", str(whole)], Limits(), jobs=JobStates(lambda jobs, wait: {}), seconds=2)
    threads = []
    for _ in range(3):
        found = reader.read()
        threads.append(threading.active_count())
        assert [one.state for one in found] == ["unreadable", "complete"]
        assert "did not answer within" in found[0].reason
    hang.set()
    assert len(set(threads)) == 1  # a watch of weeks starts no second thread


def test_slurm_is_asked_once_for_all_runs_and_hides_none(run: Path, whole: Path) -> None:
    asked = []

    def ask(jobs: Iterable[str], seconds: float) -> dict[str, str]:
        asked.append(sorted(jobs))
        return {"7": "PENDING"}

    change_heartbeat(run, state="stopped", slurm_job_id="7")
    other = shutil.copytree(run, run.parent / "other")
    change_heartbeat(other, slurm_job_id="8")
    reader = RunReader([str(run.parent)], Limits(), jobs=JobStates(ask))
    states = [[one.state for one in reader.read()] for _ in range(2)]
    assert states == [["stopped", "queued"]] * 2
    assert asked == [["7", "8"]]


@pytest.mark.parametrize("hole", [False, True])
def test_months_of_records_are_not_read_whole(run: Path, hole: bool) -> None:
    """200 MB of records, or a file without line breaks: what is read does not depend on the size."""
    path, lines = run / "metrics.jsonl", (run / "metrics.jsonl").read_bytes()
    with path.open("r+b") as file:
        if hole:
            file.seek(200 << 20)
        else:
            file.write(lines * ((200 << 20) // len(lines)))
        file.write(b"\n" + lines)
    start = time.process_time()
    found = status_of(run)
    assert time.process_time() - start < 1.5
    assert found.iteration == 10
    assert (len(found.curve) >= 1) if hole else (len(found.curve) == 10)
    assert run_folders(str(run.parent)) == run_folders(str(run)) == [str(run)]


def test_the_last_heartbeat_is_that_of_the_end(whole: Path) -> None:
    found = read_heartbeat(str(whole))
    assert found is not None
    assert (found.state, found.iteration, found.host) == ("complete", 10, os.uname().nodename)
    assert duration(7) == "7s"
    assert duration(3725) == "1h 02m"
    assert duration(273_600) == "3d 04h"
