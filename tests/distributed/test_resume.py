"""A run that was interrupted in any way and resumed by the same command equals the uninterrupted run bit for bit."""

import contextlib
import random
import resource
import signal
import time
from pathlib import Path

import pytest

from megatron_ledom.checkpoint.folder import latest_checkpoint
from megatron_ledom.checkpoint.manifest import load_manifest
from megatron_ledom.storage.hashes import content_problems, size_problems
from tests.support.tiny_runs import TinyData, check_same_run, read_metrics, run_on_ranks, start_ranks

STEPS = 30
BASE = (f"train.train_iters={STEPS}", "train.eval_interval=7", "train.eval_iters=2")
DROPOUT = ("model.attention_dropout=0.1", "model.hidden_dropout=0.1")
DISTRIBUTED = (
    "parallel.use_distributed_optimizer=true",
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
)
KINDS = {"one process": (1, ()), "dropout": (1, DROPOUT), "DP2 with distributed optimizer": (2, (*DISTRIBUTED, *DROPOUT))}


def overrides_of(data: TinyData, *more: str) -> list[str]:
    return [*BASE, f"data.valid_blend=[[1.0,{data.shard('reverse_valid')}]]", *more]


@pytest.fixture(scope="module")
def uninterrupted(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of one process, without dropout."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_on_ranks(data.config, run_dir, *overrides_of(data))
    return run_dir


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_two_parts_equals_the_uninterrupted_run(
    data: TinyData, tmp_path: Path, uninterrupted: Path, kind: str
) -> None:
    num_ranks, settings = KINDS[kind]
    whole, parts = uninterrupted, tmp_path / "parts"
    if settings:
        whole = tmp_path / "whole"
        run_on_ranks(data.config, whole, *overrides_of(data, *settings), num_ranks=num_ranks)
    command = overrides_of(data, *settings, "train.exit_interval=18")
    first = run_on_ranks(data.config, parts, *command, num_ranks=num_ranks)
    assert first[-1]["iteration"] == 18
    run_on_ranks(data.config, parts, *command, num_ranks=num_ranks)
    check_same_run(parts, whole)


@pytest.mark.parametrize("sign_of_life", ["metrics.jsonl", "checkpoints/latest"])
def test_sigterm_at_any_moment_saves_and_the_same_command_resumes(
    data: TinyData, tmp_path: Path, uninterrupted: Path, sign_of_life: str
) -> None:
    """The signal comes before or after the first checkpoint. As at the end of a batch job it reaches every process of the run:
    also those that read ahead and those of an earlier save."""
    run_dir, command = tmp_path / "run", overrides_of(data, "data.num_workers=1", "checkpoint.save_interval=9")
    ranks = start_ranks(data.config, run_dir, *command)
    ranks.wait_until(lambda: (run_dir / sign_of_life).exists() and len(read_metrics(run_dir)) > 0)
    time.sleep(random.uniform(0, 0.3))
    ranks.send(signal.SIGTERM)
    assert ranks.wait() == [0], ranks.output()
    assert "got SIGTERM" in ranks.output()
    last = read_metrics(run_dir)[-1]["iteration"]
    assert (run_dir / "checkpoints/latest").read_text() == f"iter_{last:07d}\n"
    run_on_ranks(data.config, run_dir, *command)
    check_same_run(run_dir, uninterrupted)


def test_a_signal_to_one_rank_stops_all_ranks_at_one_step(data: TinyData, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ranks = start_ranks(data.config, run_dir, "train.train_iters=300", "data.allow_repeats=true", num_ranks=2)
    ranks.wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(read_metrics(run_dir)) > 2)
    ranks.send(signal.SIGUSR1, rank=1)
    assert ranks.wait() == [0, 0], ranks.output()
    last = read_metrics(run_dir)[-1]["iteration"]
    assert (run_dir / "checkpoints/latest").read_text() == f"iter_{last:07d}\n"
    assert last < 300


def test_a_signal_while_the_run_is_being_built_ends_it_after_a_step(data: TinyData, tmp_path: Path) -> None:
    """This happens if the time limit is shorter than the warning that the job requests."""
    run_dir = tmp_path / "run"
    ranks = start_ranks(data.config, run_dir, "train.train_iters=300", "data.allow_repeats=true", num_ranks=2)
    ranks.wait_until(lambda: "platform:" in ranks.output())
    ranks.send(signal.SIGUSR1)
    assert ranks.wait() == [0, 0], ranks.output()
    last = read_metrics(run_dir)[-1]["iteration"]
    assert (run_dir / "checkpoints/latest").read_text() == f"iter_{last:07d}\n"
    assert last < 10


def test_a_checkpoint_that_a_kill_cut_short_is_ignored_and_replaced(
    data: TinyData, tmp_path: Path, uninterrupted: Path
) -> None:
    run_dir, command = tmp_path / "run", overrides_of(data, "checkpoint.save_interval=10")
    checkpoints = run_dir / "checkpoints"
    ranks = start_ranks(data.config, run_dir, *command)
    ranks.wait_until(lambda: (checkpoints / "iter_0000020.part").exists())
    ranks.send(signal.SIGKILL)
    assert ranks.wait() == [-signal.SIGKILL]
    assert (checkpoints / "latest").read_text() == "iter_0000010\n"
    (checkpoints / "iter_0000020.part").mkdir(exist_ok=True)
    (checkpoints / "iter_0000020.part/leftover").touch()
    run_on_ranks(data.config, run_dir, *command)
    check_same_run(run_dir, uninterrupted)
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["iter_0000010", "iter_0000020", "iter_0000030", "latest"]
    assert not (checkpoints / "iter_0000020/leftover").exists()


@pytest.mark.parametrize("num_kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_nothing(data: TinyData, tmp_path: Path, num_kills: int) -> None:
    """Two ranks write checkpoints in the background; the one that `latest` names is whole after every kill."""
    seed = random.randrange(10**6)
    print("seed:", seed)
    draw = random.Random(seed)
    command = overrides_of(
        data,
        *(*DISTRIBUTED, "train.micro_batch_size=2"),
        *("checkpoint.save_interval=2", "checkpoint.keep_last=3", "checkpoint.keep_interval=10"),
    )
    began = time.monotonic()
    run_on_ranks(data.config, tmp_path / "whole", *command, num_ranks=2)
    seconds, killed, number = time.monotonic() - began, 0, 0
    while killed < num_kills:
        run_dir = tmp_path / f"run{number}"
        ranks = start_ranks(data.config, run_dir, *command, num_ranks=2)
        time.sleep(draw.uniform(0, seconds))
        for rank in draw.sample([0, 1], 2):
            with contextlib.suppress(ProcessLookupError):
                ranks.send(signal.SIGKILL, rank)
        codes = ranks.wait()
        if codes == [0, 0]:  # too late: the run had ended
            check_same_run(run_dir, tmp_path / "whole")
            number += 1
            continue
        killed += 1
        check_latest_is_whole(run_dir / "checkpoints")
    run_on_ranks(data.config, run_dir, *command, num_ranks=2)
    check_same_run(run_dir, tmp_path / "whole")
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == [*(f"iter_{iteration:07d}" for iteration in (10, 20, 26, 28, 30)), "latest"]


def check_latest_is_whole(checkpoints: Path) -> None:
    """Check every byte of the latest checkpoint, if there is one."""
    latest = latest_checkpoint(str(checkpoints))
    if latest is not None:
        files = load_manifest(latest).files
        assert size_problems(latest, files) == content_problems(latest, files) == []


def test_a_full_disk_ends_the_run_with_an_error_and_it_resumes_later(
    data: TinyData, tmp_path: Path, uninterrupted: Path
) -> None:
    run_dir, command = tmp_path / "run", overrides_of(data, "checkpoint.save_interval=5")
    ranks = start_ranks(data.config, run_dir, *command)
    ranks.wait_until(lambda: (run_dir / "checkpoints/latest").exists())
    resource.prlimit(ranks.processes[0].pid, resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    assert ranks.wait() == [1], ranks.output()
    assert "cannot be written: File too large; make room, then run the same command again" in ranks.output()
    latest = (run_dir / "checkpoints/latest").read_text().strip()
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir())[-2:] == [latest, "latest"]
    check_latest_is_whole(run_dir / "checkpoints")
    run_on_ranks(data.config, run_dir, *command)
    check_same_run(run_dir, uninterrupted)


def test_a_tensor_parallel_checkpoint_resumes_as_a_pipeline(data: TinyData, tmp_path: Path, uninterrupted: Path) -> None:
    run_dir, two = tmp_path / "run", "model_parallel_size=2"
    run_on_ranks(data.config, run_dir, *overrides_of(data, f"parallel.tensor_{two}", "train.exit_interval=12"), num_ranks=2)
    records = run_on_ranks(data.config, run_dir, *overrides_of(data, f"parallel.pipeline_{two}"), num_ranks=2)
    assert [record["iteration"] for record in records] == list(range(1, STEPS + 1))
    for found, expected in zip(records, read_metrics(uninterrupted), strict=True):
        assert found["lm_loss"] == pytest.approx(expected["lm_loss"], rel=1e-5)


def test_a_finished_run_started_again_changes_nothing(data: TinyData, uninterrupted: Path) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes(), sorted((uninterrupted / "checkpoints").iterdir())
    ranks = start_ranks(data.config, uninterrupted, *overrides_of(data))
    assert ranks.wait() == [0], ranks.output()
    assert f"at iteration {STEPS}" in ranks.output()
    assert ((uninterrupted / "metrics.jsonl").read_bytes(), sorted((uninterrupted / "checkpoints").iterdir())) == before
