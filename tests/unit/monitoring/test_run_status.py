"""`ledom status` on folders of real runs: complete, stopped, failed, killed, running, old, damaged, huge and gone."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.monitoring import runs as runs_module
from megatron_ledom.monitoring.heartbeat import HEARTBEAT, read_heartbeat
from megatron_ledom.monitoring.run_status import Limits, RunStatus, read_status
from megatron_ledom.monitoring.runs import JobStates, read_all, run_folders
from megatron_ledom.monitoring.table import as_table, duration
from tests.support.injected_errors import inject
from tests.support.tiny_runs import TinyData, run_on_ranks, start_ranks

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


@pytest.fixture(scope="module")
def whole(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run with a validation."""
    run = tmp_path_factory.mktemp("whole") / "run"
    valid = (f"data.valid_blend=[[1.0,{data.shard('reverse_valid')}]]", "train.eval_interval=5", "train.eval_iters=1")
    run_on_ranks(data.config, run, "train.train_iters=10", *valid)
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of the complete run, to change."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def change_heartbeat(run: Path, **changes: Any) -> None:
    path = run / HEARTBEAT
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_complete_run_reports_what_its_records_say(whole: Path, python: Path) -> None:
    before = content(whole)
    code, text = ledom_status(python, whole.parent, "--json")  # the folder above: its runs are found
    [found] = json.loads(text)
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert (code, found["state"], found["is_healthy"]) == (0, "complete", True)
    assert (found["iteration"], found["train_iters"], found["checkpoint_iteration"]) == (10, 10, 10)
    assert found["lm_loss"] == pytest.approx(sum(record["lm_loss"] for record in records) / 10)
    [last] = records[-1]["validation"].values()
    assert found["valid_loss"] == last["lm_loss"]
    assert found["curve"] == [[record["iteration"], record["lm_loss"]] for record in records]
    assert (found["slowest_rank"], found["world_size"], found["launches"], found["bad_steps"]) == (0, 1, 1, 0)
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
    change_heartbeat(run, idle_seconds=130.0, is_patient=False)
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
    queued = {"7": "PENDING"}
    change_heartbeat(run, slurm_job_id="7")
    assert status_of(run, queued).state == "queued"
    assert status_of(run, queued).is_healthy


def test_slurm_knows_more_than_a_heartbeat(run: Path) -> None:
    change_heartbeat(run, state="running", at=time.time(), slurm_job_id="7", pid=os.getpid(), idle_seconds=0.0)
    assert status_of(run, {"7": "RUNNING"}).state == "running"
    assert status_of(run, {"7": "NODE_FAIL"}).state == "lost"
    assert "SLURM: job 7 is NODE_FAIL" in status_of(run, {"7": "NODE_FAIL"}).reason
    assert "although SLURM's job 7 is RUNNING" in status_of(run, {"7": "RUNNING"}, later=300).reason
    assert status_of(run).slurm_state is None


def test_a_run_without_a_heartbeat_is_judged_by_its_records(run: Path) -> None:
    (run / HEARTBEAT).unlink()
    assert status_of(run).state == "complete"
    shutil.rmtree(run / "checkpoints")
    assert status_of(run).state == "running"
    assert status_of(run, later=1000).state == "silent"


def test_low_disk_space_is_a_problem(run: Path) -> None:
    size = sum(path.stat().st_size for path in (run / "checkpoints/iter_0000010").iterdir())
    assert status_of(run).disk_needed_bytes == 2 * size
    found = status_of(run, min_free_disk_gib=1e6)
    assert (found.state, found.is_healthy) == ("complete", False)
    assert "disk low: " in found.problems[0]


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
    "config": (lambda run: (run / "config.yaml").write_text("train: [unclosed"), "ParserError"),
    "types": (lambda run: change_heartbeat(run, at="now"), "its at is 'now'"),
    "nested": (lambda run: (run / HEARTBEAT).write_text("[" * 100_000), "heartbeat.json is damaged"),
    "gone": (shutil.rmtree, "the folder does not exist"),
    "empty": (lambda run: [shutil.rmtree(run), run.mkdir()], "give the run_dir of a run"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_reported_and_hides_no_other(run: Path, whole: Path, damage: str) -> None:
    spoil, expected = DAMAGES[damage]
    spoil(run)
    broken, good = read_all([str(run), str(whole)], Limits(), JobStates())
    assert expected in "\n".join([broken.reason, *broken.problems])
    assert (good.state, good.problems) == ("complete", [])
    assert str(run) in as_table([broken, good])
    assert len(json.dumps(broken.problems)) < 5000
    assert "report this as a bug" not in broken.reason


def test_a_run_whose_disk_hangs_delays_no_other(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hang, read = threading.Event(), runs_module.read_status
    monkeypatch.setattr(runs_module, "read_status", lambda run, *rest: hang.wait(30) if run == "hung" else read(run, *rest))
    start = time.monotonic()
    found = read_all(["hung", str(whole)], Limits(), JobStates(), seconds=0.3)
    hang.set()
    assert time.monotonic() - start < 10
    assert [one.state for one in found] == ["unreadable", "complete"]
    assert "did not answer within" in found[0].reason


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
    assert run_folders([str(run.parent), str(run)]) == [str(run)]


def test_the_last_heartbeat_is_that_of_the_end(whole: Path) -> None:
    found = read_heartbeat(str(whole))
    assert found is not None
    assert (found.state, found.iteration, found.host) == ("complete", 10, os.uname().nodename)
    assert duration(7) == "7s"
    assert duration(3725) == "1h 02m"
    assert duration(273_600) == "3d 04h"
