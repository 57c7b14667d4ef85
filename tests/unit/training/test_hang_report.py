"""The watchdog's verdict on which rank hangs, from invented reports."""

from traceback import FrameSummary

from megatron_ledom.training.watchdog import RankReport, is_waiting, verdict


def report(rank: int, *, waiting: bool, iteration: int = 7, steps: int = 100) -> RankReport:
    return RankReport(
        rank=rank,
        host="node1",
        pid=1000 + rank,
        iteration=iteration,
        activity="forward and backward",
        steps=steps,
        seconds=301.0,
        is_waiting=waiting,
        stack=f"stack of {rank}\n",
    )


def verdict_on(*reports: RankReport, world_size: int) -> str:
    processes = {rank: f"node1 {1000 + rank}" for rank in range(world_size)}
    return verdict({one.rank: one for one in reports}, processes, world_size, "run/stacks")


def test_the_rank_outside_a_collective_is_named_with_its_stack() -> None:
    text = verdict_on(report(0, waiting=True), report(1, waiting=False), report(2, waiting=True), world_size=3)
    assert "rank 1 (node1, pid 1001) hangs: iteration 7, forward and backward" in text
    assert "stack of 1" in text
    assert "stack of 0" not in text
    assert "2 of 3 ranks wait for others: 0, 2" in text


def test_a_rank_that_does_not_answer_is_named_before_those_that_do() -> None:
    text = verdict_on(report(0, waiting=True), report(2, waiting=False), world_size=3)
    assert "rank 1 (node1, pid 1001) hangs: it does not answer" in text
    assert "stack of 2" not in text


def test_if_all_wait_the_least_advanced_is_named() -> None:
    text = verdict_on(report(0, waiting=True), report(1, waiting=True, iteration=6, steps=900), world_size=2)
    assert "every rank waits for others, or for its device" in text
    assert "rank 1 (node1, pid 1001) hangs: iteration 6" in text


def test_waiting_is_recognized_by_the_innermost_library_call() -> None:
    loop = FrameSummary("/code/megatron_ledom/training/trainer.py", 20, "train", line="result = run_iteration()")
    cases = {
        ("/env/torch/distributed/distributed_c10d.py", "work.wait()"): True,
        ("/env/megatron/core/pipeline_parallel/p2p_communication.py", "req.wait()"): True,
        ("/code/megatron_ledom/training/trainer.py", "return float(total[0]), float(total[1])"): True,
        ("/env/torch/utils/data/dataloader.py", "data = self._data_queue.get(timeout=timeout)"): False,
        ("/code/corpus/reader.py", "self.event.wait()"): False,
        ("/env/megatron/core/datasets/gpt_dataset.py", "return self.dataset.get(index)"): False,
    }
    for (filename, line), waits in cases.items():
        assert is_waiting([loop, FrameSummary(filename, 1, "call", line=line)]) is waits
    assert not is_waiting([])
