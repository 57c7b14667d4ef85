"""If a rank hangs, the run names that rank with its stack, not those that wait for it, and all ranks end."""

import signal
import time
from functools import partial
from pathlib import Path

import pytest

from megatron_ledom.monitoring.heartbeat import read_heartbeat
from megatron_ledom.training.watchdog import EXIT_CODE
from tests.support.injected_errors import inject
from tests.support.tiny_runs import TinyData, as_srun_starts_it, read_metrics, run_on_ranks, start_ranks

SECONDS = 4
LONG = ("train.train_iters=2000", "data.allow_repeats=true", f"train.watchdog_seconds={SECONDS}")
LAYOUTS = {
    "alone": (1, 0, ()),
    "data parallel": (2, 1, ()),
    "tensor parallel": (2, 0, ("parallel.tensor_model_parallel_size=2",)),
    "first of two stages": (2, 0, ("parallel.pipeline_model_parallel_size=2",)),
    "last of two stages": (2, 1, ("parallel.pipeline_model_parallel_size=2",)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_that_hangs_is_named_with_its_stack(data: TinyData, tmp_path: Path, layout: str) -> None:
    num_ranks, hanging, settings = LAYOUTS[layout]
    run_dir = tmp_path / "run"
    ranks = start_ranks(data.config, run_dir, *LONG, *settings, num_ranks=num_ranks, hook=partial(inject, f"sleep:4:{hanging}"))
    ranks.wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(read_metrics(run_dir)) == 3)
    started = time.monotonic()
    assert ranks.wait() == [EXIT_CODE] * num_ranks, ranks.output()
    assert time.monotonic() - started < 15 * SECONDS  # the rank would hang for a thousand seconds
    output = ranks.log.read_text(encoding="utf-8")
    assert f"rank {hanging} (" in output
    assert " hangs: iteration 4, " in output
    assert output.count("hangs:") == 1
    assert "_sleep_here" in output
    beat = read_heartbeat(str(run_dir))
    assert beat is not None
    assert (beat.state, f"rank {hanging} (" in beat.reason, "hangs:" in beat.reason) == ("failed", True, True)
    assert "_sleep_here" not in beat.reason
    for rank in range(num_ranks):
        assert ("_sleep_here" in (run_dir / f"stacks/rank_{rank}.txt").read_text()) == (rank == hanging)


def hang_under_srun(error: str) -> None:
    inject(error)
    as_srun_starts_it()


def test_ranks_that_srun_started_find_each_other(data: TinyData, tmp_path: Path) -> None:
    """srun sets none of torchrun's variables; without a common store each rank would blame the other, without its stack."""
    hook = partial(hang_under_srun, "sleep:4:1")
    settings = (*LONG, "train.exit_before_limit_seconds=0")
    ranks = start_ranks(data.config, tmp_path / "run", *settings, num_ranks=2, hook=hook)
    assert ranks.wait() == [EXIT_CODE] * 2, ranks.output()
    output = ranks.log.read_text(encoding="utf-8")
    assert output.count("hangs:") == 1
    assert "rank 1 (" in output
    assert "_sleep_here" in output


@pytest.mark.parametrize("hanging", [0, 1])
def test_a_stopped_process_is_named(data: TinyData, tmp_path: Path, hanging: int) -> None:
    """A stopped process cannot report; that of rank 0 also runs the store for the reports of the others."""
    run_dir = tmp_path / "run"
    ranks = start_ranks(data.config, run_dir, *LONG, num_ranks=2)
    ranks.wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(read_metrics(run_dir)) > 2)
    ranks.send(signal.SIGSTOP, rank=hanging)
    other = ranks.processes[1 - hanging]
    other.join(15 * SECONDS)
    assert other.exitcode == EXIT_CODE, ranks.output()
    ranks.send(signal.SIGKILL, rank=hanging)
    assert ranks.wait()[hanging] == -signal.SIGKILL
    if hanging == 1:
        assert "rank 1 (" in ranks.output()
        assert "hangs: it does not answer" in ranks.output()
        assert "state T (stopped)" in ranks.output()
    else:
        assert "the process that runs it is stopped or gone" in ranks.output()


@pytest.mark.slow
def test_a_blocked_interpreter_ends_with_its_stack(data: TinyData, tmp_path: Path) -> None:
    """C code sleeps and keeps the interpreter's lock: no Python thread runs, but faulthandler's thread does."""
    limits = ("parallel.distributed_timeout_minutes=1", "train.watchdog_seconds=2")
    ranks = start_ranks(data.config, tmp_path / "run", *LONG, *limits, hook=partial(inject, "block:4"))
    assert ranks.wait() == [EXIT_CODE], ranks.output()
    assert "Timeout" in ranks.output()
    assert "_inject" in ranks.output() or "slow_forward" in ranks.output()


def test_long_work_is_not_mistaken_for_a_hang(data: TinyData, tmp_path: Path) -> None:
    """Saving, publishing, a trace and the end take five seconds each, with a limit of three; steps are slow but progress."""
    run_dir = tmp_path / "run"
    settings = ("train.train_iters=8", "checkpoint.save_interval=4", "train.watchdog_seconds=3", "logging.profile_start=2")
    errors = "slow_save:5,slow_publish:5:0,slow_trace:5,slow_close:5:0,slow:1"
    run_on_ranks(data.config, run_dir, *settings, num_ranks=2, hook=partial(inject, errors))
    assert len(list((run_dir / "profile").iterdir())) == 1
    assert not (run_dir / "stacks").exists()


def test_zero_seconds_switch_the_watchdog_off(data: TinyData, tmp_path: Path) -> None:
    run_on_ranks(data.config, tmp_path / "run", "train.train_iters=4", "train.watchdog_seconds=0")
