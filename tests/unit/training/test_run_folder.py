"""One launch at a time has a run folder: the lock ends with the process that holds it, whatever its children do."""

import errno
import fcntl
import importlib.util
import multiprocessing
import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.config.load import load_config, save_config
from megatron_ledom.errors import ConfigError, DataError, PlanError, TransientError, UsageError
from megatron_ledom.pretrain import check_start
from megatron_ledom.training import run_folder
from megatron_ledom.training.run_folder import (
    as_recorded,
    check_still_latest,
    check_writable,
    lock_run,
    warn_of_later_checkpoints,
)
from tests.support.tiny_runs import TinyData

FORK = multiprocessing.get_context("fork")


def hold(run_dir: str, begun: Any, seconds: float) -> None:
    """Lock the run folder as a launch does, with a worker process that outlives it."""
    with lock_run(run_dir):
        FORK.Process(target=time.sleep, args=(20,), daemon=True).start()
        begun.set()
        time.sleep(seconds)


def start_holder(run_dir: Path, seconds: float = 600) -> Any:
    begun = FORK.Event()
    holder = FORK.Process(target=hold, args=(str(run_dir), begun, seconds))
    holder.start()
    assert begun.wait(30)
    return holder


def test_a_second_launch_reports_who_has_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    holder = start_holder(tmp_path / "run")
    try:
        who = rf"run_dir={tmp_path / 'run'} is being written by process {holder.pid} on {socket.gethostname()}, SLURM job 77, since 2"
        with pytest.raises(UsageError, match=who), lock_run(str(tmp_path / "run")):
            pass
    finally:
        holder.kill()
        holder.join()


def test_the_lock_of_a_killed_launch_is_free_though_its_workers_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "PATIENCE_SECONDS", 0.3)
    holder = start_holder(tmp_path / "run")
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with lock_run(str(tmp_path / "run")):
        assert f"process {os.getpid()} on" in (tmp_path / "run/lock").read_text()


def test_a_launch_waits_for_the_previous_one_to_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    holder = start_holder(tmp_path / "run", seconds=0.5)
    with lock_run(str(tmp_path / "run")):
        assert f"is being written by process {holder.pid}" in caplog.text
    holder.join()


def test_without_locks_a_run_continues_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*arguments: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with lock_run(str(tmp_path / "run")):
        assert "a file system without locks (Function not implemented)" in caplog.text


def test_an_outdated_checkpoint_is_not_resumed_after_a_wait(data: TinyData, tmp_path: Path) -> None:
    config = load_config(str(data.config), [f"run_dir={tmp_path}"])
    check_still_latest(config, None)
    (tmp_path / "checkpoints/iter_0000004").mkdir(parents=True)
    (tmp_path / "checkpoints/latest").write_text("iter_0000004\n")
    with pytest.raises(
        TransientError,
        match=r"found no checkpoint to resume from, but another launch saved .*iter_0000004 while it waited; start",
    ) as caught:
        check_still_latest(config, None)
    assert caught.value.exit_code == 3


def test_a_warning_names_checkpoints_after_the_one_in_latest(
    data: TinyData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(str(data.config), [f"run_dir={tmp_path}"])
    for name in ("iter_0000004", "iter_0000008", "iter_0000012"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    warn_of_later_checkpoints(config, str(tmp_path / "checkpoints/iter_0000012"))
    assert caplog.text == ""
    warn_of_later_checkpoints(config, str(tmp_path / "checkpoints/iter_0000004"))
    assert (
        "resumes from iter_0000004, as `latest` says; it will replace later checkpoints, iter_0000008, iter_0000012"
        in caplog.text
    )


def test_a_full_disk_at_the_start_is_named_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with (
        pytest.raises(DataError, match=rf"{tmp_path}/run/lock cannot be written: No space left"),
        lock_run(str(tmp_path / "run")),
    ):
        pass


def test_a_check_refuses_a_run_folder_that_cannot_be_made_and_makes_none(data: TinyData, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"run_dir=.*file/deep/run cannot be written \(.*/file is not a folder\)"):
        check_start(load_config(str(data.config), [f"run_dir={tmp_path}/file/deep/run"]), 1)
    check_start(load_config(str(data.config), [f"run_dir={tmp_path}/new/run"]), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_write_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, how: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="no permission to write to"):
        check_writable(str(tmp_path / "run"))


def test_a_check_refuses_wandb_where_it_is_not_installed(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else find(name))
    config = load_config(str(data.config), [f"run_dir={tmp_path}/run", "logging.wandb_project=ledom"])
    with pytest.raises(UsageError, match=r"logging.wandb_project is set but wandb is not installed"):
        check_start(config, 1)


@pytest.mark.parametrize(
    ("setting", "module", "sentence"),
    [
        ("mlflow_experiment=tiny", "mlflow", "mlflow is not installed: pip install 'megatron-ledom\\[mlflow\\]'"),
        ("otlp_endpoint=http://host:4318", "opentelemetry.sdk", "is not installed: pip install 'megatron-ledom\\[otlp\\]'"),
        ("mlflow_experiment=tiny", "", "but no address: set logging.mlflow_uri or MLFLOW_TRACKING_URI"),
    ],
)
def test_a_check_refuses_a_tracker_without_its_client_or_its_address(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, module: str, sentence: str
) -> None:
    find = importlib.util.find_spec

    def found(name: str) -> Any:
        if name == module:
            raise ModuleNotFoundError(name)
        return True if name == "mlflow" else find(name)

    monkeypatch.setattr("importlib.util.find_spec", found)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=f"logging.{setting.partition('=')[0]} is set.*{sentence}"):
        check_start(load_config(str(data.config), [f"run_dir={tmp_path}/run", f"logging.{setting}"]), 1)
    assert not (tmp_path / "run").exists()


LARGE = ["model.num_layers=96", "model.hidden_size=12288", "model.num_attention_heads=96", "model.ffn_hidden_size=32768"]


def test_a_check_refuses_a_plan_that_does_not_fit_unless_it_is_accepted(data: TinyData, tmp_path: Path) -> None:
    settings = [f"run_dir={tmp_path}/run", "parallel.hardware=h100-sxm", "checkpoint.save_interval=1"]
    large = load_config(str(data.config), [*settings, *LARGE])
    with pytest.raises(
        PlanError, match=r"memory: NO: [\d,.]+ of 79.1 GiB .*; disk: NO: 6 more checkpoints of 1.\d TiB"
    ) as refused:
        check_start(large, 1)
    assert refused.value.exit_code == 1
    assert "memory: NO: " in check_start(large, 1, accept_plan=True)
    told = check_start(load_config(str(data.config), settings), 1).splitlines()
    assert told[0] == "1 ranks would start from iteration 0 of 20"
    assert "NO: " not in "".join(told)


def test_a_check_refuses_muon_where_it_cannot_run(data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ledom.platform.core_versions.core_version", lambda: (0, 16, 1))
    monkeypatch.setattr("megatron_ledom.training.preflight.check_core", lambda: None)
    config = load_config(str(data.config), [f"run_dir={tmp_path}/run", "optimizer.optimizer=muon"])
    with pytest.raises(UsageError, match=r"optimizer.optimizer=muon needs megatron-core 0.19 or newer, found 0.16.1"):
        check_start(config, 1)
    assert not (tmp_path / "run").exists()


def test_a_run_that_kept_all_checkpoints_keeps_them_when_it_resumes_with_the_default(
    data: TinyData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def resumed(keep_last: str, recorded: int | None = None) -> int | None:
        """Return checkpoint.keep_last of a run that recorded `recorded`, and resumes with an option."""
        old = load_config(str(data.config), [f"run_dir={tmp_path}"])
        save_config(replace(old, checkpoint=replace(old.checkpoint, keep_last=recorded)), f"{tmp_path}/config.yaml")
        return as_recorded(load_config(str(data.config), [f"run_dir={tmp_path}", keep_last])).checkpoint.keep_last

    assert resumed("checkpoint.save_interval=5") is None
    assert "this run has kept all checkpoints" in caplog.text
    caplog.clear()
    assert resumed("checkpoint.keep_last=4") == 4
    assert resumed("checkpoint.keep_last=null") is None
    assert resumed("checkpoint.save_interval=5", recorded=5) == 5
    assert as_recorded(load_config(str(data.config), [f"run_dir={tmp_path}/new"])).checkpoint.keep_last == 5
    assert not caplog.text


def test_a_recorded_config_that_cannot_be_read_deletes_no_checkpoints(data: TinyData, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: [")
    assert (
        as_recorded(load_config(str(data.config), [f"run_dir={tmp_path}", "checkpoint.keep_last=5"])).checkpoint.keep_last
        is None
    )
    assert (
        as_recorded(load_config(str(data.config), [f"run_dir={tmp_path}", "checkpoint.keep_last=2"])).checkpoint.keep_last == 2
    )
