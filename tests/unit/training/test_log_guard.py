"""Logs that cannot be written are reported and never end a training; damaged ones are named by file and line."""

import json
import logging
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.callbacks import metrics
from megatron_ledom.callbacks.metrics import MetricsWriter
from megatron_ledom.config.load import load_config
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import DataError
from megatron_ledom.storage.records import append_record, drop_after, read_records
from megatron_ledom.training import history
from megatron_ledom.training.history import RunHistory, check_history
from megatron_ledom.training.step_policy import PastStep
from tests.support.tiny_runs import TinyData

LIMIT_BYTES = 4000


@pytest.fixture
def config(data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A config whose run folder exists; this process is rank 0."""
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr(history, "from_first_rank", lambda work: work())
    (tmp_path / "run").mkdir()
    return load_config(str(data.config), [f"run_dir={tmp_path / 'run'}", "logging.tensorboard=true"])


@contextmanager
def full_disk() -> Iterator[None]:
    """Inside, no file grows beyond LIMIT_BYTES."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def record(iteration: int, **more: Any) -> dict[str, Any]:
    return {"iteration": iteration, "lm_loss": 5.0, "grad_norm": 1.0, **more}


def step(iteration: int) -> PastStep:
    return PastStep(iteration, 5.0, 1.0, None, False)


def iterations(path: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in path.read_text().splitlines()]


def test_a_full_disk_loses_records_and_reports_how_many(config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    """Files stay whole, writing continues when there is space again, and the losses are reported at the end."""
    run_dir = Path(config.run_dir)
    writer, steps = MetricsWriter(config, 0), RunHistory(config.run_dir, ())
    steps.resume_from(0, 8)
    with full_disk():
        for iteration in range(1, 101):
            writer.write(record(iteration, padding="x" * 50))
            steps.write_step(step(iteration))
            steps.sync()
        steps.write_bad_step({**record(100), "samples": "x" * LIMIT_BYTES})
    errors = [found.getMessage() for found in caplog.records if found.levelno == logging.ERROR]
    paths = [str(run_dir / name) for name in ("metrics.jsonl", "tensorboard", "steps.jsonl", "bad_steps.jsonl")]
    assert sorted(message.split()[0] for message in errors) == sorted(paths)  # each once
    assert all("cannot be written (File too large)" in message for message in errors)
    writer.write(record(101))
    steps.write_step(step(101))
    for name, lost in (("metrics.jsonl", writer.lost()), ("steps.jsonl", steps.lost())):
        found = iterations(run_dir / name)
        assert found == [*range(1, len(found)), 101]
        assert lost[str(run_dir / name)] == 101 - len(found)
    assert writer.lost()[str(run_dir / "tensorboard")] > 0
    assert (run_dir / "bad_steps.jsonl").read_bytes() == b""
    caplog.clear()
    writer.close()
    steps.close()
    ends = {found.getMessage() for found in caplog.records}
    for where, number in (writer.lost() | steps.lost()).items():
        assert f"{where} lacks {number} records that could not be written" in ends


def test_a_log_that_cannot_be_opened_does_not_end_a_training(config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = Path(config.run_dir)
    (run_dir / "tensorboard").touch()
    (run_dir / "metrics.jsonl").mkdir()
    writer = MetricsWriter(config, 0)
    writer.write(record(1))
    assert set(writer.lost().values()) == {1}
    after_a_return = MetricsWriter(config, 0, writer.lost())
    assert after_a_return.lost() == writer.lost()
    for each in (writer, after_a_return):
        each.close()
    assert f"{run_dir}/metrics.jsonl cannot be written (Is a directory)" in caplog.text
    assert f"{run_dir}/tensorboard cannot be written" in caplog.text


def test_weights_and_biases_that_fails_does_not_end_a_training(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        def log(self, flat: dict[str, float], step: int) -> None:
            raise ConnectionError("no network")

    config.logging.wandb_project = "tiny"
    monkeypatch.setattr(metrics, "_start_wandb", lambda config: Run())
    writer = MetricsWriter(config, 0)
    for iteration in (1, 2):
        writer.write(record(iteration))
    writer.close()
    assert writer.lost() == {"Weights & Biases": 2}


def test_a_record_that_is_not_finite_is_written_as_json(config: RunConfig) -> None:
    writer = MetricsWriter(config, 0)
    writer.write(record(1, validation={"set": {"lm_loss": float("nan"), "bits_per_byte": float("inf")}}))
    text = Path(config.run_dir, "metrics.jsonl").read_text()
    assert json.loads(text)["validation"] == {"set": {"lm_loss": None, "bits_per_byte": None}}


DAMAGES = {
    "torn in the middle": b'{"iteration": 2, "lm_l',
    "not UTF-8": b'{"iteration": 2, "lm_loss": "\xff"}',
    "zeros": b"\0" * 40,
    "another kind": b"[1, 2]",
    "no iteration": b'{"lm_loss": 2.0}',
    "an iteration that is not a number": b'{"iteration": "2"}',
    "empty": b"",
    "nested too deeply": 100_000 * b"[",
    "a number too large": b'{"iteration": 2, "lm_loss": 1' + 400 * b"0" + b"}",
    "a skip that is not a truth value": b'{"iteration": 2, "lm_loss": 2.0, "grad_norm": 1.0, "score": "x", "skipped": "no"}',
}
OF_STEPS = ("a number too large", "a skip that is not a truth value")
"""Damages only of steps.jsonl: a start reads nothing but the iteration from the other files."""
LOGS = ("metrics.jsonl", "steps.jsonl", "bad_steps.jsonl")


@pytest.mark.parametrize(
    ("name", "damage"), [(name, damage) for damage in DAMAGES for name in (["steps.jsonl"] if damage in OF_STEPS else LOGS)]
)
def test_a_damaged_line_is_refused_by_file_and_number(config: RunConfig, name: str, damage: str) -> None:
    path = Path(config.run_dir, name)
    good = {"iteration": 1, "lm_loss": 2.0, "grad_norm": 1.0, "score": None, "skipped": False}
    whole = json.dumps(good).encode()
    path.write_bytes(b"\n".join([whole, DAMAGES[damage], whole, b""]))
    before = path.read_bytes()
    with pytest.raises(
        DataError, match=rf"{path}:2: this line is damaged \(.+\); delete it with `sed -i 2d {path}` and start"
    ) as caught:
        check_history(config, "a checkpoint")
    assert caught.value.exit_code == 1
    assert path.read_bytes() == before
    path.write_bytes(b"\n".join([whole, whole, DAMAGES[damage]]))  # an incomplete last line, as a kill leaves it
    check_history(config, "a checkpoint")


@pytest.mark.parametrize(
    "line",
    [
        '{"config": null, "from_iteration": "x"}',
        '{"config": null, "from_iteration": 0}',
        '{"config": {"checkpoint": 3}, "from_iteration": 0}',
        '{"config": {"checkpoint": {"save_interval": "2"}}, "from_iteration": 0}',
        '{"from_iteration": "x"}',
        '{"from_iteration": 0, "world_size": null}',
    ],
)
@pytest.mark.parametrize("checkpoint", [None, "a checkpoint"])
def test_a_damaged_launch_is_refused_by_file_and_number(config: RunConfig, line: str, checkpoint: str | None) -> None:
    path = Path(config.run_dir, "launches.jsonl")
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=rf"{path}:1: this line is damaged \(its .*\); delete it"):
        check_history(config, checkpoint)


@pytest.mark.parametrize("name", ["metrics.jsonl", "steps.jsonl", "bad_steps.jsonl", "launches.jsonl", "saves.jsonl"])
def test_a_folder_instead_of_a_log_is_refused_with_its_path(config: RunConfig, name: str) -> None:
    path = Path(config.run_dir, name)
    path.mkdir()
    with pytest.raises(DataError, match=f"{path} is a folder, but must be a file of records; move it away"):
        check_history(config, "a checkpoint")


@pytest.mark.parametrize(
    "content",
    [
        100_000 * "[",
        '{"iterations": "12"}',
        '{"iterations": [1.5]}',
        "",
        "[]",
        '{"iterations": 3}',
        '{"iterations": ["x"]}',
        '{"other": 1}',
    ],
)
def test_a_damaged_list_of_iterations_to_skip_is_refused(config: RunConfig, content: str) -> None:
    path = Path(config.run_dir, "skip_iterations.json")
    path.write_text(content)
    with pytest.raises(DataError, match=f"{path} is damaged .* list them in train.skip_iterations"):
        check_history(config, None)


def test_a_start_from_iteration_0_keeps_the_records_of_the_previous_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for number in (1, 2):
        content = json.dumps(record(number)) + "\n"
        path.write_text(content)
        drop_after(str(path), 0)
        assert not path.exists()
        assert (tmp_path / f"metrics.jsonl.{number}").read_text() == content
    path.write_text('{"iteration": 1')  # nothing whole
    drop_after(str(path), 0)
    assert path.read_text() == ""


@pytest.mark.parametrize("evidence", ["records", "a launch", "imported weights", "a save"])
def test_a_run_that_had_checkpoints_does_not_restart_without_them(config: RunConfig, evidence: str) -> None:
    """A save waits for the previous one: a record after the second save, or a launch that resumed, proves a checkpoint."""
    interval = config.checkpoint.save_interval
    append_record(os.path.join(config.run_dir, "metrics.jsonl"), record(2 * interval))
    append_record(os.path.join(config.run_dir, "launches.jsonl"), {"from_iteration": 0})
    check_history(config, None)
    if evidence == "records":
        append_record(os.path.join(config.run_dir, "metrics.jsonl"), record(2 * interval + 1))
    elif evidence == "a save":
        append_record(os.path.join(config.run_dir, "saves.jsonl"), {"iteration": 2})
    else:
        resumed = {"from_iteration": 5} if evidence == "a launch" else {"from_iteration": 0, "from_checkpoint": "iter_0000000"}
        append_record(os.path.join(config.run_dir, "launches.jsonl"), resumed)
    with pytest.raises(DataError, match=r"had checkpoints, but .*checkpoints has none: restore them"):
        check_history(config, None)
    check_history(config, "a checkpoint")


def bytes_read(work: Callable[[], object]) -> int:
    """Return the number of bytes that this process reads from files during `work`."""

    def so_far() -> int:
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])

    before = so_far()
    work()
    return so_far() - before


def test_recording_a_bad_step_reads_no_more_after_many(config: RunConfig) -> None:
    """Each record has the launch and decides which checkpoints to keep, but the files are read only once, at the start."""
    run_dir = config.run_dir
    append_record(os.path.join(run_dir, "launches.jsonl"), {"from_iteration": 0, "config": "x" * 5000})
    steps = RunHistory(run_dir, ())
    steps.resume_from(0, 8)

    def note(first: int) -> None:
        for iteration in range(first, first + 20):
            steps.write_bad_step(record(iteration, samples="x" * 1000))
            assert list(steps.newest_bad_steps or ())[-1] == iteration
            assert steps.launch == 1

    early = bytes_read(lambda: note(1))
    for iteration in range(21, 400):
        steps.write_bad_step(record(iteration, samples="x" * 1000))
    assert bytes_read(lambda: note(400)) <= early + 1000
    assert list(steps.newest_bad_steps or ()) == [418, 419]
    assert len(read_records(os.path.join(run_dir, "bad_steps.jsonl"))) == 419
