"""Worker processes: order, back pressure and every kind of death; nothing hangs and no process is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ledom.errors import DataError, LedomError
from megatron_ledom.platform.processes import ordered_map


def mapped(function: object, items: object, workers: int) -> Iterator[object]:
    return ordered_map(function, items, workers, lambda item: f"item {item}")  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.02 if item % 3 == 0 else 0)
        return item * item

    assert list(mapped(slow_first, range(20), workers)) == [item * item for item in range(20)]
    assert list(mapped(slow_first, [], workers)) == []


def test_items_and_results_larger_than_a_pipe_do_not_block_each_other() -> None:
    results = list(mapped(lambda item: item * 2, [bytes([index]) * 3_000_000 for index in range(9)], 2))
    assert [len(result) for result in results] == [6_000_000] * 9  # type: ignore[arg-type]


def test_a_free_worker_takes_the_next_item() -> None:
    """A slow item occupies one worker; the other processes the rest."""

    def slow_zero(item: int) -> int:
        time.sleep(0.5 if item == 0 else 0)
        return os.getpid()

    pids = list(mapped(slow_zero, range(20), 2))
    assert len(set(pids)) == 2
    assert pids.count(pids[0]) == 1


def test_an_error_is_raised_unchanged_and_at_once() -> None:
    def fail_at_three(item: int) -> int:
        if item == 3:
            raise DataError(f"bad {item}")
        return item

    with pytest.raises(DataError, match=r"^bad 3$"):
        list(mapped(fail_at_three, range(9), 3))


def test_the_parent_is_called_while_it_waits() -> None:
    calls: list[int] = []
    results = ordered_map(lambda item: time.sleep(0.7), [1], 1, str, lambda: calls.append(1))
    assert list(results) == [None]
    assert len(calls) >= 3


def test_an_unexpected_exception_names_the_item_and_shows_where() -> None:
    with pytest.raises(LedomError, match=r"a worker failed on item 0; [\s\S]*ZeroDivisionError"):
        list(mapped(lambda item: 1 // item, [0, 1], 2))


@pytest.mark.parametrize("how", ["killed", "exited"])
def test_a_dead_worker_is_an_error_not_a_hang(how: str) -> None:
    def die_at_five(item: int) -> int:
        if item == 5:
            os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else os._exit(3)
        return item

    words = "was killed by SIGKILL" if how == "killed" else "ended with code 3"
    with pytest.raises(LedomError, match=f"{words} at item 5; the usual cause is too little memory"):
        list(mapped(die_at_five, range(20), 2))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(is_running, pids))


def test_no_worker_outlives_the_iteration() -> None:
    def pid(item: int) -> int:
        time.sleep(0 if item == 0 else 60)
        return os.getpid()

    results = mapped(pid, range(9), 3)
    pids = [int(str(next(results)))]
    assert all(map(is_running, pids))
    results.close()  # type: ignore[attr-defined]
    assert wait_until_gone(pids)


def test_no_worker_outlives_a_killed_parent() -> None:
    code = """if True:
        import os, time
        from megatron_ledom.platform.processes import ordered_map
        from multiprocessing import active_children
        results = ordered_map(lambda item: time.sleep(60 if item else 0), range(9), 3, str)
        next(results)
        print(*[child.pid for child in active_children()], flush=True)
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 3
    assert wait_until_gone(pids)
