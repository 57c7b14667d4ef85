"""Ranks that wait for one that never starts: they name it, hear signals, and end all alike."""

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from megatron_ledom.errors import TransientError
from megatron_ledom.parallel.meeting import Meeting, StoppedWaiting, StopSignal
from megatron_ledom.platform.launch import Launch
from tests.tiny_runs import TinyData, free_port, start_ranks


def meet(rank: int, world_size: int, port: int, seconds: float, stop: StopSignal = lambda: None) -> object:
    """The store, or why there is none."""
    place = f"tcp://127.0.0.1:{port}"
    launch = Launch(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size, init_method=place)
    try:
        return Meeting(launch, timedelta(seconds=seconds), stop).store()
    except (StoppedWaiting, TransientError) as reason:
        return f"{type(reason).__name__}: {reason}"


def meet_all(ranks: list[int], world_size: int, seconds: float, stop: dict[int, StopSignal] | None = None) -> list[str]:
    """What became of these ranks of `world_size`, each in a thread of this process."""
    port = free_port()
    with ThreadPoolExecutor(len(ranks)) as pool:
        waits = [pool.submit(meet, rank, world_size, port, seconds, (stop or {}).get(rank, lambda: None)) for rank in ranks]
        ends = [wait.result() for wait in waits]  # the stores live until all have met
        return [end if isinstance(end, str) else "started" for end in ends]


def test_ranks_that_are_all_there_start() -> None:
    assert meet_all([2, 0, 1], 3, 30) == ["started"] * 3


def test_every_rank_names_those_that_never_started() -> None:
    ends = meet_all([3, 0], 5, 1.0)
    assert ends[0] == ends[1]
    assert "TransientError: ranks 1, 2, 4 of 5 were missing for 1 s (parallel.distributed_timeout_minutes)" in ends[0]


def test_ranks_without_rank_0_name_it_and_its_address() -> None:
    (end,) = meet_all([1], 2, 0.5)
    assert "missing is rank 0, which has not answered at 127.0.0.1:" in end
    assert "Connection refused" in end


def test_a_signal_to_one_waiting_rank_ends_all_that_wait() -> None:
    started = time.monotonic()
    ends = meet_all([0, 1], 3, 30, {1: lambda: "SIGUSR1" if time.monotonic() > started + 0.3 else None})
    assert ends == ["StoppedWaiting: rank 1 got SIGUSR1 while rank 2 of 3 was missing: nothing starts"] * 2


def test_a_port_of_another_program_is_named() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"rank 0 cannot listen on port {port} (" in str(meet(0, 2, port, 1.0))


def hang_rank_1() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(60)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_is_heard_while_a_rank_is_missing(data: TinyData, tmp_path: Path, number: signal.Signals, code: int) -> None:
    ranks = start_ranks(data.config, tmp_path / "run", num_ranks=2, hook=hang_rank_1)
    ranks.wait_until(lambda: "training data" in ranks.output())
    time.sleep(1.0)
    ranks.send(number)
    ranks.processes[0].join(20)
    assert ranks.processes[0].exitcode == code, ranks.wait(0)
    ranks.wait(0)
    assert "Traceback" not in ranks.output()
    assert ("rank 0 got SIGTERM while rank 1 of 2 was missing: nothing starts" in ranks.output()) == (code == 0)
    assert not (tmp_path / "run/config.yaml").exists()
