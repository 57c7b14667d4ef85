"""Ranks that wait for one that never starts name it, react to signals, and all end in the same way."""

import fcntl
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from megatron_ledom.errors import StoppedWaiting, TransientError
from megatron_ledom.parallel.rendezvous import Rendezvous, StopSignal
from megatron_ledom.platform.launch import Launch
from tests.support.tiny_runs import TinyData, free_port, start_ranks


def meet(rank: int, world_size: int, port: int, seconds: float, stop: StopSignal = lambda: None) -> object:
    """Return the store, or the reason why there is none."""
    address = f"tcp://127.0.0.1:{port}"
    launch = Launch(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size, init_method=address)
    try:
        return Rendezvous(launch, timedelta(seconds=seconds), stop).store()
    except (StoppedWaiting, TransientError) as reason:
        return f"{type(reason).__name__}: {reason}"


def meet_all(ranks: list[int], world_size: int, seconds: float, stop: dict[int, StopSignal] | None = None) -> list[str]:
    """Start these ranks of `world_size`, each in a thread of this process, and return the result of each."""
    port = free_port()
    with ThreadPoolExecutor(len(ranks)) as pool:
        waits = [pool.submit(meet, rank, world_size, port, seconds, (stop or {}).get(rank, lambda: None)) for rank in ranks]
        ends = [wait.result() for wait in waits]  # the stores live until all ranks have connected
        return [end if isinstance(end, str) else "started" for end in ends]


def test_all_ranks_start() -> None:
    assert meet_all([2, 0, 1], 3, 30) == ["started"] * 3


def test_every_rank_names_those_that_never_started() -> None:
    ends = meet_all([3, 0], 5, 1.0)
    assert ends[0] == ends[1]
    assert "TransientError: ranks 1, 2, 4 of 5 were missing for 1 s (parallel.distributed_timeout_minutes)" in ends[0]


def test_ranks_without_rank_0_name_it_and_its_address() -> None:
    (end,) = meet_all([1], 2, 0.5)
    assert "rank 0 is missing: it has not answered at 127.0.0.1:" in end
    assert "Connection refused" in end


def test_a_signal_to_one_waiting_rank_ends_all_that_wait() -> None:
    started = time.monotonic()
    ends = meet_all([0, 1], 3, 30, {1: lambda: "SIGTERM" if time.monotonic() > started + 0.3 else None})
    assert ends == ["StoppedWaiting: rank 1 got SIGTERM while rank 2 of 3 was missing: nothing starts"] * 2


def test_late_ranks_are_waited_for_after_a_warning() -> None:
    """Otherwise a job whose time limit is shorter than its warning would start again and again without doing a step."""
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, 0, 2, port, 30, lambda: "SIGUSR1")
        time.sleep(2.5)
        second = pool.submit(meet, 1, 2, port, 30)
        assert not isinstance(first.result(), str), first.result()
        assert not isinstance(second.result(), str), second.result()


def test_a_port_of_another_program_is_named() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"rank 0 cannot listen on port {port} (" in str(meet(0, 2, port, 1.0))


def hang_rank_1() -> None:
    """Let rank 1 hang, and rank 0 report at once that it waits."""
    from megatron_ledom.parallel import rendezvous

    rendezvous.REPORT_SECONDS = 0.1
    if os.environ["RANK"] == "1":
        time.sleep(60)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_has_effect_while_a_rank_is_missing(data: TinyData, tmp_path: Path, number: signal.Signals, code: int) -> None:
    ranks = start_ranks(data.config, tmp_path / "run", num_ranks=2, hook=hang_rank_1)
    ranks.wait_until(lambda: "waiting: rank 1 of 2 was missing" in ranks.output())
    ranks.send(number)
    ranks.processes[0].join(20)
    assert ranks.processes[0].exitcode == code, ranks.wait(0)
    ranks.wait(0)
    assert "Traceback" not in ranks.output()
    assert ("rank 0 got SIGTERM while rank 1 of 2 was missing: nothing starts" in ranks.output()) == (code == 0)
    assert not (tmp_path / "run/config.yaml").exists()


def report_waits_at_once() -> None:
    from megatron_ledom.data.dataset import build_once

    build_once.REPORT_SECONDS = 0.1


def test_a_signal_has_effect_while_another_node_builds_the_index(data: TinyData, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    with (tmp_path / "cache/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache = f"data.path_to_cache={tmp_path}/cache"
        ranks = start_ranks(data.config, tmp_path / "run", cache, hook=report_waits_at_once)
        ranks.wait_until(lambda: "waits for the sample index" in ranks.output())
        ranks.send(signal.SIGTERM)
        assert ranks.wait(20) == [0], ranks.output()
    assert "got SIGTERM before training began: the run does not start" in ranks.output()
    assert not (tmp_path / "run").exists()
