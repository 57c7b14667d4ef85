"""The heartbeat of a run never stops the training: it may fail, hang or be impossible."""

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ledom.monitoring import heartbeat as module
from megatron_ledom.monitoring.heartbeat import HEARTBEAT, HeartbeatWriter, Progress, read_heartbeat
from megatron_ledom.monitoring.run_status import read_status
from tests.support.tiny_runs import TinyData, read_metrics, start_ranks


def progress() -> Progress:
    return Progress(iteration=3, activity="a step", idle_seconds=0.1, limit_seconds=300.0, is_patient=False)


def writer_of(folder: Path, seconds: float = 0.05) -> HeartbeatWriter:
    return HeartbeatWriter(str(folder), progress, 1, None, seconds)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_whose_heartbeat_cannot_be_written_trains_the_same(data: TinyData, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / HEARTBEAT / "in the way").mkdir(parents=True)
    ranks = start_ranks(data.config, run, "train.train_iters=10")
    assert ranks.wait() == [0]
    found = read_status(str(run))
    assert (found.state, found.iteration) == ("complete", 10)
    assert "Is a directory" in found.problems[0].text
    assert ranks.output().count("training continues, but `ledom status` cannot see it") == 1
    mine, other = ([record["lm_loss"] for record in read_metrics(folder)] for folder in (run, whole))
    assert mine == other


def test_a_removed_folder_is_reported_once_and_used_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    run.mkdir()
    writer = writer_of(run)
    writer.start()
    until((run / HEARTBEAT).exists)
    with caplog.at_level(logging.WARNING):
        while run.exists():
            shutil.rmtree(run, ignore_errors=True)
        until(lambda: caplog.messages)
        time.sleep(0.3)
    assert len(caplog.messages) == 1
    assert "cannot be written (No such file or directory): training continues" in caplog.messages[0]
    run.mkdir()
    until((run / HEARTBEAT).exists)
    writer.end("failed", "x" * 100_000)
    beat = read_heartbeat(str(run))
    assert beat is not None
    assert (beat.state, len(beat.reason)) == ("failed", 2000)


def test_a_disk_that_hangs_delays_the_end_by_a_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hang = threading.Event()
    monkeypatch.setattr(module, "write_whole", lambda *unused: hang.wait(60))
    monkeypatch.setattr(module, "LAST_WRITE_SECONDS", 0.3)
    writer = writer_of(tmp_path)
    writer.start()
    started = time.monotonic()
    writer.end("complete")
    assert time.monotonic() - started < 10
    hang.set()


def test_without_threads_the_run_continues_and_its_end_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    writer = writer_of(tmp_path)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    writer.start()
    writer.end("stopped", "got SIGTERM", 7)
    assert "no heartbeat is written (can't start new thread): training continues" in caplog.messages
    beat = read_heartbeat(str(tmp_path))
    assert beat is not None
    assert (beat.state, beat.iteration, beat.reason) == ("stopped", 7, "got SIGTERM")


def test_later_versions_may_add_fields_and_a_long_file_is_damaged(tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    writer.end("complete")
    path = tmp_path / HEARTBEAT
    path.write_text(json.dumps({**json.loads(path.read_text()), "new": 1}))
    assert read_heartbeat(str(tmp_path)) is not None
    path.write_text(json.dumps({**json.loads(path.read_text()), "new": "x" * 100_000}))
    assert [problem.kind for problem in read_status(str(tmp_path)).problems] == ["damaged"]
