"""The moments of training as a callback sees them, in a real run: their order, their values, and errors that end the run."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.errors import UNFORESEEN
from megatron_ledom.training.callback import Callback, TrainingRun
from tests.tiny_runs import TinyData, read_metrics, start_ranks


class Diary(Callback):
    """Writes each moment with the iterations done, and what came with it, into `diary.jsonl`."""

    def __init__(self, folder: Path, *, breaks_at: str = "") -> None:
        self.folder, self.breaks_at = folder, breaks_at

    def note(self, moment: str, run: TrainingRun, value: Any = None) -> None:
        with (self.folder / "diary.jsonl").open("a") as file:
            file.write(json.dumps([moment, run.state.iteration, value]) + "\n")
        if moment == self.breaks_at:
            raise ValueError("a callback of the test is broken")

    def on_train_start(self, run: TrainingRun) -> None:
        self.note("on_train_start", run)

    def wrap_batches(self, run: TrainingRun, batches: Any) -> Any:
        self.note("wrap_batches", run)
        return batches

    def on_step_start(self, run: TrainingRun) -> None:
        self.note("on_step_start", run)

    def on_step_end(self, run: TrainingRun, result: Any) -> None:
        self.note("on_step_end", run, None if result is None else result.lm_loss)

    def on_activity(self, run: TrainingRun, activity: str) -> None:
        self.note("on_activity", run, activity)

    def on_pause_end(self, run: TrainingRun, seconds: float) -> None:
        assert seconds > 0
        self.note("on_pause_end", run)

    def wants_record(self, run: TrainingRun) -> bool:
        return run.state.iteration == 3

    def on_measure(self, run: TrainingRun, record: dict[str, Any]) -> None:
        record["diary"] = 100 + run.state.iteration
        self.note("on_measure", run)

    def on_record(self, run: TrainingRun, record: dict[str, Any]) -> None:
        self.note("on_record", run, record["lm_loss"])

    def on_rollback(self, run: TrainingRun) -> None:
        self.note("on_rollback", run)

    def on_train_end(self, run: TrainingRun) -> None:
        self.note("on_train_end", run)


def train(config: str, folder: Path, settings: list[str], breaks_at: str, fault: str) -> int:
    """Train with the callback; the body of one rank."""
    from megatron_ledom import pretrain

    if fault:
        from tests.faults import inject

        inject(fault)
    sys.argv = ["pretrain", "--config", config, f"run_dir={folder / 'run'}", *settings]
    return pretrain.main(callbacks=[Diary(folder, breaks_at=breaks_at)])


def diary(data: TinyData, folder: Path, *settings: str, breaks_at: str = "", fault: str = "") -> tuple[list[Any], int, str]:
    """Return the moments of a run, its exit code and its output."""
    body = partial(train, str(data.config), folder, list(settings), breaks_at, fault)
    ranks = start_ranks(data.config, folder / "log", instead=body)
    (code,) = ranks.wait()
    return [json.loads(line) for line in (folder / "diary.jsonl").read_text().splitlines()], code, ranks.output()


def test_a_callback_sees_every_moment_in_order(data: TinyData, tmp_path: Path) -> None:
    settings = ("train.train_iters=4", "train.skip_iterations=[2]", "logging.log_interval=10", "checkpoint.save_interval=3")
    found, code, output = diary(data, tmp_path, *settings)
    assert code == 0, output
    records = {record["iteration"]: record for record in read_metrics(tmp_path / "run")}
    assert list(records) == [3, 4]  # what the callback wants, and the end
    assert [records[3]["diary"], records[4]["diary"]] == [103, 104]
    losses = [value for moment, _, value in found if moment == "on_step_end"]
    assert losses[1] is None  # a skipped iteration
    save, poll = [["on_activity", "saving"], ["on_pause_end", None]], [["on_activity", "checking the pending checkpoint"]]
    expected: list[tuple[int, str, Any]] = [(0, "on_train_start", None), (0, "wrap_batches", None)]
    for iteration, loss in enumerate(losses, 1):
        expected += [(iteration - 1, "on_step_start", None), (iteration, "on_step_end", loss)]
        expected += [(iteration, moment, value) for moment, value in (save if iteration >= 3 else [])]
        expected += [(iteration, "on_measure", None), (iteration, "on_record", loss)] if iteration >= 3 else []
        expected += [(iteration, moment, value) for moment, value in poll]
    expected += [(4, "on_activity", "finishing the last checkpoint"), (4, "on_pause_end", None), (4, "on_train_end", None)]
    assert [(iteration, moment, value) for moment, iteration, value in found] == expected
    assert records[3]["lm_loss"] == losses[2]


def test_a_callback_sees_a_return_to_a_checkpoint(data: TinyData, tmp_path: Path) -> None:
    settings = ("train.train_iters=4", "train.on_nonfinite=roll_back", "checkpoint.save_interval=2")
    found, code, output = diary(data, tmp_path, *settings, fault="nan:4")
    assert code == 0, output
    moments = [(moment, iteration) for moment, iteration, _ in found]
    start = moments.index(("on_rollback", 2))
    assert moments[start - 2 : start] == [("on_step_start", 3), ("on_activity", 3)]
    assert found[start - 1][2] == "recovering from a bad step"
    assert moments[start + 1 : start + 3] == [("wrap_batches", 2), ("on_step_start", 2)]
    assert moments[-1] == ("on_train_end", 4)
    assert [record["iteration"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize("moment", ["on_train_start", "wrap_batches", "on_step_end", "on_measure", "on_train_end"])
def test_a_callback_that_raises_ends_the_run_and_is_named(data: TinyData, tmp_path: Path, moment: str) -> None:
    found, code, output = diary(data, tmp_path, "train.train_iters=3", breaks_at=moment)
    assert code == UNFORESEEN
    assert found[-1][0] == moment
    assert "ValueError: a callback of the test is broken" in output
    assert f"raised in Diary.{moment}, a callback of the training loop" in output
