"""A run continues from its mirror on an empty machine, bit for bit, and nothing that happens to the mirror stops a run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.mirror.contents import CHECKPOINTS, whole_checkpoints
from megatron_ledom.mirror.store import MirrorStore
from tests.support.tiny_runs import Ranks, TinyData, check_same_run, free_port, run_on_ranks, start_ranks

pytest.importorskip("s3fs", reason="the s3 extra is not installed")
pytest.importorskip("moto.server", reason="moto is not installed")

STEPS = 30
BASE = (f"train.train_iters={STEPS}", "train.eval_interval=7", "train.eval_iters=2", "checkpoint.save_interval=5")
SECRET = "a-secret-of-the-mirror"
SERVE = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"


class Server:
    """A server of the S3 protocol in a process of its own, which can be stopped and started again, empty or frozen."""

    def __init__(self) -> None:
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and make the bucket."""
        command = [sys.executable, "-c", SERVE, str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with suppress(Exception):
                self.files().mkdir("bucket")
                return
            time.sleep(0.1)
        raise AssertionError("the server did not start")

    def stop(self) -> None:
        """Kill it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def files(self) -> Any:
        """Return the file system of the server."""
        import s3fs

        return s3fs.S3FileSystem(skip_instance_cache=True)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{found.port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        found.start()
        yield found
        found.stop()


def overrides_of(data: TinyData, *more: str) -> list[str]:
    return [*BASE, f"data.valid_blend=[[1.0,{data.shard('reverse_valid')}]]", *more]


def start(data: TinyData, run_dir: Path, *more: str, num_ranks: int = 1) -> Ranks:
    """Start ranks with the credentials of this test, which the process that forks them may not have."""
    found = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    Path(data.config).with_name("credentials.json").write_text(json.dumps(found))
    return start_ranks(data.config, run_dir, *overrides_of(data, *more), num_ranks=num_ranks, hook=use_credentials)


def use_credentials() -> None:
    """Put the credentials into the environment of a rank."""
    os.environ.update(json.loads(Path(sys.argv[2]).with_name("credentials.json").read_text()))


def run(data: TinyData, run_dir: Path, *more: str, num_ranks: int = 1) -> str:
    ranks = start(data, run_dir, *more, num_ranks=num_ranks)
    codes = ranks.wait()
    assert codes == [0] * num_ranks, f"exit codes {codes}:\n{ranks.output()}"
    return ranks.log.read_text()


@pytest.fixture(scope="module")
def uninterrupted(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_on_ranks(data.config, run_dir, *overrides_of(data))
    return run_dir


def on_mirror(address: str) -> list[int]:
    return list(whole_checkpoints(MirrorStore(address)))


def test_an_empty_machine_continues_from_the_object_store(
    data: TinyData, tmp_path: Path, server: Server, uninterrupted: Path
) -> None:
    mirror, run_dir = "checkpoint.mirror=s3://bucket/empty", tmp_path / "run"
    log = run(data, run_dir, mirror, "train.exit_interval=18")
    assert on_mirror("s3://bucket/empty") == [10, 15, 18]
    shutil.rmtree(run_dir)  # the machine is gone
    log += run(data, run_dir, mirror, "train.exit_interval=18")
    assert "fetched iter_0000018 from s3://bucket/empty" in log
    check_same_run(run_dir, uninterrupted)
    assert not [name for name in os.listdir(run_dir) if name.startswith("fetch")]
    assert SECRET not in log
    files = server.files()
    stored = [files.cat_file(path) for path in files.find("bucket")]
    assert not [content for content in [*stored, *contents(run_dir)] if SECRET.encode() in content]
    with pytest.raises(AssertionError, match=r"belongs to another run \(run_dir was .*; train.seed was 42 and is 43\)"):
        run(data, tmp_path / "other", mirror, "train.seed=43")


def contents(folder: Path) -> Iterator[bytes]:
    return (path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_mirror_that_is_away_does_not_stop_the_run_and_catches_up(
    data: TinyData, tmp_path: Path, server: Server, uninterrupted: Path
) -> None:
    mirror, run_dir = "checkpoint.mirror=s3://bucket/away", tmp_path / "run"
    run(data, run_dir, mirror, "train.exit_interval=20")
    server.stop()
    try:
        log = run(data, run_dir, mirror, "checkpoint.mirror_wait_seconds=1")
    finally:
        server.start()  # it has lost everything
    check_same_run(run_dir, uninterrupted)
    assert "the mirror s3://bucket/away does not answer" in log
    assert "NOT copied to checkpoint.mirror=s3://bucket/away" in log
    assert "iter_0000030; the next start of the run" in log
    run(data, run_dir, mirror)
    assert on_mirror("s3://bucket/away") == [20, 25, 30]
    shutil.rmtree(run_dir)
    with pytest.raises(AssertionError, match="belongs to another run"):
        run(data, tmp_path / "other", mirror)


def test_a_damaged_copy_is_passed_over_for_an_older_one_on_two_ranks(data: TinyData, tmp_path: Path) -> None:
    mirror, run_dir = tmp_path / "disk/mirror", tmp_path / "run"
    settings = f"checkpoint.mirror=file://{mirror}", "checkpoint.mirror_keep_last=2", "checkpoint.async_save=false"
    whole = tmp_path / "whole"
    run(data, whole, num_ranks=2)
    run(data, run_dir, *settings, "train.exit_interval=20", num_ranks=2)
    assert on_mirror(str(mirror)) == [15, 20]
    damaged = max((mirror / CHECKPOINTS / "iter_0000020").glob("*.distcp"), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    shutil.rmtree(run_dir)
    log = run(data, run_dir, *settings, num_ranks=2)
    assert f"iter_0000020 of the mirror file://{mirror} is damaged: " in log
    assert "fetched iter_0000015" in log
    check_same_run(run_dir, whole)


def wait_for_copy(ranks: Ranks, iteration: int) -> None:
    """Wait for the copy of a checkpoint; near the end of the run for none."""
    if iteration < STEPS - 5:
        ranks.wait_until(lambda: f"copied iter_{iteration:07d}" in ranks.log.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [6])
def test_kills_at_random_moments_lose_nothing_that_was_copied(
    data: TinyData, tmp_path: Path, server: Server, uninterrupted: Path, num_kills: int
) -> None:
    """The run folder is lost with each kill, which may fall into training, a copy or a fetch."""
    seed = random.randrange(10**6)
    print("seed:", seed)
    draw, reached = random.Random(seed), 0
    mirror, run_dir = f"checkpoint.mirror=s3://bucket/kills{seed}", tmp_path / "run"
    for _ in range(num_kills):
        ranks = start(data, run_dir, mirror)
        wait_for_copy(ranks, reached + 5)
        time.sleep(draw.uniform(0, 2))
        with suppress(ProcessLookupError):
            ranks.send(signal.SIGKILL)
        ranks.wait()
        copied = [int(line.split("iter_")[1][:7]) for line in ranks.log.read_text().splitlines() if "copied iter_" in line]
        reached = max([reached, *copied])
        shutil.rmtree(run_dir)
    log = run(data, run_dir, mirror)
    assert int(log.split("fetched iter_")[1][:7]) >= reached
    check_same_run(run_dir, uninterrupted)
